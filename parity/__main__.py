"""The driver: ``python -m parity --seed 1``; see `parity`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from parity.case import Case, Outcome, compare
from parity.files import TOPICS, errors, results, stage_file, topic_module, write_inputs
from parity.table import Line, make_lines, markdown, write

ROOT = Path(__file__).resolve().parents[1]
PYTHON = {"reference": ROOT / ".venv-parity" / "bin" / "python", "jlora": Path(sys.executable)}
PACKAGES = ("torch", "transformers", "peft", "loralib")


def main() -> int:
    """Run the topics; returns 0 if every case passes, else 1."""
    arguments = argparse.ArgumentParser(prog="python -m parity", description=__doc__)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--topics", nargs="+", choices=TOPICS, default=TOPICS)
    arguments.add_argument("--out", type=Path, default=None, help="default: runs/parity/SEED")
    chosen = arguments.parse_args()
    out = chosen.out or ROOT / "runs" / "parity" / str(chosen.seed)
    if not PYTHON["reference"].exists():
        print("parity: no .venv-parity; run `make parity`, which makes it", file=sys.stderr)
        return 2
    lines: list[Line] = []
    for topic in chosen.topics:
        started = time.monotonic()
        outcomes = run_topic(topic, chosen.seed, out / topic)
        lines += make_lines(topic, outcomes)
        failed = [(case, outcome) for case, outcome in outcomes if not outcome.passed]
        print(
            f"{topic}: {len(outcomes)} cases, {len(failed)} failed, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        for case, outcome in failed:
            print(f"  {case.name}: {outcome.problem}", flush=True)
    write(out, chosen.seed, versions(), lines)
    print(f"\nseed {chosen.seed}\n{markdown(lines)}\n\n{out / 'table.md'}")
    return 1 if any(line.failed for line in lines) else 0


def run_topic(name: str, seed: int, folder: Path) -> list[tuple[Case, Outcome]]:
    """Run every stage of a topic in its own process, one after another, then compare."""
    topic = topic_module(name)
    cases = topic.cases(seed)
    shutil.rmtree(folder, ignore_errors=True)
    for case in cases:
        write_inputs(topic, case, seed, folder / case.name)
    died = []
    for stage, (side, _) in enumerate(topic.STAGES):
        command = [PYTHON[side], "-m", "parity.side", name, str(stage), str(seed), folder]
        log = folder / f"{stage}-{side}.log"
        with open(log, "wb") as output:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if code:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            problem = f"exit code {code}: {' '.join(tail)} ({log})"
            case = Case("processes", f"{name}-{stage}-{side}", relative_to="exact")
            died.append((case, Outcome(float("inf"), float("inf"), "", problem)))
    return [*((case, judge(topic, case, folder / case.name)) for case in cases), *died]


def judge(topic, case: Case, folder: Path) -> Outcome:
    """Compare the results of the two sides of a case."""
    failures = list(errors(topic, folder))
    if failures:
        last = failures[0].strip().splitlines()[-1]
        return Outcome(float("inf"), float("inf"), "", f"{last} ({folder}/*.error)")
    left = [stage_file(topic, stage) for stage in range(len(topic.STAGES))]
    absent = [name for name in left if not (folder / name).is_file()]
    if absent:
        return Outcome(float("inf"), float("inf"), "", f"no {absent[0]}: its process died")
    return compare(case, results(topic, folder, "reference"), results(topic, folder, "jlora"))


def versions() -> dict[str, str]:
    """Versions of the reference packages."""
    code = (
        "import importlib.metadata as m, json; "
        f"print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    )
    return json.loads(subprocess.check_output([PYTHON["reference"], "-c", code]))


if __name__ == "__main__":
    sys.exit(main())
