"""Makes Jittor compile itself and its operators in half the time, and say less about it.

More than half of what g++ does for one of Jittor's sources is to read headers that are the same for
all of them: 0.4 of 0.7 s for one of its own, 0.6 of 0.8 s for an operator (Zen 4, g++ 12).
Therefore they are precompiled. Before each operator Jittor starts a Python process as well, which
`compile_operator.sh` spares. The resulting code is the same. Several processes compile at the same
time (`operator_lock.cc`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError
from jlora.system.files import atomic_path, make_folder, remove, temporary_name, write_text
from jlora.system.lock import one_at_a_time

SCRIPT = Path(__file__).with_name("compile_operator.sh")
FILTER = Path(__file__).with_name("quiet_operators.cc")
LOCK = Path(__file__).with_name("operator_lock.cc")
#: In the cache folder; the compiled headers are in a folder of this name with ".gch" after it, of
#: which g++ takes the one that was made with its options.
HEADER = "jlora-jittor.h"
# Jittor's headers declare other things to its operators, whose sources define JIT. Angle brackets:
# before it loads an operator Jittor reads all files that are included in quotes, anew each time.
_HEADER = """#include <assert.h>
#include <algorithm>
#include <cmath>
#include <limits>
#include <var.h>
#include <executor.h>
#include <fused_op.h>
#include <ops/op_register.h>
#ifdef JIT
#include <misc/cpu_math.h>
#else
#include <pyjt/py_converter.h>
#endif
"""
#: Defaults of Jittor's environment variables: its own code compiles a quarter faster with -O1 than
#: with its -O2 and runs as fast.
FLAGS = {"cc_flags": " -O1 ", "kernel_flags": " -Ofast "}
_OPERATORS = " -DJIT=1 -DJIT_cpu=1 "
_SOURCE = re.compile(r"\.(?:cc|cpp)$")
# Flags of the linker, which do not apply to a header.
_LINKER = re.compile(r"-(?:l|L|Wl,|shared$)")


def add_header(environment: MutableMapping[str, str], cache: Path, gcc: bool) -> None:
    """Let Jittor's flags in the environment include the header, if they are `FLAGS`.

    Args:
        environment: changed. A process that started this one may have added its own header there.
        cache: Jittor's folder for this compiler, Python and processor.
        gcc: whether the compiler is g++; only there anything is added.
    """
    remove_header(environment)
    include = _include(cache) if gcc else ""
    if include and all(environment.get(name) == flags for name, flags in FLAGS.items()):
        environment["cc_flags"] += include
        environment["kernel_flags"] += _OPERATORS


def remove_header(environment: MutableMapping[str, str]) -> bool:
    """Undo `add_header`; returns whether there was anything to undo."""
    own = re.compile(rf' -include "[^"]*/{re.escape(HEADER)}" |{re.escape(_OPERATORS)}')
    found = {name: environment[name] for name in FLAGS if name in environment}
    environment.update({name: own.sub("", flags) for name, flags in found.items()})
    return any(environment[name] != flags for name, flags in found.items())


def _header_text() -> str:
    """What the header includes for the Jittor that is installed.

    One of Jittor 2.0's own headers declares more where Python's came before. (Another text for all
    would have every older Jittor compile itself anew.)
    """
    found = importlib.util.find_spec("jittor")
    for folder in (found and found.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            if b"Py_PYTHON_H" in Path(folder, "src", "misc", "nano_vector.h").read_bytes():
                return f"#ifndef JIT\n#include <Python.h>\n#endif\n{_HEADER}"
    return _HEADER


def _include(cache: Path) -> str:
    """The option that includes the header of a cache folder; empty if that is impossible."""
    header = cache / HEADER
    # Jittor pastes the path into a command line as it is.
    if sys.platform == "linux" and shlex.quote(str(header)) == str(header):
        # OSError, UserError: the cache is shared and read-only.
        with contextlib.suppress(OSError, UserError):
            text = _header_text()
            if not header.exists() or header.read_text() != text:
                write_text(header, text)
            return f' -include "{header}" '
    return ""


@contextlib.contextmanager
def compiled_headers(jittor_utils: Any) -> Iterator[None]:
    """A context in which Jittor, imported for the first time, compiles itself faster."""
    made: set[Path] = set()

    def wrap(function: Callable) -> Callable:
        def run(commands, *args, **options):
            first = commands if isinstance(commands, str) else "".join(commands[:1])
            with contextlib.suppress(OSError, UserError, subprocess.SubprocessError, ValueError):
                words = shlex.split(first)
                header = next((Path(w) for w in words if w.endswith(f"/{HEADER}")), None)
                # One source has a second header, and other options that one is not worth.
                if header and words.count("-include") == 1 and any(map(_SOURCE.search, words)):
                    sources = Path(jittor_utils.__file__).parents[1] / "jittor" / "src"
                    made.add(_precompile(header, words[0], words[1:], sources))
            return function(commands, *args, **options)

        return run

    for name in ("run_cmd", "run_cmds"):
        if hasattr(jittor_utils, name):
            setattr(jittor_utils, name, wrap(getattr(jittor_utils, name)))
    try:
        yield
    finally:
        for compiled in made:  # 80 MB that are not needed again
            remove(compiled)


def set_up(jt: Any, cache: Path) -> None:
    """Change Jittor's flags so that operators compile faster, if that is possible here.

    Args:
        jt: Jittor, imported.
        cache: its folder for this compiler, Python and processor.
    """
    flags = jt.flags
    _quiet(flags, cache)
    # Jittor pastes these into a command line as they are; and nvcc has its own ways.
    paths = (flags.jittor_path, str(cache))
    if sys.platform != "linux" or flags.nvcc_path or any(shlex.quote(p) != p for p in paths):
        return
    # OSError, UserError: the cache is shared and read-only.
    with contextlib.suppress(OSError, UserError, subprocess.SubprocessError, ValueError):
        # In the cache folder: Jittor recompiles an operator if any path in its command changes.
        script = _kept(cache, "compile-operator.sh", SCRIPT.read_bytes())
        # Without Python's path: before Jittor loads an operator it reads and hashes every file that
        # the command names, Python's 7 MB included, which takes 30 ms.
        flags.python_path = f"/bin/sh {script}"
        include = _include(cache) if flags.cc_type == "g++" else ""
        if include:
            # OSError: also of symbols that this Jittor does not have.
            with contextlib.suppress(OSError, UserError, subprocess.SubprocessError):
                lock = os.fsencode(cache.with_name("jittor.lock"))
                _library(flags, cache, LOCK).jlora_lock_operators(lock)
            own = "" if include in flags.cc_flags else include + _OPERATORS
            options = shlex.split(flags.cc_flags + own)
            _precompile(cache / HEADER, flags.cc_path, options, Path(flags.jittor_path) / "src")
            flags.cc_flags += own


def _quiet(flags: Any, cache: Path) -> None:
    """Show Jittor's progress with operators on one line, where g++ and Linux are."""
    if sys.platform == "linux" and flags.cc_type == "g++" and flags.log_silent:
        with contextlib.suppress(OSError, UserError, subprocess.SubprocessError):
            _library(flags, cache, FILTER).jlora_quiet_operators()


def _library(flags: Any, cache: Path, source: Path) -> ctypes.CDLL:
    """A C++ source of this folder, compiled and loaded."""
    key = _digest(source.read_bytes() + flags.cc_path.encode())
    path = cache / f"jlora-{source.stem}-{key}.so"
    if not path.exists():
        with atomic_path(path) as temporary:
            options = ["-std=c++14", "-O1", "-shared", "-fPIC", "-o", str(temporary)]
            command = [flags.cc_path, str(source), *options]
            subprocess.run(command, capture_output=True, check=True)
    return ctypes.CDLL(str(path))


def header_options(words: Sequence[str]) -> list[str]:
    """Those of a compiler's options that apply to a header."""
    options, rest = [], iter(words)
    for word in rest:
        if word in ("-o", "-include"):
            next(rest, None)
        elif word != "-c" and word[:1] == "-" and not _LINKER.match(word):
            options.append(word)
    return options


def _precompile(header: Path, compiler: str, words: Sequence[str], sources: Path) -> Path:
    """Compile the header with the options of a command, unless that has been done.

    Args:
        words: the command without the compiler.
        sources: Jittor's folder ``src``.

    Returns:
        The compiled header.
    """
    options = header_options(words)
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    of_headers = hashlib.sha256(header.read_bytes() + version)
    # g++ takes a compiled header without a look at its sources, which an update replaces.
    for name in ("", "mem", "misc", "ops", "opt", "pybind", "pyjt", "utils"):
        with os.scandir(sources / name) as found:
            headers = sorted((e.name, e.stat().st_mtime_ns) for e in found if e.name[-2:] == ".h")
        of_headers.update(repr(headers).encode())
    current = of_headers.hexdigest()[:12]
    # Where headers are found is nothing to the compiled one.
    apply = [option for option in options if option[:2] != "-I"]
    compiled = Path(f"{header}.gch", f"{current}-{_digest(' '.join(apply).encode())}")
    if compiled.exists():
        return compiled
    with one_at_a_time(header.with_name("jlora-header.lock"), "compiling headers"):
        if compiled.exists():
            return compiled
        temporary = temporary_name(header)  # g++ would read what is half written in its folder
        try:
            command = [compiler, "-x", "c++-header", str(header), *options, "-o", str(temporary)]
            subprocess.run(command, capture_output=True, check=True)
            make_folder(compiled.parent)
            os.replace(temporary, compiled)
        finally:
            remove(temporary)
        for old in compiled.parent.iterdir():
            if not old.name.startswith(current):
                remove(old)
    return compiled


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _kept(cache: Path, name: str, content: bytes) -> Path:
    """A file in the cache with this content; its name depends on the content."""
    path = cache / f"jlora-{_digest(content)}-{name}"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return path
