"""Takes the place of nvcc: makes C++ for this processor of CUDA sources, with `device.h`'s threads.

The arguments of each call are appended to the file $JLORA_REHEARSED, if that is set.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PRELUDE = Path(__file__).resolve().with_name("prelude.h")
#: What makes threads wait for each other. A source without it runs one thread after the other.
_BARRIERS = re.compile(r"__sync|__shfl|cub::(?:Block|Warp)|shared_reduce|nvcuda")
#: nvcc's own: those with a value behind a space, and the others.
_PAIRS = ("-cudadevrt", "-x")
_OWN = ("-arch=", "-code=", "-gencode=", "--", "-O")


def main(arguments: Sequence[str]) -> int:
    if "--version" in arguments:
        print("Cuda compilation tools, release 13.0, V13.0.0")
        return 0
    record = os.environ.get("JLORA_REHEARSED")
    if record:
        with open(record, "a") as file:
            print(json.dumps(arguments), file=file)
    compiler, sources, flags = translate(arguments)
    # Where the real one finds thrust and the rest of CUDA's C++ headers.
    flags += [f"{f}/cccl" for f in dict.fromkeys(f for f in flags if f.startswith("-I"))]
    with tempfile.TemporaryDirectory() as scratch:
        made = [f"{scratch}/{number}.ii" for number in range(len(sources))]
        for source, path in zip(sources, made):
            barriers = int(_BARRIERS.search(Path(source).read_text()) is not None)
            command = [compiler, "-E", "-x", "c++", "-include", str(PRELUDE), source]
            command += [f"-DEMULATOR_BARRIERS={barriers}"]
            command += [f for f in flags if f.startswith(("-D", "-I", "-std", "-f", "-m"))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.stderr.write(done.stderr)
                return done.returncode
            Path(path).write_text(launches(done.stdout))
        command = [compiler, "-O1", "-fno-strict-aliasing", "-w", *made, *flags]
        return subprocess.run(command).returncode


def translate(arguments: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The compiler, the sources and the compiler's flags in nvcc's arguments."""
    compiler, sources, flags = "g++", [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-ccbin="):
            compiler = argument.removeprefix("-ccbin=").strip('"')
        elif argument == "-Xcompiler":
            flags.append(next(rest))
        elif argument == "-Xlinker":
            flags.append(f"-Wl,{next(rest)}")
        elif argument == "--shared":
            flags.append("-shared")
        elif argument in _PAIRS:
            next(rest)
        elif argument.endswith((".cc", ".cu")):
            sources.append(argument)
        elif not argument.startswith(_OWN):
            flags.append(argument)
    return compiler, sources, flags


def launches(text: str) -> str:
    """Turn each ``kernel<<<grid, block>>>(arguments)`` into a call of the emulator."""
    parts, done = [], 0
    for found in re.finditer("<<<", text):
        kernel = _name_before(text, found.start())
        end = text.index(">>>", found.end())
        opened = text.index("(", end)
        closed = _closing(text, opened)
        call = f"{text[kernel : found.start()]}{text[opened : closed + 1]}"
        shape = text[found.end() : end]
        parts += [text[done:kernel], f"emulator::Launch({shape})([&] {{ {call}; }})"]
        done = closed + 1
    return "".join([*parts, text[done:]])


def _name_before(text: str, end: int) -> int:
    """Where the kernel's name begins, which may have template arguments."""
    at, depth = len(text[:end].rstrip()), 0
    while text[at - 1] == ">" or depth:
        at -= 1
        depth += {">": 1, "<": -1}.get(text[at], 0)
    while re.match(r"[\w:]", text[at - 1]):
        at -= 1
    return at


def _closing(text: str, opened: int) -> int:
    depth = 0
    for at in range(opened, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"not closed: {text[opened : opened + 80]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
