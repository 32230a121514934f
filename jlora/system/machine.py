"""What this machine has: compiler, Python headers, processor, memory, GPU. Changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from jlora.system import cgroup, cuda_toolkit

# Each package manager's names of the packages that Jittor needs.
PACKAGES = {
    "compiler": {"apt-get": "g++", "dnf": "gcc-c++", "apk": "g++", "pacman": "gcc"},
    "headers": {"apt-get": "python3-dev", "dnf": "python3-devel", "apk": "python3-dev"},
    "openmp": {"apt-get": "libgomp1", "dnf": "libgomp", "apk": "libgomp", "pacman": "gcc-libs"},
    "java": {"apt-get": "default-jre-headless", "dnf": "java-latest-openjdk-headless"},
}
INSTALL = {"apt-get": "install -y", "dnf": "install -y", "apk": "add", "pacman": "-S --noconfirm"}

# Jittor knows its compiler's kind by these words in its name.
COMPILER = re.compile(r"((\w+)-(conda-)?linux-gnu-)?(g\+\+|clang\+\+)(-\d+)?")
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"


def install_command(thing: str) -> str | None:
    """The command that installs ``thing`` (a key of PACKAGES) here, or None if unknown."""
    if platform.system() == "Darwin":
        return "xcode-select --install" if thing in ("compiler", "headers", "openmp") else None
    for manager, verb in INSTALL.items():
        package = PACKAGES[thing].get(manager)
        # Also in the system's folders: a PATH without g++ may lack the package manager, too.
        if package and (shutil.which(manager) or shutil.which(manager, path=SYSTEM_PATH)):
            sudo = "" if os.geteuid() == 0 else "sudo "
            update = f"{sudo}apt-get update && " if manager == "apt-get" else ""
            return f"{update}{sudo}{manager} {verb} {package}"
    return None


def compiler() -> str | None:
    """The C++ compiler that Jittor will use.

    ``cc_path`` if set, else g++ (clang++ on macOS), else what ``CXX`` names or a compiler of
    another name, such as g++-10 or conda's, the newest first.
    """
    if os.environ.get("cc_path"):
        return shutil.which(os.environ["cc_path"])
    found = shutil.which("clang++" if platform.system() == "Darwin" else "g++")
    if found is None:
        named = shutil.which(os.environ.get("CXX", ""))
        others = sorted(compilers_on_path(), key=_newest_first)
        found = named if named and _compiles_for_here(named) else next(iter(others), None)
    return found


def _compiles_for_here(path: str) -> bool:
    """Whether a program is a compiler by its name, and not one for another processor."""
    found = COMPILER.fullmatch(os.path.basename(path))
    return found is not None and found[2] in (None, platform.machine())


def _newest_first(path: str) -> tuple[bool, int]:
    number = re.search(r"-(\d+)$", path)
    return "clang" in path, -int(number[1]) if number else 0


def compilers_on_path() -> list[str]:
    """Every g++ and clang++ on the PATH: with a version in its name, conda's own names."""
    found = []
    for folder in os.get_exec_path():
        with contextlib.suppress(OSError):
            names = sorted(filter(_compiles_for_here, os.listdir(folder)))
            found += [os.path.join(folder, name) for name in names]
    return [path for path in found if os.access(path, os.X_OK)]


def compiler_problem(path: str) -> str | None:
    """Why a compiler does not run (asked for its version), or None."""
    try:
        result = subprocess.run(
            [path, "--version"], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        return lines[-1] if lines else f"exit code {result.returncode}"
    return None


def python_header() -> Path:
    """The path of the running interpreter's Python.h, whether or not it exists."""
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def python_config() -> Path | None:
    """The running interpreter's own python3.x-config, which Jittor asks for compiler flags."""
    name = f"python3.{sys.version_info.minor}-config"
    path = Path(sys.base_prefix) / "bin" / name
    return path if path.is_file() else None


def gpu_problem() -> str | None:
    """Why Jittor cannot use an NVIDIA GPU here; None if nothing seems to be missing."""
    if not glob.glob("/dev/nvidia[0-9]*") and not Path("/dev/dxg").exists():
        return "no NVIDIA GPU"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is an NVIDIA GPU but no driver library (libcuda.so.1)"
    toolkit = cuda_toolkit.find()
    if toolkit is None:
        return "there is an NVIDIA GPU but no CUDA compiler (nvcc)"
    if toolkit.missing:
        return f"there is an NVIDIA GPU but the CUDA toolkit lacks {', '.join(toolkit.missing)}"
    return None


def free_gpu_memory() -> int | None:
    """Bytes of the first GPU's memory that are free; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return int(found.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def processors() -> int:
    """The number of processor cores for this process: affinity, quota, no hyper-threads."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        available = os.cpu_count() or 1
    total = os.cpu_count() or 1
    physical = _physical_cores() or total
    # Matrix products gain nothing from a second thread on a core: count cores, not threads.
    cores = max(1, round(available * min(1.0, physical / total)))
    quota = cgroup.processor_quota()
    return max(1, min(cores, quota)) if quota else cores


def _physical_cores() -> int | None:
    import psutil

    return psutil.cpu_count(logical=False)


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit.

    Args:
        root: the folder with /proc and /sys; tests use another one.
    """
    total = _memory(root, "MemTotal", "total")
    return min(total, cgroup.memory_limit(root) or total)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate before the system or its control group runs out.

    Memory of file caches counts as available.
    """
    available = _memory(root, "MemAvailable", "available")
    left = cgroup.memory_left(root)
    return available if left is None else min(available, left)


def peak_memory(root: Path = Path("/")) -> int | None:
    """The largest resident memory of this process in bytes; None: the system does not report it."""
    # Linux's ru_maxrss is at least that of the program which started this one.
    peak = _kilobytes(root / "proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _memory(root: Path, key: str, otherwise: str) -> int:
    """A value of /proc/meminfo in bytes; without that file, psutil's value ``otherwise``."""
    found = _kilobytes(root / "proc/meminfo", key)
    if found is not None:
        return found
    import psutil

    return getattr(psutil.virtual_memory(), otherwise)


def _kilobytes(path: Path, key: str) -> int | None:
    """The bytes in a line such as ``MemTotal: 16384256 kB``."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return None


def usable_memory(processes: int = 1) -> int:
    """Bytes that this process can use in total: its own, and its share of what is available.

    Args:
        processes: the number of processes that share this machine's memory.
    """
    import psutil

    own = psutil.Process().memory_info().rss
    return min(memory_limit() // processes, own + available_memory() // processes)


def cpu_model() -> str:
    """The processor's name, from the system."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The CPU's vector and matrix extensions that matter for training."""
    names = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_vnni": "VNNI",
        "avx512_bf16": "AVX512_BF16",
        "amx_tile": "AMX",
        "amx_bf16": "AMX_BF16",
        "asimd": "NEON",
        "asimdhp": "FP16",
        "asimddp": "DOTPROD",
        "sve": "SVE",
        "bf16": "BF16",
        "i8mm": "I8MM",
    }
    flags = cpu_flags()
    return [shown for flag, shown in names.items() if flag in flags]


def cpu_flags() -> set[str]:
    """All extensions of the processor, by the kernel's names; empty if unknown."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return []
