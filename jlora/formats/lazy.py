"""Tensors of a file that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class LazyArray:
    """An array of known shape and dtype whose values are made by a function, each time anew.

    NumPy's functions take it as an array, and read it then.
    """

    def __init__(
        self, shape: Sequence[int], dtype: str | type | np.dtype, read: Callable[[], np.ndarray]
    ):
        self.shape, self.dtype, self.read = tuple(map(int, shape)), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


def is_placeholder(array: np.ndarray | LazyArray) -> bool:
    """Whether an array is a `jlora.formats.safetensors_file.placeholder`, without values."""
    return not isinstance(array, LazyArray) and not any(array.strides)
