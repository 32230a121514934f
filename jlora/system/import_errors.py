"""Turns the output of a failed import of Jittor into one line with the cause and the remedy."""

from __future__ import annotations

import platform
import re

from jlora.system import machine
from jlora.system.errors import UserError

DOCTOR = "`jlora doctor` shows what this machine lacks"


def install(thing: str) -> str:
    """Advice for installing a key of `machine.PACKAGES`."""
    command = machine.install_command(thing)
    return f"run `{command}`" if command else f"install it; {DOCTOR}"


def explain(output: str) -> UserError:
    """The error for what Jittor printed or raised: one line with the cause and the remedy."""
    remedies = [
        (r"(GLIBCXX|CXXABI)_[\d.]+\S? not found", _conda_remedy),
        (r"Python\.h: No such file|python3[.\d]*-config\b.*not found", lambda: install("headers")),
        (r"openmp library not found|omp\.h: No such file", lambda: install("openmp")),
        (
            r"Download File failed|MD5 mismatch|URLError|urlopen error",
            lambda: "run `pip install jittor-offline`, which brings oneDNN along",
        ),
        (
            r"No space left on device|Disk quota exceeded",
            lambda: "free some space (Jittor's cache needs about 500 MB)",
        ),
        (
            r"Killed signal|Cannot allocate memory|out of memory allocating",
            lambda: "the compiler ran out of memory; close other programs or give it 2 GB",
        ),
        (
            r"libcu\w+\.so\S*( not found|: cannot open)",
            lambda: "set nvcc_path= (empty) to use the CPU",
        ),
        (
            # Of a semaphore: an error of a file would name it.
            r"(?m)(Permission|FileNotFound|OS)Error: \[Errno \d+\] [\w ]+$",
            lambda: (
                "its compilers share semaphores, so /dev/shm must be there and writable: run "
                "`sudo chmod 1777 /dev/shm`"
            ),
        ),
        (r"numpy.*(_ARRAY_API|1\.x|compiled using)", lambda: "run `pip install 'numpy<2'`"),
    ]
    for pattern, remedy in remedies:
        match = re.search(pattern, output)
        if match:
            line = next(part for part in output.splitlines() if match.group(0)[:20] in part)
            return UserError(f"Jittor cannot be imported: {_short(line)}; {remedy()}")
    return UserError(f"Jittor cannot be imported: {cause(output)}; {DOCTOR}, -v the whole output")


def _conda_remedy() -> str:
    library = f"/usr/lib/{platform.machine()}-linux-gnu/libstdc++.so.6"
    return (
        "this Python brings a libstdc++ older than the compiler's: run "
        f"`conda install -c conda-forge libstdcxx-ng`, or `export LD_PRELOAD={library}`"
    )


def cause(output: str) -> str:
    """The most informative line of an output: the first error, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror:|^\w*(Error|Exception)\b", line)]
    return _short((errors or lines or ["it said nothing"])[0 if errors else -1])


def last_line(text: str) -> str:
    """The last line of an output, shortened."""
    return _short((text.strip().splitlines() or [""])[-1])


def _short(line: str, width: int = 200) -> str:
    # Colours, and the progress bar of a download that failed.
    line = re.sub(r"\x1b\[[\d;]*[mK]|\S+B \[[^]]*B/s\]", "", line).strip()
    return line if len(line) <= width else line[: width - 3] + "..."
