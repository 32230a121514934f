"""``python -m benchmarks.operator_compilers``: Jittor's ``use_parallel_op_compiler``; jlora's is 1.

Every run is a process that finds no operator compiled: a few steps of a tiny model by plain layers
and by fused ones. Wall-clock and processor time, failures, and whether all adapters are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHE = "benchmark-operators"  # of Jittor's, so that nobody else's operators are removed
ROOT = Path(__file__).resolve().parents[1]

TRAINING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import tiny
from jlora.cli import main
folder = Path(sys.argv[1])
model = tiny.write_model(folder / "model")
for precision in ("plain", "auto"):
    code = main(
        f"finetune --model {model} --task restaurants --rank 2 --target-modules c_attn --steps 3 "
        f"--batch-size 4 --precision {precision} --set data.train_limit=40 "
        f"--set data.valid_stride=50 --out {folder / precision}".split()
    )
    assert code == 0
"""


def child(code: str, setting: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python code with a setting, in the benchmark's cache."""
    environment = {**os.environ, "cache_name": CACHE, "use_parallel_op_compiler": str(setting)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def train(setting: int, operators: Path) -> tuple[float, float, int, str]:
    """Seconds, processor seconds, operators, and a hash of the adapters or why there is none."""
    shutil.rmtree(operators)
    operators.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = child(TRAINING, setting, folder, str(ROOT / "tests"))
        seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found = sorted(Path(folder).glob("*/adapter/adapter_model.safetensors"))
        outcome = hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]
        if done.returncode or len(found) != 2:
            outcome = f"exit code {done.returncode}: {done.stderr[-300:]}"
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return seconds, processor, len(list(operators.glob("*.so"))), outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, nargs="+", default=[0, 1, 2, 16])
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    cache = child("from jlora.system.runtime import jt; print('\\n' + jt.flags.cache_path)", 1)
    operators = Path(cache.stdout.split("\n")[-2], "jit")
    if operators.parent.name != CACHE:
        sys.exit(f"Jittor cannot be imported: {cache.stderr}")
    train(1, operators)  # compiles jlora's library
    runs: dict[int, list] = {setting: [] for setting in chosen.settings}
    for _ in range(chosen.runs):
        for setting in chosen.settings:
            runs[setting].append(train(setting, operators))
    print(
        "| setting | seconds | processor seconds | operators | outcome |\n|---:|---:|---:|---:|---|"
    )
    for setting, results in runs.items():
        seconds, processor, count = (statistics.median(r[i] for r in results) for i in range(3))
        outcomes = ", ".join(sorted({r[3] for r in results}))
        print(f"| {setting} | {seconds:.1f} | {processor:.1f} | {count:.0f} | {outcomes} |")


if __name__ == "__main__":
    main()
