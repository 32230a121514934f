"""``make gpu-compile``: what runs on a card, compiled by NVIDIA's compiler without a card.

jlora's own operators, and, with ``--rehearsed``, those that Jittor has made while jlora ran on an
emulated card (`benchmarks.gpu_rehearsal`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jlora.kernels import gpu_library
from jlora.system import cuda_toolkit, machine

#: Flags of a compilation that do not belong to one toolkit, or to linking.
_KEPT = ("-std=", "-D", "-I", "-w", "--use_fast_math", "-ccbin=")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("capabilities", nargs="+", type=int, help="of cards: 80, 90")
    options.add_argument("--rehearsed", type=Path, help="compiled.jsonl of a rehearsal")
    chosen = options.parse_args()
    toolkit = cuda_toolkit.find()
    if toolkit is None or toolkit.missing:
        print(f"no CUDA toolkit, or it lacks {toolkit and toolkit.missing}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        nvcc = cuda_toolkit.set_up(toolkit, Path(scratch))
        for capability in chosen.capabilities:
            started = time.monotonic()
            command = gpu_library.command(str(nvcc), machine.compiler(), (capability,))
            result = subprocess.run([*command, "-o", f"{scratch}/operators.so"])
            word = "failed" if result.returncode else "compiled"
            print(f"sm_{capability}: {word} in {time.monotonic() - started:.0f} s", flush=True)
            if result.returncode:
                return result.returncode
        if chosen.rehearsed is None:
            return 0
        return compile_rehearsed(chosen.rehearsed, nvcc, chosen.capabilities, Path(scratch))


def compile_rehearsed(record: Path, nvcc: Path, capabilities: Sequence[int], scratch: Path) -> int:
    """Compile Jittor's operators of a rehearsal; says which could not be.

    Args:
        record: a line for each call of nvcc, its arguments as JSON.
        scratch: a folder for what comes out, which nobody needs.
    """
    sources = {}
    for line in record.read_text().splitlines():
        arguments = json.loads(line)
        for argument in arguments:
            if argument.endswith((".cc", ".cu")) and Path(argument).is_file():
                sources[argument] = arguments
    sources.pop(str(gpu_library.SOURCE), None)
    targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]

    def compiled(source: str, arguments: list[str], number: int) -> str:
        rehearsals = arguments[0].removeprefix("-I")  # its toolkit: nvcc's script put that first
        flags = [f for f in arguments if f.startswith(_KEPT) and rehearsals not in f]
        command = [str(nvcc), "-x", "cu", "-c", source, *flags, *targets]
        output = scratch / f"{number}.o"
        done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        output.unlink(missing_ok=True)
        return done.stderr if done.returncode else ""

    started = time.monotonic()
    with ThreadPoolExecutor(machine.processors()) as pool:
        problems = list(pool.map(compiled, sources, sources.values(), range(len(sources))))
    failed = [(source, why) for source, why in zip(sources, problems) if why]
    print(
        f"Jittor's: {len(sources) - len(failed)} of {len(sources)} compiled for "
        f"{', '.join(f'sm_{c}' for c in capabilities)} in {time.monotonic() - started:.0f} s"
    )
    for source, why in failed:
        print(f"{source}:\n{why}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
