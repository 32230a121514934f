"""``make align``: one fine-tuning in jlora and in PyTorch with PEFT, beside each other.

Both read the same float32 weights, the same first adapter and the same batches of E2E in the same
order. Without dropout the losses of every step can be compared; with it (the masks differ) their
means. Then both answer the test inputs greedily, each by its own code, and the official
metrics score the texts. The report is align.md, align.png, align.html and losses.csv in ``--out``.

Every stage is a process and leaves its result in ``--out``: the same command goes on with what is
left, from the last checkpoint of a training that was cut.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import work
from benchmarks.sides import PYTHON, ROOT, Side, alternate
from jlora.system.files import write_text
from parity.__main__ import PYTHON as PARITY_PYTHON
from parity.align_report import WAYS, write, write_documents

TORCH = PARITY_PYTHON["reference"]
PYTHON["reference"] = TORCH  # an environment for `Side`


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m parity.align", description=__doc__)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "align")
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="another setting of parity/align-e2e.yaml, such as train.steps=20",
    )  # fmt: skip
    options.add_argument(
        "--times-again", action="store_true", help="measure seconds a step and memory once more"
    )
    options.add_argument("--rounds", type=int, default=12, help="steps of that measurement")
    options.add_argument(
        "--docs", type=Path, metavar="FOLDER",
        help="also put the results into replication.md and replication.cn.md there",
    )  # fmt: skip
    chosen = options.parse_args()
    out = chosen.out
    if not TORCH.exists():
        print("align: no .venv-parity; run `make align`, which makes it", file=sys.stderr)
        return 2
    settings = out / "settings.json"
    if not settings.is_file():
        out.mkdir(parents=True, exist_ok=True)
        run(sys.executable, "-m", "parity.align_inputs", out, *chosen.set)
    elif json.loads(settings.read_text())["changes"] != chosen.set:
        print(f"align: {out} holds a comparison with other settings; choose another --out, or "
              "remove it", file=sys.stderr)  # fmt: skip
        return 2
    for way in WAYS:
        train_jlora(out, way)
        if not (out / f"torch-{way}" / "done.json").is_file():
            run(TORCH, "-W", "ignore", "-m", "parity.align_torch", out, way)
    if chosen.times_again or not (out / "times.json").is_file():
        measure(out, chosen.rounds)
    print(write(out))
    if chosen.docs:
        write_documents(out, chosen.docs)
    return 0


def run(*command) -> None:
    """Run a command to its end; exits with its code if it fails."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def train_jlora(out: Path, way: str) -> None:
    """An ordinary `jlora run`: training, answers, scores."""
    folder = out / f"jlora-{way}"
    if (folder / "scores.json").is_file() and (folder / "report.html").is_file():
        return
    command = [sys.executable, "-m", "jlora", "run"]
    if (folder / "config.yaml").is_file():
        command.append("--resume")
    else:
        command.append(out / "config.yaml")
        command += ["--set", "lora.lora_dropout=0"] if way == "off" else []
    run(*command, "--out", folder)


def measure(out: Path, rounds: int) -> None:
    """Seconds a step and peak memory of each side, in turn on the last batches of the training."""
    spec = {
        "config": work.MODELS["smollm2-135m"], "lora": work.lora_settings("smollm2-135m"),
        "batches": str((out / "batches.npz").absolute()), "label_smoothing": 0.1,
    }  # fmt: skip
    sides = [
        Side(f"{name} {precision}", module, environment, {**spec, "precision": precision})
        for precision in ("fp32", "bf16")
        for name, module, environment in (
            ("jlora", "jlora_train", "jlora"), ("PEFT", "torch_train", "reference"),
        )
    ]  # fmt: skip
    before = os.getloadavg()[0]
    alternate(sides, rounds)
    failed = [f"{side.name}: {side.problem}" for side in sides if side.problem]
    if failed:
        sys.exit("align: " + "; ".join(failed))
    measured = {side.name: {"seconds": side.seconds, "peak_mb": side.peak_mb} for side in sides}
    times = {"load_before": before, "sides": measured}
    write_text(out / "times.json", json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
