"""The first import of Jittor on a machine, which compiles it.

A child process does it: a failed import of Jittor cannot be repeated in the same process, and
Jittor may end the process if its cache is outdated.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.system import distributed, machine, operator_compiler
from jlora.system.files import make_folder
from jlora.system.import_errors import cause, explain
from jlora.system.lock import one_at_a_time
from jlora.system.status import Status

# Prints a last line, because Jittor may exit early with code 0. Standard input is a pipe that ends
# with the parent, however that dies; the compilers must not go on without it. (It is read by its
# number: forked processes close `sys.stdin`, whose lock a thread that reads from it would hold.)
_FIRST_IMPORT = """
import json, os, signal, socket, sys, threading

def end_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=end_with_parent, daemon=True).start()
sys.path[:] = json.loads(sys.argv[1])
socket.setdefaulttimeout(15)
import jittor_utils
jittor_utils.get_total_mem = lambda: int(sys.argv[2])
from jlora.system.first_import import unpack_onednn
from jlora.system.operator_compiler import compiled_headers
unpack_onednn(jittor_utils)
with compiled_headers(jittor_utils):
    import jittor
print("\\njlora: imported", jittor.__version__)
"""


def compile_once(cache: Path, ours: set[str], verbose: bool) -> dict[str, str]:
    """Import Jittor in a child process, unless this has been done with the same settings.

    If several processes start together, one does it and the others wait.

    Args:
        cache: Jittor's folder for this compiler, Python and processor.
        ours: names of the environment variables whose value is a default of ours.
        verbose: show what the child prints.

    Returns:
        Environment variables that Jittor needs to work here.

    Raises:
        UserError: Jittor cannot be compiled.
    """
    stamp = cache / f"jlora-{_fingerprint()}.json"
    found = _compiled(cache, stamp)
    if found is None:
        with one_at_a_time(cache / "jlora.lock", "compiling Jittor"):
            found = _compiled(cache, stamp)
            if found is None:
                found = _compile(stamp, ours, verbose)
    return found


def _compiled(cache: Path, stamp: Path) -> dict[str, str] | None:
    """The variables that `_compile` found, if Jittor has been compiled with these settings."""
    if any(cache.glob("jittor_core*.so")) or any(cache.glob("cu*/jittor_core*.so")):
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(stamp.read_text()))
    return None


def _compile(stamp: Path, ours: set[str], verbose: bool) -> dict[str, str]:
    overrides: dict[str, str] = {}
    if os.environ.get("nvcc_path"):
        # Of an attempt with CUDA that has failed; Jittor would take it for its build with CUDA.
        for core in stamp.parent.glob("jittor_core*.so"):
            core.unlink(missing_ok=True)
    output = _first_import(overrides, verbose)
    plain = dict(os.environ)
    if output is not None and operator_compiler.remove_header(plain):
        # It may be its sources that do not go with the header.
        overrides.update({name: plain[name] for name in operator_compiler.FLAGS})
        output = _first_import(overrides, verbose)
    if output is not None and os.environ.get("nvcc_path") and "nvcc_path" in ours:
        why = cause(output)
        print(
            f"jlora: warning: Jittor does not work with CUDA here ({why}); using the CPU from now "
            "on (`jlora doctor` says how to try again)",
            file=sys.stderr,
        )
        overrides["nvcc_path"] = ""
        output = _first_import(overrides, verbose)
    if output is not None:
        raise explain(output)
    with contextlib.suppress(OSError):  # a read-only shared cache is fine
        stamp.write_text(json.dumps(overrides))
    return overrides


def unpack_onednn(jittor_utils: Any) -> None:
    """Put jittor-offline's oneDNN where Jittor looks for it, if it is not there.

    Jittor does so too, but then it compiles and runs one of oneDNN's examples, which takes 5 s.
    """
    offline = importlib.util.find_spec("jittor_offline")
    if offline is None or offline.origin is None or os.environ.get("use_mkl", "1") != "1":
        return
    name = "dnnl_lnx_2.2.0_cpu_gomp" + ("_aarch64" if platform.machine() == "aarch64" else "")
    # Whatever fails here, Jittor tries again and says why.
    with contextlib.suppress(Exception):
        folder = Path(jittor_utils.home(), ".cache", "jittor", "mkl")
        if sys.platform == "linux" and not (folder / name).exists():
            make_folder(folder)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                shutil.unpack_archive(Path(offline.origin).with_name(f"{name}.tgz"), temporary)
                os.replace(Path(temporary, name), folder / name)


def _fingerprint() -> str:
    """A hash of the settings, besides the cache folder, for which Jittor compiles itself anew."""
    names = (
        *("cc_path", "cc_flags", "nvcc_path", "nvcc_flags", "kernel_flags", "python_config_path"),
        *("debug", "enable_lto", "use_mkl", "use_cutlass", "use_cutt", "use_data_gz"),
    )
    parts = [importlib.metadata.version("jittor"), sys.version]
    parts += [f"{name}={os.environ.get(name)}" for name in names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _first_import(variables: Mapping[str, str], verbose: bool) -> str | None:
    """Import Jittor in a child process; returns None if it succeeds, else its output."""
    # As one of MPI's ranks the child would wait for the others forever.
    environment = {**distributed.without_mpi(), **variables}
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
                stdin=subprocess.PIPE,
                stdout=None if verbose else output,
                stderr=None if verbose else subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait(child, output)
            finally:
                assert child.stdin is not None
                child.stdin.close()
                child.wait()
            output.seek(0)
            text = output.read().decode("utf-8", errors="replace")
        if "jlora: imported" in text or (verbose and child.returncode == 0):
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
