"""The operators on an NVIDIA card: the library of ``cuda/``, by nvcc, and the card's memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from ctypes import c_int64, c_void_p
from pathlib import Path

import numpy as np

from jlora.kernels import structs
from jlora.system.errors import UserError
from jlora.system.files import atomic_path
from jlora.system.lock import one_at_a_time
from jlora.system.runtime import jt
from jlora.system.status import run_compiler

FOLDER = Path(__file__).resolve().parent / "cuda"
SOURCE = FOLDER / "library.cu"
#: Headers beside the folder that it includes, and those that they include.
SHARED = ("layouts", "native", "operator", "profile")
FLAGS = "-std=c++17 -O3 --shared -Xcompiler -fPIC --cudart=shared -w".split()
#: Compute capability from which a card multiplies bf16.
OLDEST = 80

#: A compiled library that takes the card's place; tests put the emulator's here.
emulated: Path | None = None


def on_gpu() -> bool:
    """Whether operators run on the card now."""
    return emulated is not None or bool(jt.flags.use_cuda)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled operators, compiled at the first call on this machine.

    Raises:
        UserError: the card is too old, the compiler failed, or the result cannot be loaded.
    """
    return load(emulated or _compiled())


def load(path: Path) -> ctypes.CDLL:
    """Load a compiled library and check its structs.

    Raises:
        UserError: it cannot be loaded, or it is of another version.
    """
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"the compiled operators cannot be loaded: {error}; remove {path} and start again"
        ) from error
    loaded.struct_layouts.restype = loaded.gpu_failure.restype = ctypes.c_char_p
    loaded.gpu_allocate.restype = c_void_p
    structs.check(loaded.struct_layouts().decode())
    return loaded


def command(nvcc: str, compiler: str, capabilities: tuple[int, ...]) -> list[str]:
    """The command that compiles the library for cards of these compute capabilities (80, 90)."""
    targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
    return [nvcc, *FLAGS, *targets, f"-ccbin={compiler}", str(SOURCE), "-lcublas"]


def _compiled() -> Path:
    capabilities = tuple(sorted(set(jt.flags.cuda_archs)))
    if not capabilities or capabilities[0] < OLDEST:
        found = f"{capabilities[0] / 10}" if capabilities else "unknown"
        raise UserError(
            f"the card's compute capability is {found}, and products in bf16 need "
            f"{OLDEST / 10}; use precision plain"
        )
    nvcc = jt.flags.nvcc_path
    libraries = Path(nvcc).parent.parent / "lib64"
    full = [*command(nvcc, jt.flags.cc_path, capabilities), f"-L{libraries}"]
    full += ["-Xlinker", f"-rpath={libraries}"]
    digest = hashlib.sha256(repr(full).encode())
    for source in sorted([*FOLDER.glob("*"), *(FOLDER.parent / f"{n}.h" for n in SHARED)]):
        digest.update(source.read_bytes())
    path = Path(jt.flags.cache_path) / "jlora" / f"operators-{digest.hexdigest()[:16]}.so"
    if path.is_file():
        return path
    with one_at_a_time(path.with_name("operators.lock"), "compiling jlora's operators"):
        if not path.is_file():
            with atomic_path(path) as temporary:
                code, errors = run_compiler(
                    [*full, "-o", str(temporary)],
                    "compiling jlora's operators for this card (once, about a minute)",
                )
                if code:
                    lines = [line for line in errors.splitlines() if "error" in line]
                    raise UserError(
                        f"{nvcc} could not compile jlora's operators "
                        f"({(lines or ['no message'])[0].strip()}); precision plain runs without "
                        "them"
                    )
    return path


def check() -> None:
    """Raise what went wrong on the card since the last call.

    Raises:
        UserError: a call of CUDA or cuBLAS failed.
    """
    failure = library().gpu_failure()
    if failure:
        hint = "; use smaller batches" if b"out of memory" in failure else ""
        raise UserError(f"the GPU failed in {failure.decode()}{hint}")


class DeviceMemory:
    """Memory of the card.

    Attributes:
        address: where it begins.
        size: in bytes.
    """

    def __init__(self, size: int):
        free = library().gpu_free  # bound here: at Python's exit the module is emptied first
        self.size, self._free = size, free
        self.address = library().gpu_allocate(c_int64(size))
        check()
        if not self.address:  # another thread has been told
            raise UserError(f"the GPU has not {size:,} bytes left; use smaller batches")

    def __del__(self):
        if getattr(self, "address", None):
            self._free(c_void_p(self.address))

    @classmethod
    def of(cls, array: np.ndarray) -> DeviceMemory:
        """A copy of an array of the host."""
        array = np.ascontiguousarray(array)
        memory = cls(array.nbytes)
        memory._copy(memory.address, array.ctypes.data, array.nbytes, False)
        return memory

    def numpy(self, shape: tuple[int, ...], dtype) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(shape, dtype)
        self._copy(array.ctypes.data, self.address, array.nbytes, True)
        return array

    @staticmethod
    def _copy(to: int, source: int, size: int, back: bool) -> None:
        library().gpu_copy(c_void_p(to), c_void_p(source), c_int64(size), c_int64(back))
        check()
