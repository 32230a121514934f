"""Training by several processes on one machine: ``python -m benchmarks.processes``

Two tables: the time of summing gradients, through shared memory and through TCP; and the time of a
recipe's steps in one process with all threads and in N processes that divide them, in alternation.
``--compare RUN RUN...`` prints instead how much finished runs differ from the first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from jlora.system import distributed
from jlora.system.machine import cpu_model, processors
from jlora.training.loggers import read_metrics

#: What is trained, and the number of trained values.
SIZES = {
    "SmolLM2-135M, r = 4 on query and value": 230_400,
    "GPT-2 medium, r = 4 on query and value": 393_216,
    "GPT-2 large, r = 4 on query and value": 737_280,
    "SmolLM2-135M, all of it": 134_515_008,
}
TRANSPORTS = {"shared memory": (), "TCP on this machine": ("--mca", "btl", "tcp,self")}
WARM_UP = 5  # steps of each run that do not count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--recipe", default="e2e-smollm2-135m")
    options.add_argument("--processes", default="1,2,4", help="numbers of processes")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--sums", type=int, help=argparse.SUPPRESS)  # a process of `time_sums`
    options.add_argument("--compare", nargs="+", metavar="RUN", type=Path)
    chosen = options.parse_args()
    if chosen.compare:
        compare(*chosen.compare)
        return
    if chosen.sums:
        time_sums(chosen.sums)
        return
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    numbers = [int(number) for number in chosen.processes.split(",")]
    ways = [(n, name) for n in numbers if n > 1 for name in TRANSPORTS]
    heads = [f"{n} processes, {name}" for n, name in ways]
    print(f"\n| milliseconds of a sum over | numbers | {' | '.join(heads)} |")
    print("|---|--:|" + "--:|" * len(ways))
    for name, size in SIZES.items():
        times = [sums(n, size, TRANSPORTS[way]) for n, way in ways]
        print(f"| {name} | {size:,} | " + " | ".join(f"{t:.2f}" for t in times) + " |")
    steps(chosen, numbers)


def sums(processes: int, size: int, flags: tuple[str, ...]) -> float:
    """Milliseconds of a sum over float32 arrays, the median."""
    command = [
        *distributed.mpirun(processes, *flags),
        "-m",
        "benchmarks.processes",
        "--sums",
        str(size),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def time_sums(size: int) -> None:
    import numpy as np

    here = distributed.join()
    parts = [np.ones(part, "f") for part in (size // 2, size - size // 2)]
    times = []
    for _ in range(max(5, min(200, 200_000_000 // size))):
        started = time.perf_counter()
        here.sum_arrays(parts)
        times.append(1000 * (time.perf_counter() - started))
    if here.is_first:
        print(statistics.median(times))
    here.finish(0)


def steps(chosen, numbers: list[int]) -> None:
    seconds: dict[int, list[float]] = {n: [] for n in numbers}
    tokens: dict[int, list[float]] = {n: [] for n in numbers}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(chosen.rounds):
            for n in numbers:
                run = Path(scratch) / f"{turn}-{n}"
                command = [sys.executable, "-m", "jlora.cli", "finetune", "--out", str(run)]
                command += ["--recipe", chosen.recipe, "--nproc", str(n)]
                for setting in (f"steps={chosen.steps}", "log_every=1", "valid_every=0"):
                    command += ["--set", f"train.{setting}"]
                command += ["--set", "data.valid_stride=1000"]
                subprocess.run(command, check=True, capture_output=True)
                rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
                ends = [row["seconds"] for row in rows]
                seconds[n] += [b - a for a, b in zip(ends, ends[1:])][WARM_UP:]
                tokens[n] += [row["tokens_per_s"] for row in rows][WARM_UP:]
    base = statistics.median(seconds[numbers[0]])
    print(f"\n{chosen.recipe}, {chosen.rounds} x {chosen.steps} steps, medians\n")
    print(f"| processes | seconds a step | tokens a second | beside {numbers[0]} |")
    print("|--:|--:|--:|--:|")
    for n in numbers:
        median = statistics.median(seconds[n])
        print(f"| {n} | {median:.3f} | {statistics.median(tokens[n]):,.0f} | {base / median:.2f} |")


def compare(first: Path, *others: Path) -> None:
    """Relative differences between runs of one recipe: losses, and adapters (to the largest)."""
    from safetensors.numpy import load_file

    def of(run: Path):
        rows = read_metrics(run / "metrics.jsonl")
        adapter = load_file(run / "adapter" / "adapter_model.safetensors")
        texts = run / "predictions.txt"
        return rows, adapter, texts.read_text() if texts.exists() else None

    rows, adapter, texts = of(first)
    print(f"| beside {first.name} | steps | losses | validation losses | adapter | answers |")
    print("|---|--:|--:|--:|--:|---|")
    for run in others:
        own_rows, own_adapter, own_texts = of(run)
        cells = []
        for key in ("loss", "valid_loss"):
            pairs = [(a[key], b[key]) for a, b in zip(rows, own_rows) if key in a]
            cells.append(max((abs(a - b) / a for a, b in pairs), default=0.0))
        cells.append(max(abs(own_adapter[n] - a).max() / abs(a).max() for n, a in adapter.items()))
        shown = " | ".join(f"{cell:.1e}" for cell in cells)
        same = "equal" if own_texts == texts else "not equal"
        print(f"| {run.name} | {max(row['step'] for row in own_rows)} | {shown} | {same} |")


if __name__ == "__main__":
    main()
