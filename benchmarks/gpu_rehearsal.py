"""``make gpu-rehearsal``: the check of a card, on a card that is emulated.

The emulator (``tests/cuda_emulator``) stands behind the names of CUDA's compiler and libraries, so
that Jittor compiles itself for CUDA, and its operators and jlora's run as on a card, thread by
thread, only very slowly. CUDA's headers are NVIDIA's own.

    python -m benchmarks.gpu_rehearsal -- jlora run ...     # any command on that card
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import STAGES
from benchmarks.sides import ROOT
from jlora.system import machine
from jlora.system.environment import jittor_variables
from jlora.system.operator_compiler import FLAGS

EMULATOR = ROOT / "tests" / "cuda_emulator"
OUT = ROOT / "runs" / "gpu" / "rehearsal"
#: What the emulated libraries are called; the numbers are CUDA 13's.
LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10")
#: Headers of cub that Jittor's operators name.
CUB = ("cub.cuh", "block/block_scan.cuh", "device/device_segmented_radix_sort.cuh")
# Python runs this first; jlora looks for a card there.
_CARD = """import glob
_glob = glob.glob
glob.glob = lambda p, **more: ["/dev/nvidia0"] if "/dev/nvidia" in p else _glob(p, **more)
"""


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("command", nargs="*", help="run this instead of the check's stages")
    options.add_argument("--out", type=Path, default=OUT)
    chosen = options.parse_args()
    packages = next((ROOT / ".venv-cuda").glob("lib/python*/site-packages"), None)
    headers = packages and next(packages.glob("nvidia/cu*/include"), None)
    if packages is None or headers is None:
        print("no headers of CUDA: make .venv-cuda/.installed", file=sys.stderr)
        return 2
    folder = make_toolkit(chosen.out.resolve(), headers)
    variables = environment(folder, packages)
    if chosen.command:
        return subprocess.run(chosen.command, env=variables).returncode
    check = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--rehearsal"]
    check += ["--inputs", str(folder / "inputs")]
    subprocess.run([*check, "--prepare"], check=True)  # on the processor
    failed = [s for s in STAGES if not passes([*check, "--stage", s], variables, f"## {s}")]
    print(f"failed: {', '.join(failed)}" if failed else "every stage passed")
    return int(bool(failed))


def passes(command: list[str], variables: dict[str, str], title: str) -> bool:
    """Run a stage, which says FAILED of what is wrong; print what it says at once."""
    print(title, flush=True)
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    good = True
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            good &= "FAILED" not in line and "ended with" not in line
    return good and process.returncode == 0


def make_toolkit(folder: Path, headers: Path) -> Path:
    """Make a folder like a CUDA toolkit's, behind which the emulator stands.

    Args:
        headers: CUDA's own.
    """
    source = EMULATOR / "jittor"
    for name in ("bin", "include/cccl", "lib64", "python", "home"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    nvcc = f'exec {sys.executable} {source / "nvcc.py"} "$@"'
    for name, does in (("nvcc", nvcc), ("nvidia-smi", "echo 65536")):  # MiB, used and free
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    cub = folder / "include" / "cccl" / "cub"
    for header in CUB:
        (cub / header).parent.mkdir(parents=True, exist_ok=True)
        (cub / header).write_text(f'#include "{source}/cub.cuh"\n')
    (folder / "include" / "mma.h").write_text(f'#include "{EMULATOR}/mma.h"\n')
    for name in ("thrust", "cuda", "nv"):
        link(folder / "include" / "cccl" / name, headers / "cccl" / name)
    (folder / "python" / "sitecustomize.py").write_text(_CARD)
    libraries = folder / "lib64"
    runtime, compiler = libraries / LIBRARIES[0], machine.compiler()
    command = [compiler, "-std=c++17", "-O3", "-w", "-shared", "-fPIC", f"-I{headers}"]
    command += [str(source / "libraries.cc"), f"-Wl,-soname,{runtime.name}", "-o", str(runtime)]
    subprocess.run(command, check=True)
    for name in LIBRARIES[1:]:
        command = [compiler, "-shared", "-Wl,--no-as-needed", str(runtime), f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-o", str(libraries / name)], check=True)
    for name in ("libcuda.so", "libcuda.so.1"):
        link(libraries / name, runtime)
    return folder


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def environment(folder: Path, packages: Path) -> dict[str, str]:
    """Variables for a process that shall find the emulated card.

    Args:
        folder: of `make_toolkit`.
        packages: where CUDA's headers are, as Python's packages.
    """
    ours = {*jittor_variables(), *FLAGS, "log_silent"}  # set if this process has imported Jittor
    return {
        **{name: value for name, value in os.environ.items() if name not in ours},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(folder / "lib64"),
        "PYTHONPATH": f"{folder / 'python'}:{packages}",
        "HOME": str(folder / "home"),  # with a cache of its own
        "JLORA_REHEARSED": str(folder / "compiled.jsonl"),
    }


if __name__ == "__main__":
    sys.exit(main())
