"""Keys and values of what was run before, found again by how a prompt begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Runs of tokens, the least recently used of which leave when there is no room.

    Args:
        budget: bytes that all of them take at most.
        limit: `jlora.decoding.decoder.angle_limit`: keys of texts up to it and of longer ones are
            turned by other angles, so neither is found for the other.

    Attributes:
        bytes: what they take.
    """

    def __init__(self, budget: int, limit: int | None = None):
        self.budget, self._limit = budget, limit
        self.bytes = 0
        self._entries: list[tuple[np.ndarray, Any]] = []  # tokens and Kept, last used last

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int, tokens: np.ndarray) -> tuple[Any | None, int]:
        """What begins with the most of ``tokens``, and with how many; it counts as used.

        Args:
            adapter: slot of the adapter that it was run with.
            tokens: (n,) of a prompt; its last one is always run.
        """
        best, most = None, 0
        for place, (known, kept) in enumerate(self._entries):
            if kept.adapter != adapter or self._is_long(known) != self._is_long(tokens):
                continue
            length = min(common(known, tokens), len(tokens) - 1)
            if length > most:
                best, most = place, length
        if best is None:
            return None, 0
        self._entries.append(self._entries.pop(best))
        return self._entries[-1][1], most

    def _is_long(self, tokens: Sequence[int]) -> bool:
        return self._limit is not None and len(tokens) > self._limit

    def make_room(self, adapter: int, tokens: np.ndarray, size: int) -> bool:
        """Let ``size`` bytes be free for a run that begins with ``tokens``; then `add` it.

        Those that it begins with leave, and as many of the least recently used as must.

        Returns:
            False: it is there already, or larger than the budget; nothing is done.
        """
        alike = [
            (place, common(known, tokens))
            for place, (known, kept) in enumerate(self._entries)
            if kept.adapter == adapter and self._is_long(known) == self._is_long(tokens)
        ]
        if size > self.budget or any(length == len(tokens) for _, length in alike):
            return False
        for place, length in reversed(alike):
            if length == len(self._entries[place][0]):
                self._drop(place)
        while self.bytes + size > self.budget:
            self._drop(0)
        return True

    def add(self, kept: Any) -> None:
        """Keep a `jlora.decoding.rows.Kept` for which `make_room` was called."""
        self._entries.append((np.array(kept.tokens, np.int32), kept))
        self.bytes += kept.bytes

    def forget(self, adapter: int) -> None:
        """Drop all that was run with an adapter."""
        for place in reversed(range(len(self._entries))):
            if self._entries[place][1].adapter == adapter:
                self._drop(place)

    def _drop(self, place: int) -> None:
        self.bytes -= self._entries.pop(place)[1].bytes
