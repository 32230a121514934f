"""How a C++ or CUDA operator gets into Jittor.

The operators of this folder are compiled once for the machine, into one library. What Jittor
compiles for each of them is a stub of a few lines that calls the library; the stub depends on the
number and types of the arrays only, so a handful of stubs serve all operators and all sizes. On an
NVIDIA card the library is that of `gpu_library`, whose operators have the same names and arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from ctypes import c_double, c_int64
from pathlib import Path

import numpy as np

from jlora.kernels import gpu_library, structs
from jlora.kernels.gpu_library import on_gpu
from jlora.system import machine
from jlora.system.compilers import CHOICE, Compiler, operator_compilers, target
from jlora.system.console import warn
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, write_text
from jlora.system.lock import one_at_a_time
from jlora.system.runtime import OneDNN, find_onednn, jt
from jlora.system.status import run_compiler
from jlora.system.unread import is_waiting

FOLDER = Path(__file__).resolve().parent
SOURCE = "library.cc"
# Reassociation lets the compiler use vector registers for sums. -Ofast is not used: linking with
# it would flush denormal numbers to zero in the whole process.
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-fassociative-math -freciprocal-math -ffp-contract=fast"
).split()
# What a compiler dies of that the next time may not be there.
PASSING = re.compile(
    r"Killed|Terminated|ended by signal|out of memory|Cannot allocate|memory exhausted|"
    r"No space left|quota exceeded|Input/output error|Read-only file system"
)
NUMBERS, INTEGERS = 6, 3  # most that an operator takes

_HEADER = (
    (FOLDER / "native.h").read_text(encoding="utf-8").replace("#pragma once\n", "")
    + """
static inline jlora::Array jlora_array(jittor::Var* v) {
    jlora::Array a{v->mem_ptr, v->num, {0}, (int64_t)v->shape.size()};
    for (int i = 0; i < (int)v->shape.size() && i < 6; i++) a.shape[i] = v->shape[i];
    return a;
}
"""
)


def library() -> ctypes.CDLL:
    """The compiled operators of where Jittor computes now: the processors, or the card.

    Raises:
        UserError: they could not be compiled or loaded.
    """
    return gpu_library.library() if on_gpu() else _cpu_library()


@functools.cache
def _cpu_library() -> ctypes.CDLL:
    """The compiled operators, compiled at the first call on this machine.

    Raises:
        UserError: the compiler failed, or the result cannot be loaded.
    """
    loaded = _first_that_works()
    # Another compiler would not mend what this finds.
    loaded.struct_layouts.restype = ctypes.c_char_p
    structs.check(loaded.struct_layouts().decode())
    return loaded


def _first_that_works() -> ctypes.CDLL:
    """The operators by the best compiler that makes them.

    Raises:
        UserError: none does.
    """
    onednn, compilers = find_onednn(), operator_compilers()
    for compiler in compilers[:-1]:
        path = _library_path(_command(onednn, compiler))
        failed = path.with_suffix(".failed")  # half a minute that no later start spends again
        alone = one_at_a_time(path.with_suffix(".trying"), "compiling jlora's operators")
        with contextlib.nullcontext() if path.is_file() else alone:
            if failed.is_file() and not path.is_file():
                continue
            try:
                return _made(onednn, compiler)
            except UserError as error:
                lasting = error.__cause__ is None and not PASSING.search(str(error))
                kept = f", {failed} remembers it" if lasting else ""
                warn(f"{error}; taking another compiler ({CHOICE} chooses{kept})")
                if lasting:
                    with contextlib.suppress(UserError):  # the cache is read-only
                        write_text(failed, f"{error}\n")
    return _made(onednn, compilers[-1])


def _library_path(command: list[str]) -> Path:
    return Path(jt.flags.cache_path) / "jlora" / f"operators-{_digest(command)}.so"


def _made(onednn: OneDNN | None, compiler: Compiler) -> ctypes.CDLL:
    """The operators as a compiler makes them.

    Raises:
        UserError: it failed, or the result cannot be loaded.
    """
    command = _command(onednn, compiler)
    path = _library_path(command)
    if not path.is_file():
        with one_at_a_time(path.with_suffix(".lock"), "compiling jlora's operators"):
            if not path.is_file():
                _compile(command, path)
    try:
        return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise UserError(
            f"the compiled operators cannot be loaded: {error}; remove {path} and start again"
        ) from error


def problem() -> str | None:
    """Why the operators cannot be used on this machine, None if they can; asked once."""
    return _problem(on_gpu())


@functools.cache
def _problem(_on_gpu: bool) -> str | None:
    try:
        library()
    except UserError as error:
        return str(error)
    return None


def _command(onednn: OneDNN | None, compiler: Compiler) -> list[str]:
    options = [*FLAGS, *compiler.link_options, target()]
    command = [compiler.path, *options, str(FOLDER / SOURCE)]
    if platform.machine() in ("x86_64", "AMD64"):
        # Of AVX-512; GCC would take half of it.
        command.insert(1, "-mprefer-vector-width=512")
    if os.environ.get("JLORA_PROFILE"):  # for benchmarks/profile.py
        command += ["-DJLORA_PROFILE"]
    if _has_amx(command):
        command += ["-DJLORA_AMX"]
    elif onednn is not None:  # after the source that needs it
        command += ["-DJLORA_ONEDNN", f"-I{onednn.include}", str(onednn.library)]
        command += [f"-Wl,-rpath,{onednn.library.parent}"]
    return command


def _has_amx(command: list[str]) -> bool:
    """Whether the compiler makes AMX code for this target, and the system lets us run it."""
    if "AMX_BF16" not in machine.cpu_features():
        return False
    asked = [*command[:-1], "-dM", "-E", "-x", "c++", os.devnull]
    result = subprocess.run(asked, capture_output=True, text=True, errors="replace")
    return "__AMX_BF16__" in result.stdout and "__AMX_INT8__" in result.stdout


def _digest(command: list[str]) -> str:
    """Changes with the sources, the command and the processor that -march=native means."""
    processor = (platform.machine(), machine.cpu_model(), sorted(machine.cpu_flags()))
    digest = hashlib.sha256(repr((command, processor)).encode())
    for path in sorted(FOLDER.glob("*.[hc]*")):
        if path.suffix in (".h", ".cc"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], path: Path) -> None:
    with atomic_path(path) as temporary:
        code, errors = run_compiler(
            [*command, "-o", str(temporary)],
            "compiling jlora's operators for this machine (once, half a minute)",
        )
        if code:
            said = errors.splitlines()
            lines = [line for line in said if PASSING.search(line)]
            lines = lines or [line for line in said if "error" in line]
            lines = lines or [f"ended by signal {-code}" if code < 0 else "no message"]
            raise UserError(
                f"{command[0]} could not compile jlora's operators ({lines[0].strip()}); "
                "precision plain runs without them, `jlora doctor` checks the compiler"
            )


@functools.cache
def _address(function: str, library: ctypes.CDLL) -> int:
    return ctypes.cast(getattr(library, function), ctypes.c_void_p).value


# What a failed call of CUDA has left to say; Jittor turns the exception into Python's.
_FAILED = """
const char* failure = ((const char* (*)())(uintptr_t)integers[4])();
if (failure) throw std::runtime_error(std::string("the GPU failed in ") + failure);
"""


@functools.cache
def _stub(inputs: int, outputs: int) -> str:
    """Statements that describe the arrays and call the operator whose address comes with them."""
    lists = [
        f"jlora::Array {name}[] = {{{', '.join(f'jlora_array({v}{i})' for i in range(count))}}};"
        for name, v, count in (("ins", "in", max(inputs, 1)), ("outs", "out", outputs))
    ]
    numbers = ", ".join(f'data["{i}"]' for i in range(NUMBERS))
    # Jittor hands over doubles alone, which do not hold every int64; see `_halves`.
    integers = ", ".join(
        f'(int64_t)data["high{i}"] << 32 | (int64_t)data["low{i}"]' for i in range(INTEGERS + 2)
    )
    return "\n".join(
        [
            *lists,
            f"double numbers[] = {{{numbers}}};",
            f"int64_t integers[] = {{{integers}}};",
            "((jlora::Operator*)(uintptr_t)integers[0])(ins, outs, integers + 1, numbers);",
        ]
    )


def _halves(integers: Sequence[int]) -> dict[str, float]:
    """Integers below 2**63 as the two doubles each that a stub puts together."""
    data = {}
    for i, integer in enumerate(integers):
        data[f"high{i}"], data[f"low{i}"] = float(integer >> 32), float(integer & 0xFFFFFFFF)
    return data


def operator(shapes, dtypes, inputs, function: str, *numbers: float, integers: Sequence[int] = ()):
    """Add an operator of the library to Jittor's graph.

    Args:
        shapes: the output's shape, or a list of shapes for several outputs.
        dtypes: likewise.
        inputs: Vars, at least one.
        function: its name in the library (``JLORA_OPERATOR(name)``).
        numbers: what it reads as ``number[0]``, ``number[1]``, ...: float64.
        integers: likewise as ``integer[0]``, ...: int64, for addresses and seeds.

    Returns:
        A Var, or a list of Vars for several outputs.
    """
    own = library()
    asks = _address("gpu_failure", own) if on_gpu() else 0
    data = {str(i): float(number) for i, number in enumerate(_filled(numbers, NUMBERS))}
    data.update(_halves([_address(function, own), *_filled(integers, INTEGERS), asks]))
    outputs = len(dtypes) if isinstance(dtypes, list) else 1
    stub = _stub(len(inputs), outputs)
    if jt.flags.use_cuda:
        source = {"cuda_header": "#include <stdexcept>\n" + _HEADER, "cuda_src": stub + _FAILED}
    else:
        source = {"cpu_header": _HEADER, "cpu_src": stub}
    return jt.code(shapes, dtypes, inputs, data=data, **source)


def _filled(given: Sequence, count: int) -> list:
    return [*given, *[0] * (count - len(given))]


def call(function: str, result: type, *numbers: int) -> int:
    """Ask the library something at once, outside Jittor's graph; all arguments are int64."""
    found = getattr(library(), function)
    found.restype = result
    answer = found(*(c_int64(int(number)) for number in numbers))
    if on_gpu():
        gpu_library.check()
    return answer


def run(
    function: str,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[np.ndarray],
    *numbers: float,
    integers: Sequence[int] = (),
) -> None:
    """Run an operator of the library at once on numpy arrays, outside Jittor's graph.

    Several threads may: operators run one at a time, and the others wait. (Jittor itself must be
    used by one thread at a time, so this does not hold for `operator`.)
    """
    found = getattr(library(), function)
    found.restype = None
    arguments = (c_int64 * INTEGERS)(*integers), (c_double * NUMBERS)(*numbers)
    found(_described(inputs), _described(outputs), *arguments)
    if on_gpu():
        gpu_library.check()


def _described(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    for array in arrays:
        if not array.flags.c_contiguous:
            raise ValueError("the operators read arrays row by row")
    return (structs.Array * len(arrays))(
        *((a.ctypes.data, a.size, (c_int64 * 6)(*a.shape), a.ndim) for a in arrays)
    )


def has(function: str) -> bool:
    """Whether the library was compiled with a function."""
    return hasattr(library(), function)


_retired: list[object] = []


def value_number(var: jt.Var) -> int:
    """A number for a Var with its present value: another one as soon as it gets another value.

    Jittor counts the nodes of its graphs up and gives no number twice in a process, so what was
    made of a value can be kept under its number, also after the Var is gone. Writing into a Var's
    memory (``var.data``) changes no number.
    """
    return var.id


def retire(*memory: object, kept: list[object] = _retired) -> None:
    """Keep memory whose address operators have that may not have run: Jittor is lazy.

    For ``__del__``, which cannot wait for them itself: it also runs while Jittor takes a graph
    apart that held the last reference, and must not start operators then. (``kept`` is bound
    here because Python's exit empties the module first.)
    """
    kept.extend(memory)


def free_retired() -> None:
    """Run what is left to run and free what was retired until now.

    While a model's weights are unread they stay: running everything would read them all.
    """
    while _retired and not is_waiting():  # what goes may be the last to hold something else
        memory = _retired[:]
        del _retired[: len(memory)]
        jt.sync_all()
        memory.clear()


class FusedFunction(jt.Function):
    """A ``jt.Function`` whose ``grad`` finds its arguments in ``self.inputs``.

    Inside ``execute`` Jittor hands over taped copies of the arguments. Whoever keeps one of those
    for the backward pass makes a cycle that is never freed (the tape holds the function, the
    function its own tape), half a gigabyte a training step. The arguments as given are safe.
    """

    def __call__(self, *args):
        self.inputs = args
        return super().__call__(*args)
