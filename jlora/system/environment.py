"""What Jittor needs of this machine, and the values that its environment variables get.

Nothing is set here: that is `jlora.system.runtime`'s alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from jlora.system import cuda_toolkit, distributed, machine, operator_compiler
from jlora.system.errors import UserError
from jlora.system.files import make_folder
from jlora.system.import_errors import DOCTOR, install

#: Any of these makes Jittor 2.0 stand in for torch.
TORCH_MODE = ("JITTOR_TORCH_SHIM", "JITTOR_TORCH_PROJECT_ROOT", "JITTOR_TORCH_RUNTIME_ROOT")


def check_environment() -> None:
    """Check what Jittor requires, before it fails with messages of its own.

    Raises:
        UserError: Jittor, a C++ compiler, Python's headers or a writable home are missing.
    """
    check_no_torch()
    if importlib.util.find_spec("jittor") is None:
        raise UserError("Jittor is not installed: run `pip install jittor jittor-offline`")
    home = home_problem()
    if home:
        raise UserError(home)
    compiler = machine.compiler()
    if compiler is None:
        wanted = os.environ.get("cc_path")
        if wanted:
            raise UserError(f"cc_path={wanted}: no such compiler; unset cc_path or correct it")
        raise UserError(f"no C++ compiler found, Jittor needs one: {install('compiler')}")
    problem = machine.compiler_problem(compiler)
    if problem:
        raise UserError(f"the C++ compiler {compiler} does not run: {problem}; {DOCTOR}")
    header = machine.python_header()
    if not header.is_file() and "python_config_path" not in os.environ:
        raise UserError(
            f"Python's headers are missing ({header}), Jittor needs them: {install('headers')}"
        )


def check_no_torch() -> None:
    """Check that Jittor does not stand in for torch here, as its 2.0 can.

    Its operators then follow torch's rules in the whole process, and it moves HOME.

    Raises:
        UserError: it does, or its variables say that it will.
    """
    why = next((f"{name}={os.environ[name]}" for name in TORCH_MODE if _is_set(name)), None)
    torch, jittor = (sys.modules.get(name) for name in ("torch", "jittor"))
    if torch is not None and (torch is jittor or torch.__name__.split(".")[0] == "jittor"):
        why = why or "its module is loaded as torch"
    if why:
        raise UserError(
            f"Jittor stands in for torch in this process ({why}), where its operators follow other "
            "rules; run jlora in a process of its own, without that"
        )


def _is_set(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    return value not in ("", "0", "false", "no", "off")


def home_problem() -> str | None:
    """Why Jittor cannot keep its compiled code under the home folder; None if it can."""
    remedy = "set HOME to a folder that can be written, for example `export HOME=/tmp/home`"
    try:
        cache = Path.home() / ".cache" / "jittor"
    except RuntimeError:
        return f"there is no home folder for Jittor's compiled code; {remedy}"
    try:
        make_folder(cache)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        return f"cannot write {cache} (Jittor's compiled code): {error.strerror}; {remedy}"
    return None


def jittor_variables() -> dict[str, str]:
    """Values for Jittor's environment variables where the user has set none."""
    defaults = {
        # Jittor imports torch at start to work around a clash that jlora does not have.
        "FIX_TORCH_ERROR": "0",
        # Without a name the cache is called after the git branch around the environment: another
        # branch, another two minutes of compiling. It is not "default", because Jittor started
        # without the flags below would compile itself anew there, and jlora after it again. The
        # number goes up when those flags change, for two versions of jlora would do the same.
        "cache_name": "jlora2",
        # Downloaded from Jittor's site whenever CUDA is used, needed by nothing.
        "use_cutlass": "0",
        "OMP_NUM_THREADS": str(distributed.world().threads(machine.processors())),
        # How long a thread waits actively for the others: about ten microseconds. By default it is
        # milliseconds, which on a busy machine takes the processor from the thread it waits for.
        "GOMP_SPINCOUNT": "10000",
    }
    if not distributed.started_by_mpi():
        # Without mpirun, an mpicc on the PATH only costs time or fails; and the processes
        # of a run communicate through mpi4py.
        defaults["use_mpi"] = "0"
    compiler = machine.compiler()
    if compiler is not None and Path(compiler).name not in ("g++", "clang++"):
        defaults["cc_path"] = compiler  # Jittor looks for these two names only
    config = machine.python_config()
    if config is not None:
        # Jittor prefers /usr/bin/python3.x-config, which may belong to another Python.
        defaults["python_config_path"] = str(config)
    toolkit = cuda_toolkit.find() if machine.gpu_problem() is None else None
    if toolkit is not None:
        # Downloads, all of them: faster transpositions, and sums over several cards.
        defaults.update(use_cutt="0", use_nccl="0", conv_opt=str(int(not toolkit.has_cudnn)))
        if "nvcc_path" not in os.environ:  # else the user's, or that of the jlora that started this
            cache = Path.home() / ".cache" / "jittor" / "jlora-cuda"
            defaults["nvcc_path"] = str(cuda_toolkit.set_up(toolkit, cache))
    elif not (Path.home() / ".cache" / "jittor" / "jtcuda").is_dir():
        # An empty path also keeps Jittor from downloading gigabytes of CUDA by itself.
        defaults["nvcc_path"] = ""
    on_cpu = not os.environ.get("nvcc_path", defaults.get("nvcc_path", ""))
    if not on_cpu:
        # Of two builds in one cache Jittor takes the one without CUDA, and then fails: a home
        # folder may be shared by machines without a GPU and machines with one.
        defaults["cache_name"] += "-cuda"
    # Compilers of operators at a time. Jittor's threads for them are known to break a process now
    # and then (KI-COMPILER-001 of its 2.0 branch), and one after another costs some seconds, once:
    # 25 s instead of 15 for a first training step on two cores. By nvcc it would be minutes.
    compilers = 1 if on_cpu else max(1, min(16, machine.processors()))
    defaults["use_parallel_op_compiler"] = str(compilers)
    if on_cpu and not any(name in os.environ for name in operator_compiler.FLAGS):
        defaults.update(operator_compiler.FLAGS)
    return defaults
