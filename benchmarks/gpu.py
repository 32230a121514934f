"""``make gpu-check``: what works on an NVIDIA card, how exactly and how fast, in under ten minutes.

Stages run one after the other, each with a limit of its own; what a stage finds is printed and
written at once, so that a machine that is taken away has told what it could. What no card has
answered yet comes first. No network is needed: `make gpu-inputs` has written batches and prompts
beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_exact, gpu_speed, sides, work
from benchmarks.sides import ROOT

INPUTS = ROOT / "runs" / "gpu" / "inputs"
#: Limit of each in seconds; what they took or should take is in docs/gpu.md.
STAGES = {
    "compile": 200, "twins": 90, "fixtures": 200, "epochs": 70, "decode": 140, "train": 200,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is computed; `REHEARSAL` is for a card that is emulated.

    Attributes:
        configs: of the models that are trained; the first one decodes, too.
        even: rows and tokens of the batches of equal rows.
        rows: of E2E's batches.
        steps: of training beside the peer; `epoch_steps` is how many the five epochs are told from.
        inputs, beams, new_tokens: of decoding.
    """

    configs: dict[str, dict]
    even: tuple[int, int] = (8, 512)
    rows: int = 8
    steps: int = 50
    epoch_steps: int = 200
    inputs: int = 64
    beams: int = 10
    new_tokens: int = 64


FULL = Sizes({name: work.MODELS[name] for name in ("gpt2-medium", "gpt2-small")})
_SMALL = {**work.MODELS["gpt2-small"], "n_embd": 64, "n_layer": 1, "n_head": 2}
REHEARSAL = Sizes(
    {"gpt2-medium": _SMALL}, even=(2, 40), rows=1, steps=2, epoch_steps=4, inputs=2, beams=2,
    new_tokens=4,
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    options.add_argument("--inputs", type=Path, default=INPUTS)
    options.add_argument("--prepare", action="store_true", help="write the inputs and end")
    options.add_argument("--stage", choices=STAGES, help="run one stage here, without a limit")
    options.add_argument("--limit", type=float, help="of --stage: where it stands after so long")
    options.add_argument("--seconds", type=float, default=560, help="of all stages together")
    options.add_argument("--torch-path", help="PYTHONPATH of the processes of PyTorch")
    options.add_argument("--rehearsal", action="store_true", help="small, for an emulated card")
    chosen = options.parse_args()
    chosen.sizes = REHEARSAL if chosen.rehearsal else FULL
    if chosen.prepare:
        prepare(chosen.inputs, chosen.sizes)
    elif chosen.stage:
        sides.PYTHON.update(jlora=Path(sys.executable), peft=Path(sys.executable))
        if chosen.limit is not None:
            faulthandler.dump_traceback_later(chosen.limit)
        run_stage = {
            "compile": compile_all, "twins": gpu_exact.twins, "fixtures": gpu_exact.fixtures,
            "epochs": gpu_speed.epochs, "decode": gpu_speed.decode, "train": gpu_speed.train,
        }  # fmt: skip
        run_stage[chosen.stage](chosen)
    else:
        run_stages(chosen)


def run_stages(chosen: argparse.Namespace) -> None:
    """Run stages as processes; their output goes to the screen and behind ``report.txt``."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (chosen.out / "report.txt").open("a") as report:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            report.write(text)
            report.flush()

        for command in ("nvidia-smi -L", "nvcc --version | tail -2 | head -1", "date -u +%F"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                asked = subprocess.run(
                    command, shell=True, capture_output=True, text=True, timeout=30
                )
                say(asked.stdout)
        for stage in chosen.stages:
            left = chosen.seconds - (time.monotonic() - began)
            if left < 20:
                say(f"\n## {stage}: no time left\n")
                continue
            limit = min(STAGES[stage], left - 10)  # seconds that it may take to die
            say(f"\n## {stage}\n")
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--stage", stage]
            command += ["--out", str(chosen.out), "--inputs", str(chosen.inputs)]
            command += ["--limit", str(limit - 2)]
            command += ["--rehearsal"] * chosen.rehearsal
            if chosen.torch_path is not None:
                command += ["--torch-path", chosen.torch_path]
            started = time.monotonic()
            ended = run_limited(command, limit, say)
            say(f"({stage}: {time.monotonic() - started:.0f} s{ended})\n")


def run_limited(command: Sequence[str], limit: float, say: Callable[[str], None]) -> str:
    """Run a command, and end it and what it has started after ``limit`` seconds.

    It may leave a process behind that holds its output, or hang in the driver, where no signal
    reaches it: the next stage begins all the same.

    Args:
        say: gets its output line by line, at once.

    Returns:
        How it ended; "" if well.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip

    def pass_on() -> None:
        with process.stdout:
            for line in process.stdout:
                say(line)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        ended = "" if code == 0 else f", ended with {code}"
    except subprocess.TimeoutExpired:
        ended = ", ended with its limit"
    finally:  # also after Ctrl-C, which does not reach it
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            reader.join(1)
    return ended


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write what the stages read besides the code: batches and prompts of E2E."""
    from benchmarks.decoding import make_spec

    folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    work.e2e_batches(folder / "e2e.npz", data, "gpt2-medium", sizes.rows, sizes.epoch_steps)
    work.even_batches(folder / "even.npz", work.GPT2["vocab_size"], *sizes.even)
    options = argparse.Namespace(
        model="gpt2-medium", adapter=None, beams=sizes.beams, new_tokens=sizes.new_tokens,
        rank_up_to=None,
    )  # fmt: skip
    spec = {**make_spec(options, folder / "prompts.json"), "config": sizes.configs["gpt2-medium"]}
    (folder / "decode.json").write_text(json.dumps(spec))
    gpu_exact.prepare(folder)


def compile_all(chosen: argparse.Namespace) -> None:
    """Jittor's CUDA build, the doctor's word, and jlora's operators."""
    from jlora.cli import doctor
    from jlora.kernels import native
    from jlora.system.runtime import jt, use_gpu

    gpu_speed.timed("Jittor for CUDA", lambda: jt.has_cuda)
    use_gpu(True)
    gpu_speed.timed("jlora's operators", native.library)
    doctor.main()


if __name__ == "__main__":
    main()
