"""The kernels' own check (tile_check.cc) on processors that this one runs or emulates."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from jlora.kernels.native import FLAGS
from jlora.system import machine

FOLDER = Path(__file__).parent
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def check(tmp_path, compiler, arch, *emulator):
    """Compile the check for a processor, run it, and return how many comparisons were right."""
    program = tmp_path / "tile_check"
    # What the library's compiler may do with numbers, this one may.
    numbers = [flag for flag in FLAGS if flag.startswith("-f") and flag != "-fPIC"]
    options = ["-std=c++17", "-O1", *numbers, "-Wno-psabi", "-static"]
    if not emulator:
        options.remove("-static")
    subprocess.run(
        [compiler, *options, f"-march={arch}", FOLDER / "tile_check.cc", "-o", program], check=True
    )
    run = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout.count("right  ")


@pytest.mark.parametrize(
    ("arch", "needed"),
    [
        ("x86-64-v3", {"AVX2"}),
        # Its AVX2 code has VNNI's dot products, as processors with AVX-VNNI.
        pytest.param("icelake-server", {"AVX-512", "VNNI"}, marks=pytest.mark.slow),
    ],
)
def test_tiles_of_other_processors(tmp_path, arch, needed):
    if platform.machine() != "x86_64" or needed - set(machine.cpu_features()):
        pytest.skip(f"this processor does not run {arch}")
    assert check(tmp_path, machine.compiler(), arch) > 50


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["armv8-a", "armv8.2-a+dotprod", "armv8.6-a"])
def test_tiles_on_an_emulated_arm(tmp_path, arch):
    """NEON alone, with dot products of bytes, and with those of bf16."""
    if not shutil.which(CROSS) or not shutil.which(EMULATOR):
        pytest.skip(f"{CROSS} or {EMULATOR} is not installed")
    assert check(tmp_path, CROSS, arch, EMULATOR, "-cpu", "max") > 50
