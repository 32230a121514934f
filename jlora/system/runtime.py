"""Makes Jittor importable and quiet. The only place that sets environment variables.

    from jlora.system.runtime import jt

imports Jittor at that line (``import jlora.system.runtime`` alone does not), in these steps:

1. The environment is checked, so that a missing compiler is a one-line error and not a traceback.
2. Jittor's environment variables get working defaults; variables set by the user are not changed.
3. If this machine has not compiled this Jittor yet, a child process does so while this one shows
   the elapsed time. A child process, because a failed import of Jittor cannot be repeated in the
   same process, and because Jittor may end the process if its cache is outdated.
4. Jittor is imported, and what it changes for the whole process (signal handlers, certificate
   checks, the recursion limit) is restored.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.system import cuda_toolkit, distributed, machine, operator_compiler
from jlora.system.errors import UserError
from jlora.system.files import make_folder
from jlora.system.import_errors import DOCTOR, cause, explain, install, last_line
from jlora.system.lock import one_at_a_time
from jlora.system.status import Status

#: Values of JLORA_DEVICE, as `use_gpu` takes them.
DEVICES = {"auto": None, "cpu": False, "gpu": True}
_lock = threading.RLock()
_verbose = os.environ.get("JLORA_VERBOSE", "0") not in ("", "0")


def __getattr__(name: str) -> Any:
    if name in ("jt", "nn"):
        with _lock:
            if "jt" not in globals():
                globals()["jt"] = _load()
                choose_device()
            return globals()["jt"] if name == "jt" else importlib.import_module("jittor.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def set_verbose(verbose: bool = True) -> None:
    """Show Jittor's own log lines (``-v``), or hide them again."""
    global _verbose
    _verbose = verbose
    if "jt" in globals():
        globals()["jt"].flags.log_silent = int(not verbose)


def set_seed(seed: int) -> None:
    """Seed Jittor, NumPy and Python's own random numbers.

    In a run with several processes each gets different numbers from Jittor, or dropout would drop
    the same positions in every share of a batch; NumPy's and Python's are the same in all.

    Args:
        seed: not negative, of any size. Jittor's seed has 32 bits; a larger one is hashed.
    """
    import random

    import numpy as np

    rank = distributed.world().rank
    jittors, numpys = seed, seed
    if seed >= 2**32:
        words = [seed >> shift & 0xFFFFFFFF for shift in range(0, seed.bit_length(), 32)]
        jittors, numpys = int(np.random.SeedSequence(seed).generate_state(1)[0]), words
    # First, because it also seeds the other two.
    __getattr__("jt").set_global_seed((jittors + 1_000_003_001 * rank) % 2**31 if rank else jittors)
    random.seed(seed)
    np.random.seed(numpys)


def release_memory() -> None:
    """Return memory that this process has freed to the system.

    Jittor keeps freed memory by size, and glibc keeps free memory between blocks that are in use:
    after packing a model's weights this is as much as the weights. Between two stages of a run it
    is not needed again; within a stage, getting it from the system again costs time.
    """
    __getattr__("jt").gc()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


def choose_device() -> None:
    """Compute where ``JLORA_DEVICE`` says: "cpu", "gpu", or "auto", the default: a GPU that works.

    Raises:
        UserError: another value, no GPU where one is asked for, or several processes on a GPU.
    """
    device = os.environ.get("JLORA_DEVICE", "auto")
    if device not in DEVICES:
        raise UserError(f"JLORA_DEVICE={device}: it is one of {', '.join(DEVICES)}")
    if use_gpu(DEVICES[device]) and distributed.world().size > 1:
        raise UserError(
            "several processes share out processors, and this run is on a GPU, which one process "
            "fills; start it without --nproc and mpirun, or with JLORA_DEVICE=cpu"
        )


def use_gpu(wanted: bool | None = None) -> bool:
    """Compute on the GPU (True), on the CPU (False), or on the GPU if one works (None).

    Returns:
        Whether the GPU is used from now on.

    Raises:
        UserError: ``wanted`` is True and no GPU works.
    """
    jt = __getattr__("jt")
    if wanted is False or not jt.has_cuda:
        jt.flags.use_cuda = 0
        if wanted:
            reason = machine.gpu_problem() or "Jittor was compiled without CUDA"
            raise UserError(f"no GPU to use: {reason}; {DOCTOR}")
        return False
    try:
        jt.flags.use_cuda = 1
        (jt.ones((2, 2)) + 1).numpy()
    except RuntimeError as error:
        jt.flags.use_cuda = 0
        if wanted:
            raise UserError(f"the GPU does not work: {last_line(str(error))}; {DOCTOR}") from error
        return False
    return True


@dataclass(frozen=True)
class OneDNN:
    """An installed oneDNN: its include folder and its library."""

    include: Path
    library: Path

    def __str__(self) -> str:
        return str(self.library)


def find_onednn() -> OneDNN | None:
    """Jittor's oneDNN, for jlora's own operators where there is no AMX, or None.

    Imports Jittor, because the import is what installs it.
    """
    __getattr__("jt")
    for home in installed_onednn():
        return OneDNN(home / "include", next(iter(sorted((home / "lib").glob("libdnnl.*")))))
    return None


def installed_onednn() -> list[Path]:
    """The folders of the oneDNN that Jittor has installed so far, without importing Jittor."""
    try:
        home = Path(os.environ.get("JITTOR_HOME") or Path.home())
    except RuntimeError:
        return []
    if "jittor_utils" in sys.modules:  # it may have stored an earlier JITTOR_HOME
        home = Path(sys.modules["jittor_utils"].home())
    headers = sorted((home / ".cache" / "jittor" / "mkl").glob("dnnl*/include/dnnl.hpp"))
    homes = [header.parent.parent for header in headers]
    return [home for home in homes if any((home / "lib").glob("libdnnl.*"))]


# --- 1. the environment ---------------------------------------------------------------------


def check_environment() -> None:
    """Check what Jittor requires, before it fails with messages of its own.

    Raises:
        UserError: Jittor, a C++ compiler, Python's headers or a writable home are missing.
    """
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


# --- 2. the variables -----------------------------------------------------------------------


def environment_defaults() -> dict[str, str]:
    """Default values for Jittor's environment variables that the user has not set."""
    defaults = {
        # Jittor imports torch at start to work around a clash that jlora does not have.
        "FIX_TORCH_ERROR": "0",
        # Without a name the cache is called after the git branch around the environment: another
        # branch, another two minutes of compiling. It is not "default", because Jittor started
        # without the flags below would compile itself anew there, and jlora after it again.
        "cache_name": "jlora",
        # Downloaded from Jittor's site whenever CUDA is used, needed by nothing.
        "use_cutlass": "0",
        "OMP_NUM_THREADS": str(distributed.world().threads(machine.processors())),
        # How long a thread waits actively for the others: about ten microseconds. By default it is
        # milliseconds, which on a busy machine takes the processor from the thread it waits for.
        "GOMP_SPINCOUNT": "10000",
    }
    if not _verbose:
        defaults["log_silent"] = "1"
    if not distributed.started_by_mpi():
        # Without mpirun, an mpicc on the PATH only costs time or fails; and the processes
        # of a run communicate through mpi4py.
        defaults["use_mpi"] = "0"
    config = machine.python_config()
    if config is not None:
        # Jittor prefers /usr/bin/python3.x-config, which may belong to another Python.
        defaults["python_config_path"] = str(config)
    toolkit = cuda_toolkit.find() if machine.gpu_problem() is None else None
    if toolkit is not None:
        # Downloads, all of them: faster transpositions, and sums over several cards.
        defaults.update(use_cutt="0", use_nccl="0", conv_opt=str(int(not toolkit.has_cudnn)))
        cache = Path.home() / ".cache" / "jittor" / "jlora-cuda"
        defaults["nvcc_path"] = str(cuda_toolkit.set_up(toolkit, cache))
    elif not (Path.home() / ".cache" / "jittor" / "jtcuda").is_dir():
        # An empty path also keeps Jittor from downloading gigabytes of CUDA by itself.
        defaults["nvcc_path"] = ""
    on_cpu = not os.environ.get("nvcc_path", defaults.get("nvcc_path", ""))
    # Compilers of operators at a time. Jittor's threads for them are known to break a process now
    # and then (KI-COMPILER-001 of its 2.0 branch), and one after another costs some seconds, once:
    # 25 s instead of 15 for a first training step on two cores. By nvcc it would be minutes.
    compilers = 1 if on_cpu else max(1, min(16, machine.processors()))
    defaults["use_parallel_op_compiler"] = str(compilers)
    if on_cpu and not any(name in os.environ for name in operator_compiler.FLAGS):
        defaults.update(operator_compiler.FLAGS)
    return defaults


# --- 3. the first compilation ---------------------------------------------------------------

# Prints a last line, because Jittor may exit early with code 0.
_FIRST_IMPORT = """
import json, socket, sys
sys.path[:] = json.loads(sys.argv[1])
socket.setdefaulttimeout(15)
import jittor_utils
jittor_utils.get_total_mem = lambda: int(sys.argv[2])
from jlora.system.operator_compiler import compiled_headers
with compiled_headers(jittor_utils):
    import jittor
print("\\njlora: imported", jittor.__version__)
"""


def _compile_once(cache: Path, ours: set[str]) -> None:
    """Import Jittor in a child process, unless this has been done with the same settings.

    If several processes start together, one does it and the others wait.

    Args:
        cache: Jittor's folder for this compiler, Python and processor.
        ours: names of the environment variables whose value is a default of ours.
    """
    stamp = cache / f"jlora-{_fingerprint()}.json"
    if _is_compiled(cache, stamp):
        return
    with one_at_a_time(cache / "jlora.lock", "compiling Jittor"):
        if not _is_compiled(cache, stamp):
            _compile(stamp, ours)


def _is_compiled(cache: Path, stamp: Path) -> bool:
    """Whether Jittor has been compiled with these settings; updates the environment from that."""
    if any(cache.glob("jittor_core*.so")) or any(cache.glob("cu*/jittor_core*.so")):
        with contextlib.suppress(OSError, ValueError):
            os.environ.update(json.loads(stamp.read_text()))
            return True
    return False


def _compile(stamp: Path, ours: set[str]) -> None:
    overrides: dict[str, str] = {}
    output = _first_import()
    if output is not None and operator_compiler.remove_header(os.environ):
        # It may be its sources that do not go with the header.
        overrides.update({name: os.environ[name] for name in operator_compiler.FLAGS})
        output = _first_import()
    if output is not None and os.environ.get("nvcc_path") and "nvcc_path" in ours:
        why = cause(output)
        print(
            f"jlora: warning: Jittor does not work with CUDA here ({why}); using the CPU",
            file=sys.stderr,
        )
        overrides["nvcc_path"] = ""
        os.environ.update(overrides)
        output = _first_import()
    if output is not None:
        raise explain(output)
    with contextlib.suppress(OSError):  # a read-only shared cache is fine
        stamp.write_text(json.dumps(overrides))


def _fingerprint() -> str:
    """A hash of the settings, besides the cache folder, for which Jittor compiles itself anew."""
    names = (
        *("cc_path", "cc_flags", "nvcc_path", "nvcc_flags", "kernel_flags", "python_config_path"),
        *("debug", "enable_lto", "use_mkl", "use_cutlass", "use_cutt", "use_data_gz"),
    )
    parts = [importlib.metadata.version("jittor"), sys.version]
    parts += [f"{name}={os.environ.get(name)}" for name in names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _first_import() -> str | None:
    """Import Jittor in a child process; returns None if it succeeds, else its output."""
    # As one of MPI's ranks the child would wait for the others forever.
    environment = distributed.without_mpi()
    # With log_v 1 Jittor prints why its library cannot be loaded (conda's libstdc++).
    environment.update(use_mpi="0", log_silent="0", log_v="1", PYTHONUNBUFFERED="1")
    # Jittor starts a g++ for every 3 GiB of memory; this makes it one for each core, and no more
    # than the container's memory allows.
    workers = max(1, min(machine.processors(), machine.memory_limit() // 2**30))
    arguments = [json.dumps(sys.path), str(workers * 3 * 2**30)]
    for _ in range(3):
        with tempfile.TemporaryFile() as output:
            child = subprocess.Popen(
                [sys.executable, "-c", _FIRST_IMPORT, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if _verbose else output,
                stderr=None if _verbose else subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait(child, output)
            except BaseException:  # Ctrl-C: the compilers must not continue in the background
                with contextlib.suppress(OSError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise
            output.seek(0)
            text = output.read().decode("utf-8", errors="replace")
        if "jlora: imported" in text or (_verbose and child.returncode == 0):
            return None
        if child.returncode != 0:
            return text or f"the first import of Jittor ended with exit code {child.returncode}"
        # Exit code 0 without the last line: Jittor has updated its helper and must be run again.
    return text


def _wait(child: subprocess.Popen, output: Any) -> None:
    """Wait for the child; once it compiles, show on stderr how long it has been at it."""
    status = Status("compiling Jittor for this machine (once, about 2 minutes)")
    while True:
        try:
            child.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if status.seconds > 10 or _compiles(output):
                status.show()
    status.end("failed" if child.returncode else "done")


def _compiles(output: Any) -> bool:
    """Whether the child's output so far has Jittor's progress line."""
    return b"Compiling " in os.pread(output.fileno(), 1 << 20, 0)


# --- 4. the import --------------------------------------------------------------------------


def _load() -> Any:
    if "jittor" in sys.modules:  # the user has imported it before
        return sys.modules["jittor"]
    check_environment()
    if distributed.world().size > 1:
        for mark in distributed.MARKS:  # else Jittor and child programs would use MPI
            os.environ.pop(mark, None)
    ours = set()
    for name, value in environment_defaults().items():
        if name not in os.environ:
            os.environ[name] = value
            ours.add(name)
    try:
        with _process_settings_kept():
            import jittor_utils  # names the cache folder, compiles nothing

            cache = Path(jittor_utils.cache_path)
            if not os.environ.get("nvcc_path"):
                gcc = getattr(jittor_utils, "cc_type", "") == "g++"
                operator_compiler.add_header(os.environ, cache, gcc)
            _compile_once(cache, ours)
            import jittor

            operator_compiler.set_up(jittor, cache)
            _end_pool(jittor_utils)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise explain(f"{type(error).__name__}: {error}") from error
    # Jittor links its operators with -Ofast, which makes the processor flush denormal numbers to
    # zero; NumPy notices and warns. Nothing here depends on numbers that small.
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
    return jittor


def _end_pool(jittor_utils: Any) -> None:
    """End the processes that Jittor has forked to compile itself, even if nothing was to compile.

    They would live as long as this one, and its end would wait forever if one of them had died.
    Jittor makes new ones when it needs them.
    """
    if getattr(jittor_utils, "pool_size", 0):
        jittor_utils.pool_cleanup()
        atexit.unregister(jittor_utils.pool_cleanup)
        jittor_utils.pool_size = 0


@contextlib.contextmanager
def _process_settings_kept() -> Iterator[None]:
    """Undo what importing Jittor does to the whole process.

    Its SIGINT handler ends the process at once, so that nothing could be saved on Ctrl-C; its
    SIGCHLD handler does the same if any child is killed (such as a Java that hangs). It also turns
    off the certificate checks of urllib, and raises the recursion limit so much that infinite
    recursion crashes the process.
    """
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGQUIT)
    }
    https_context = ssl._create_default_https_context
    recursion = sys.getrecursionlimit()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            # ValueError: not the main thread, where handlers cannot be set.
            with contextlib.suppress(ValueError):
                if handler is not None:
                    signal.signal(number, handler)
        ssl._create_default_https_context = https_context
        sys.setrecursionlimit(recursion)
