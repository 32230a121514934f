"""Vars whose values are read from a file when something asks for them, and not before."""

from __future__ import annotations

import ctypes
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jlora.system.errors import UserError
from jlora.system.runtime import jt


class Source(Protocol):
    """An array that is still in a file, such as `jlora.formats.lazy.LazyArray`."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Reader:
    """Gives a Var its values. While there is one whose Var has none, Jittor computes only what it
    is asked for: otherwise it would, with the first number that anybody asks for, read them all.
    """

    waiting: dict[int, _Reader] = {}  # by the number of the Var's value

    def __init__(self, source: Source):
        self.source: Source | None = source
        self._number = -1  # of no Var
        jt.flags.use_threading = 1  # Jittor's name for that

    def wait(self, number: int) -> None:
        if self.source is not None:  # where Jittor is told not to be lazy it has been read by now
            self._number = number
            self.waiting[number] = self

    def __call__(self, numpy, data) -> None:
        if self.source is not None:
            _fill(data["outputs"][0], self.source.read())
            self.end()

    def end(self) -> None:
        self.source = None
        self.waiting.pop(self._number, None)
        if not self.waiting:
            jt.flags.use_threading = 0


def _fill(output: Any, values: np.ndarray) -> None:
    """Give what Jittor has made room for its values: on a GPU in the card's memory."""
    if not jt.flags.use_cuda:
        output[...] = values
        return
    values = np.ascontiguousarray(values, np.float32)
    if not isinstance(output, np.ndarray):
        output.set(values)  # CuPy's
        return
    pointers = map(ctypes.c_void_p, (output.ctypes.data, values.ctypes.data))
    to_card = 1  # cudaMemcpyHostToDevice, of the library that Jittor has loaded
    code = ctypes.CDLL(None).cudaMemcpy(*pointers, ctypes.c_size_t(values.nbytes), to_card)
    if code:
        raise UserError(f"a weight could not be copied to the GPU (CUDA error {code})")


def _stand_in_for_cupy(has_cupy: bool) -> None:
    """On a GPU Jittor imports CuPy for `jt.numpy_code`. Where it has found none that works, the
    arrays are NumPy's, of the card's addresses, which is all that `_fill` needs.
    """
    if "cupy" not in sys.modules and not has_cupy:
        sys.modules["cupy"] = types.ModuleType("cupy", "A stand-in of jlora's, for Jittor alone.")


class _Call:
    """What Jittor holds as long as the Var may be read; with it goes the reader."""

    def __init__(self, reader: _Reader):
        self._reader = reader

    def __call__(self, *arguments) -> None:
        self._reader(*arguments)

    def __del__(self):
        if self._reader.source is not None:  # the Var is gone, and nobody wanted it
            self._reader.end()


def unread(source: Source) -> jt.Var:
    """A float32 Var that takes memory once its values are asked for.

    Args:
        source: its ``read`` gives them; errors come to whoever asks.
    """
    if jt.has_cuda:
        _stand_in_for_cupy(importlib.import_module("jittor.init_cupy").has_cupy)
    reader = _Reader(source)
    call = _Call(reader)
    var = jt.numpy_code(tuple(source.shape), "float32", [], lambda *arguments: call(*arguments))
    reader.wait(var.id)
    return var


def is_waiting() -> bool:
    """Whether there is a Var that has not been read."""
    return bool(_Reader.waiting)


def source_of(var: Any) -> Source | None:
    """Where a Var's values are, if they are not in memory yet."""
    reader = _Reader.waiting.get(var.id)
    return None if reader is None else reader.source


def values(var: Any) -> np.ndarray:
    """A Var's values, float32; one that has none yet reads them and takes no memory for them."""
    source = source_of(var)
    return var.float32().numpy() if source is None else np.asarray(source.read(), np.float32)
