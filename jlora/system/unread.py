"""Vars whose values are read from a file when something asks for them, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jlora.system.runtime import jt


class _Reader:
    """Gives a Var its values. While there is one whose Var has none, Jittor computes only what it
    is asked for: otherwise it would, with the first number that anybody asks for, read them all.
    """

    waiting = 0

    def __init__(self, read: Callable[[], np.ndarray]):
        self._read = read
        _Reader.waiting += 1
        jt.flags.use_threading = 1  # Jittor's name for that

    def __call__(self, numpy, data) -> None:
        if self._read is not None:
            data["outputs"][0][...] = self._read()
            self._done()

    def _done(self) -> None:
        self._read = None
        _Reader.waiting -= 1
        if not _Reader.waiting:
            jt.flags.use_threading = 0

    def __del__(self):
        if self._read is not None:  # its Var is gone, and nobody wanted it
            self._done()


def unread(shape: Sequence[int], read: Callable[[], np.ndarray]) -> jt.Var:
    """A float32 Var that takes memory once its values are asked for.

    Args:
        read: gives them, of that shape; its errors come to whoever asks.
    """
    reader = _Reader(read)
    return jt.numpy_code(tuple(shape), "float32", [], lambda *arguments: reader(*arguments))
