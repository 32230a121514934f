"""Makes Jittor importable and quiet. The only place that sets environment variables.

    from jlora.system.runtime import jt

imports Jittor at that line (``import jlora.system.runtime`` alone does not), in these steps:

1. The environment is checked, so that a missing compiler is a one-line error and not a traceback
   (`jlora.system.environment`).
2. Jittor's environment variables get working defaults; variables set by the user are not changed.
3. If this machine has not compiled this Jittor yet, a child process does so while this one shows
   the elapsed time (`jlora.system.first_import`).
4. Jittor is imported, and what it changes for the whole process (signal handlers, certificate
   checks, the recursion limit) is restored.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import signal
import ssl
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.system import distributed, machine, operator_compiler
from jlora.system.environment import check_environment, check_no_torch, jittor_variables
from jlora.system.errors import UserError
from jlora.system.first_import import compile_once
from jlora.system.import_errors import DOCTOR, explain, last_line

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
    jittors, numpys = seed, seed  # type: int, int | list[int]
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


# The import ----------------------------------------------------------------------------------


def environment_defaults() -> dict[str, str]:
    """Default values for Jittor's environment variables that the user has not set."""
    return {**jittor_variables(), **({} if _verbose else {"log_silent": "1"})}


def _load() -> Any:
    if "jittor" in sys.modules:  # the user has imported it before
        check_no_torch()
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
            os.environ.update(compile_once(cache, ours, _verbose))
            import jittor

            check_no_torch()  # a script that names the mode turns it on, too
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
