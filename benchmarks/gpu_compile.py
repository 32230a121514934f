"""``make gpu-compile``: compile jlora's CUDA operators for some kinds of cards, without a card."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jlora.kernels import gpu_library
from jlora.system import cuda_toolkit, machine


def main() -> int:
    toolkit = cuda_toolkit.find()
    if toolkit is None or toolkit.missing:
        print(f"no CUDA toolkit, or it lacks {toolkit and toolkit.missing}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        nvcc = cuda_toolkit.set_up(toolkit, Path(scratch))
        for capability in map(int, sys.argv[1:]):
            started = time.monotonic()
            command = gpu_library.command(str(nvcc), machine.compiler(), (capability,))
            result = subprocess.run([*command, "-o", f"{scratch}/operators.so"])
            word = "failed" if result.returncode else "compiled"
            print(f"sm_{capability}: {word} in {time.monotonic() - started:.0f} s", flush=True)
            if result.returncode:
                return result.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
