"""Which C++ compiler makes jlora's operators: the newest here. Jittor keeps its own.

An old compiler knows none of a newer processor's instructions: with g++ 10, which contests and
conda environments pin, there is no AMX. Jittor's code has to go with the C++ library that its
process has loaded; jlora's operators are one library behind a C interface, which brings its own.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field

from jlora.system import machine
from jlora.system.errors import UserError

CHOICE = "JLORA_CXX"
#: Instructions that the operators use, by the kernel's names -> the compiler's macro for them, what
#: they are called, and the first g++ that has them.
INSTRUCTIONS = {
    "avx512_vnni": ("__AVX512VNNI__", "VNNI", 8),
    "avx512_bf16": ("__AVX512BF16__", "AVX512_BF16", 10),
    "avx_vnni": ("__AVXVNNI__", "AVX-VNNI", 11),
    "amx_bf16": ("__AMX_BF16__", "AMX_BF16", 11),
    "amx_int8": ("__AMX_INT8__", "AMX_INT8", 11),
    "bf16": ("__ARM_FEATURE_BF16_VECTOR_ARITHMETIC", "BF16", 10),
    "i8mm": ("__ARM_FEATURE_MATMUL_INT8", "I8MM", 10),
}
# The libraries of another compiler than Jittor's may be newer than the ones that are loaded.
STATIC = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: to call it by.
        version: such as (12, 2).
        clang: whether it is clang, whose OpenMP is another library than g++'s and Jittor's.
        missing: instructions of this processor that it does not know, keys of `INSTRUCTIONS`.
        own: whether it is Jittor's too.
    """

    path: str
    version: tuple[int, int]
    clang: bool
    missing: frozenset[str] = field(default_factory=frozenset)
    own: bool = True

    def __str__(self) -> str:
        return f"{'clang' if self.clang else 'g++'} {'.'.join(map(str, self.version))}"

    @property
    def link_options(self) -> tuple[str, ...]:
        """What makes a library of it load beside Jittor's."""
        return () if self.own or platform.system() != "Linux" else STATIC


def operator_compilers() -> list[Compiler]:
    """The compilers to try for jlora's operators, the best first.

    That is the one that ``JLORA_CXX`` names, alone; else those that know most of this processor's
    instructions, g++ before clang, new before old.

    Raises:
        UserError: ``JLORA_CXX`` names none.
    """
    own = machine.compiler()
    chosen = os.environ.get(CHOICE)
    if chosen:
        found = examine(chosen, _same(chosen, own))
        if found is None:
            raise UserError(
                f"{CHOICE}={chosen}: no C++ compiler of that name runs here; correct it, or unset "
                "it for the newest that is found"
            )
        return [found]
    paths: dict[str, str] = {}  # a program -> the first of its names
    for path in [*([own] if own else []), *machine.compilers_on_path()]:
        paths.setdefault(os.path.realpath(path), path)
    alone = Compiler(own or "g++", (0, 0), clang=False)
    if len(paths) < 2:  # nothing to choose, so nobody has to be asked
        return [alone]
    all_found = [examine(path, _same(path, own)) for path in paths.values()]
    # Where none answers, Jittor's will say why when it compiles.
    return sorted((each for each in all_found if each), key=_rank) or [alone]


def _rank(compiler: Compiler) -> tuple:
    newest_first = [-number for number in compiler.version]
    return len(compiler.missing), compiler.clang, newest_first, not compiler.own


def _same(path: str, own: str | None) -> bool:
    """Whether two names are those of one program."""
    found = shutil.which(path)
    return own is None or (found is not None and os.path.realpath(found) == os.path.realpath(own))


@functools.cache
def examine(path: str, own: bool) -> Compiler | None:
    """Ask a compiler what it is and which of this processor's instructions it knows.

    Returns:
        None if it does not run.
    """
    command = [path, target(), "-dM", "-E", "-x", "c++", os.devnull]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    macros = dict(re.findall(r"^#define (\w+) (.*)$", asked.stdout, re.MULTILINE))
    clang = "__clang__" in macros
    names = ("__clang_major__", "__clang_minor__") if clang else ("__GNUC__", "__GNUC_MINOR__")
    flags = machine.cpu_flags()
    missing = {flag for flag, (macro, *_) in INSTRUCTIONS.items() if macro not in macros}
    major, minor = (int(macros.get(name, "0")) for name in names)
    return Compiler(path, (major, minor), clang, frozenset(missing & flags), own)


def target() -> str:
    """The option that makes code for this processor, or for the one that ``JLORA_ARCH`` names."""
    option = "-mcpu" if platform.machine() in ("aarch64", "arm64") else "-march"
    return f"{option}={os.environ.get('JLORA_ARCH', 'native')}"  # another one is for tests


def known_here() -> list[str]:
    """What the operators use of this processor, by name."""
    flags = machine.cpu_flags()
    return [name for flag, (_, name, _) in INSTRUCTIONS.items() if flag in flags]


def what_is_missing(compiler: Compiler) -> str | None:
    """What of this processor a compiler leaves unused, and what would change it; None: nothing."""
    if not compiler.missing:
        return None
    known = [INSTRUCTIONS[flag] for flag in INSTRUCTIONS if flag in compiler.missing]
    names, first = ", ".join(name for _, name, _ in known), max(first for *_, first in known)
    return (
        f"{compiler} ({compiler.path}) makes no {names} code, which this processor has; "
        f"install g++ {first} or newer beside it ({CHOICE} names one that is not on the PATH)"
    )
