"""``make bench``: training and decoding beside the peers, on one page.

Cases are measured one after another, and each result is written down at once: a run that was cut
goes on with the cases that it lacks, if it is started with the same options and code. The page, its
figures as JSON and a chart come into the folder --out; the page goes to standard output too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks import decoding, training, work
from benchmarks.cases import SLOW, Plan, cases
from benchmarks.chart import draw
from benchmarks.environments import ISA, PACKAGES, missing, versions
from benchmarks.inputs import Inputs
from benchmarks.page import page
from benchmarks.sides import PYTHON, ROOT
from benchmarks.size import git
from jlora.system import machine
from jlora.system.files import write_text

QUICK = {
    "rounds": 2, "seconds": 3.0, "warmup": 1, "ours": 32, "theirs": 8, "tokens": 32, "together": 16,
    "peak_rounds": 4, "left_out": SLOW,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    options = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true",
                         help="one model, few rounds, no slow sides: five minutes")  # fmt: skip
    options.add_argument("--isa", choices=ISA, default="native",
                         help="avx2: hold all sides to what most laptops have")  # fmt: skip
    options.add_argument("--models", nargs="+", choices=work.MODELS, help="to train")
    options.add_argument("--only", nargs="+", metavar="CASE",
                         help="names, or how they begin: training, beam, streams")  # fmt: skip
    options.add_argument("--also", nargs="+", default=[], metavar="PEER",
                         choices=[n for n in training.PEERS if n.startswith(training.MICROSOFT)],
                         help="train with microsoft/LoRA's code too (it is cloned)")  # fmt: skip
    options.add_argument("--rounds", type=int)
    options.add_argument("--prepare", action="store_true", help="only make models in all forms")
    options.add_argument("--again", action="store_true", help="forget the results of a cut run")
    options.add_argument("--list", action="store_true", help="name the cases and end")
    options.add_argument("--models-folder", type=Path, default=ROOT / "runs" / "bench" / "models")
    options.add_argument(
        "--page",
        type=Path,
        metavar="FILE.md",
        help="write the page there too, with its pictures beside it",
    )
    options.add_argument("--out", type=Path, help="default: runs/bench/ISA, or ISA-quick")
    chosen = options.parse_args(arguments)
    name = chosen.isa + ("-quick" if chosen.quick else "")
    out = chosen.out or ROOT / "runs" / "bench" / name
    trained = chosen.models or (["gpt2-small"] if chosen.quick else list(work.MODELS))
    wanted = cases(trained, chosen.also)
    if chosen.only:
        begin = tuple(chosen.only)
        wanted = {n: case for n, case in wanted.items() if n == "peak" or n.startswith(begin)}
    if chosen.list:
        print("\n".join(wanted))
        return
    settings = {**(QUICK if chosen.quick else {}), **({"rounds": chosen.rounds} if chosen.rounds
                                                      else {})}  # fmt: skip
    plan = Plan(chosen.isa, Inputs(chosen.models_folder), chosen.also, **settings)
    if chosen.prepare:
        prepare(plan, trained)
        return
    results = measured(wanted, plan, out, settings, chosen.again)
    figures = {"head": head(chosen.isa, arguments), "results": results}
    write_text(out / "page.json", json.dumps(figures, indent=1) + "\n")
    for file in [out / "page.md", *([chosen.page] if chosen.page else [])]:
        draw(figures, file.with_suffix(""))
        write_text(file, page(figures, file.with_suffix(".svg").name))
    if not chosen.only:
        shutil.rmtree(out / "parts")
    print((out / "page.md").read_text(encoding="utf-8"))


def measured(wanted: dict, plan: Plan, out: Path, settings: dict, again: bool) -> list[dict]:
    """The results of all cases; those of a run that was cut, with the same settings and code, are
    kept."""
    parts = out / "parts"
    same = json.dumps([plan.isa, list(plan.also), settings, code()], default=list)
    if again or not parts.is_dir() or (parts / "settings").read_text() != same:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_text(parts / "settings", same)
    results = []
    for name, case in wanted.items():
        file = parts / f"{name}.json"
        started = time.monotonic()
        if not file.is_file():
            print(f"{name} ...", end="", file=sys.stderr, flush=True)
            write_text(file, json.dumps(case(plan)))
            print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        results += json.loads(file.read_text())
    return results


def prepare(plan: Plan, trained: list[str]) -> None:
    """Make what the cases read, and say what could not be made."""
    for model in trained:
        plan.inputs.checkpoint(model)
    with tempfile.TemporaryDirectory() as scratch:
        spec = decoding.tuned_spec(plan.inputs, Path(scratch) / "prompts.json")
        sides = decoding.beam_sides(spec, plan.inputs, 1, 1)
        sides += decoding.stream_sides(spec, plan.inputs)
    for side in sides:
        print(f"{side.name}: {side.problem or 'ready'}")


def code() -> str:
    """Changes with the package and the benchmarks, as far as git knows them."""
    folders = ("jlora", "benchmarks")
    trees = git(ROOT, "rev-parse", *(f"HEAD:{folder}" for folder in folders))
    return trees + git(ROOT, "diff", "HEAD", "--", *folders)


def commit() -> str:
    """The commit, with + where a file of it differs."""
    changed = git(ROOT, "status", "--short", "--untracked-files=no")
    return git(ROOT, "rev-parse", "--short", "HEAD") + "+" * bool(changed)


def torch_memory() -> float | None:
    """MB that importing torch takes; the wheel for graphics cards brings much that is not used."""
    code = "import torch; from benchmarks.sides import peak_mb; print(peak_mb())"
    command = [str(PYTHON["peft"]), "-W", "ignore", "-c", code]
    if missing("peft"):
        return None
    return float(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


def head(isa: str, arguments: list[str]) -> dict:
    """The machine, and what ran on it."""
    memory = machine.memory_limit() / 2**30
    used = f"make bench ARGS={shlex.quote(' '.join(arguments))}" if arguments else "make bench"
    return {
        "processor": machine.cpu_model(), "processors": machine.processors(),
        "features": machine.cpu_features(), "memory_gb": round(memory), "isa": isa,
        "date": str(date.today()), "command": used, "commit": commit(),
        "versions": {e: versions(e) for e in PACKAGES if missing(e) is None},
        "torch_mb": torch_memory(),
    }  # fmt: skip
