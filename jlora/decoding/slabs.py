"""Memory for the keys and values of generated tokens, used again."""

from __future__ import annotations

import numpy as np

from jlora.kernels.decoder import TokenMemory

SLAB = 1024  # tokens of a slab


class Slabs:
    """Places for tokens in slabs of equal size, which are added as they are needed.

    Args:
        shape: (layers, 2, SLAB, width).
        narrow: see `TokenMemory`.

    Attributes:
        addresses: (slabs,) int64.
    """

    def __init__(self, shape: tuple[int, ...], narrow: bool):
        self._shape, self._narrow = shape, narrow
        self._slabs: list[TokenMemory] = []
        self._free = np.zeros(0, np.int32)
        self.addresses = np.zeros(0, np.int64)

    def read(self, places: np.ndarray) -> np.ndarray:
        """The keys and values at ``places``, (layers, 2, places, width)."""
        slabs = places // SLAB
        numbers = {number: self._slabs[number].numbers() for number in set(slabs.tolist())}
        kind = next(iter(numbers.values())).dtype if numbers else np.float32
        found = np.empty((*self._shape[:2], len(places), self._shape[3]), kind)
        for number, slab in numbers.items():
            own = slabs == number
            found[:, :, own] = slab[:, :, places[own] % SLAB]
        return found

    def take(self, count: int, table: np.ndarray) -> np.ndarray:
        """``count`` places, (count,) int32, that ``table`` does not name."""
        if len(self._free) < count:
            used = np.zeros(len(self._slabs) * SLAB, bool)
            used[table[table >= 0]] = True
            self._free = np.flatnonzero(~used).astype(np.int32)
        while len(self._free) < count:
            first = len(self._slabs) * SLAB
            self._slabs.append(TokenMemory(self._shape, self._narrow))
            self.addresses = np.array([slab.address for slab in self._slabs], np.int64)
            new = np.arange(first, first + SLAB, dtype=np.int32)
            self._free = np.concatenate([self._free, new])
        taken, self._free = self._free[:count], self._free[count:]
        return taken
