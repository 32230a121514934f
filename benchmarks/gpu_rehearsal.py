"""``make gpu-rehearsal``: Jittor, jlora and the check of a card on a card that is emulated.

The emulator (``tests/cuda_emulator``) stands behind the names of CUDA's compiler and libraries, so that
Jittor compiles itself for CUDA and each of its operators runs as it does on a card, thread by
thread, only very slowly. CUDA's headers are NVIDIA's own, from PyPI (`make .venv-cuda/.installed`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.sides import ROOT
from jlora.system import machine

EMULATOR = ROOT / "tests" / "cuda_emulator"
#: What the emulated libraries are called; the numbers are CUDA 13's.
LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10")
# Where jlora looks for a card.
_CARD = """import glob
_glob = glob.glob
glob.glob = lambda p, **more: ["/dev/nvidia0"] if "/dev/nvidia" in p else _glob(p, **more)
"""


def make_toolkit(folder: Path, headers: Path) -> Path:
    """A folder like a CUDA toolkit's, behind which the emulator stands.

    Args:
        headers: CUDA's.
    """
    source = EMULATOR / "jittor"
    for name in ("bin", "include/cccl/cub", "lib64", "python", "home"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {sys.executable} {source / "nvcc"} "$@"\n')
    nvcc.chmod(0o755)
    for name in ("thrust", "cuda", "nv"):
        (folder / "include" / "cccl" / name).unlink(missing_ok=True)
        (folder / "include" / "cccl" / name).symlink_to(headers / "cccl" / name)
    (folder / "include" / "cccl" / "cub" / "cub.cuh").write_text(f'#include "{source}/cub/cub.cuh"\n')
    (folder / "include" / "mma.h").write_text(f'#include "{EMULATOR}/mma.h"\n')
    (folder / "python" / "sitecustomize.py").write_text(_CARD)
    first = folder / "lib64" / LIBRARIES[0]
    compiler = machine.compiler()
    command = [compiler, "-std=c++17", "-O3", "-w", "-shared", "-fPIC", f"-I{headers}"]
    command += [str(source / "libraries.cc"), f"-Wl,-soname,{first.name}", "-o", str(first)]
    subprocess.run(command, check=True)
    for name in LIBRARIES[1:]:
        command = [compiler, "-shared", "-Wl,--no-as-needed", str(first), f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-o", str(folder / "lib64" / name)], check=True)
    for name in ("libcuda.so", "libcuda.so.1"):
        link = folder / "lib64" / name
        link.unlink(missing_ok=True)
        link.symlink_to(first.name)
    return folder


def environment(folder: Path, packages: Path) -> dict[str, str]:
    """Variables for a process that shall find the emulated card.

    Args:
        folder: of `make_toolkit`.
        packages: of CUDA's headers, a folder for Python's path.
    """
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(folder / "lib64"),
        "PYTHONPATH": f"{folder / 'python'}:{packages}",
        "HOME": str(folder / "home"),
        "JLORA_REHEARSED": str(folder / "compiled.jsonl"),
    }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("command", nargs="*", help="run this instead of the check's stages")
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu" / "rehearsal")
    chosen = options.parse_args()
    (packages,) = (ROOT / ".venv-cuda").glob("lib/python*/site-packages")
    (headers,) = packages.glob("nvidia/cu*/include")
    folder = make_toolkit(chosen.out.resolve(), headers)
    command = chosen.command or [sys.executable, "-m", "benchmarks.gpu"]
    return subprocess.run(command, env=environment(folder, packages)).returncode


if __name__ == "__main__":
    sys.exit(main())
