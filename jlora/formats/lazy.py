"""Tensors of a file that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Blocks:
    """A matrix as its file has it, in blocks of a row's numbers.

    Attributes:
        kind: GGUF's name of the form, such as "Q4_1".
        read: gives them: uint8 (outputs, bytes of a row of inputs).
    """

    kind: str
    read: Callable[[], np.ndarray] = field(repr=False)


class LazyArray:
    """An array of known shape and dtype whose values are made by a function, each time anew.

    NumPy's functions take it as an array, and read it then.

    Attributes:
        blocks: the same numbers as a quantised file has them; None: it has them as they are.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: str | type | np.dtype,
        read: Callable[[], np.ndarray],
        blocks: Blocks | None = None,
    ):
        self.shape, self.dtype, self.read = tuple(map(int, shape)), np.dtype(dtype), read
        self.blocks = blocks

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
