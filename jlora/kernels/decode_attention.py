"""Attention of decoding: prompts are kept once, generated tokens by step, nothing is copied."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from jlora.kernels.native import call, operator
from jlora.system.runtime import jt


class PromptStore:
    """What one layer keeps.

    The operator reads earlier steps by address, because their number grows. The Vars are held in
    ``steps``, so their memory stays where it is; each step's operator says where that is.

    Attributes:
        k, v: (P, T, G, D) of the prompts; turned: k as the scores want it.
        steps: keys and values (R, 1, G, D) of every step since, R that step's rows.
    """

    def __init__(self, k: jt.Var, v: jt.Var):
        self.k, self.v = k, v
        P, T, G, D = k.shape
        width = call("padded_width", ctypes.c_int64, T)
        self.turned = operator((P, G, D, width), "float32", [k], "turn_keys_op")
        self.steps: list[tuple[jt.Var, jt.Var]] = []
        self._places: list[jt.Var] = []  # of the steps whose addresses are not known yet
        self._known = np.zeros((0, 2), np.int64)

    def append(self, k: jt.Var, v: jt.Var, place: jt.Var) -> None:
        """Keep a step's keys and values; ``place`` (4,) int32 holds their addresses in pairs."""
        self.steps.append((k, v))
        self._places.append(place)

    def addresses(self) -> np.ndarray:
        """Where the earlier steps' keys and then their values are, (2 * steps,) int64."""
        if self._places:
            new = [place.numpy().view(np.int64) for place in self._places]
            self._known = np.concatenate([self._known, np.stack(new)])
            self._places = []
        return self._known.T.reshape(-1)


class Ancestry:
    """Which prompt each row answers, and where each row's earlier tokens stand in their steps.

    Attributes:
        owner: (R,) prompt of each row.
        table: (R, steps) row of each earlier token in its step's arrays.
    """

    def __init__(self, prompts: int):
        self.owner = np.arange(prompts, dtype=np.int32)
        self.table = np.zeros((prompts, 0), dtype=np.int32)

    @property
    def steps(self) -> int:
        return self.table.shape[1]

    def grow(self) -> None:
        """Every row has got a token, its own in this step's arrays."""
        new = np.arange(len(self.owner), dtype=np.int32)[:, None]
        self.table = np.concatenate([self.table, new], axis=1)

    def take(self, rows: np.ndarray) -> None:
        self.owner, self.table = self.owner[rows], self.table[rows]

    def grouped(self) -> bool:
        """Whether the rows of each prompt stand together, prompts in order."""
        return bool((np.diff(self.owner) >= 0).all())


def decode_attention(
    q: jt.Var, k: jt.Var, v: jt.Var, store: PromptStore, ancestry: Ancestry, first: np.ndarray
) -> jt.Var:
    """Attend with one new token a row, and keep it; q (R, 1, H, D), k and v (R, 1, G, D).

    Args:
        ancestry: without the new tokens.
        first: (P,) int32, the first real token of each prompt.
    """
    steps = ancestry.steps
    table = ancestry.table if steps else np.zeros((len(ancestry.owner), 1), np.int32)
    # As pairs of int32: Jittor makes 32-bit numbers of all that have 64.
    addresses = (store.addresses() if steps else np.zeros(1, np.int64)).view(np.int32)
    tables = [jt.array(array) for array in (ancestry.owner, first, table, addresses)]
    inputs = [q, k, v, store.turned, store.v, *tables]
    y, place = operator(
        [q.shape, (4,)], ["float32", "int32"], inputs, "decode_attention_op",
        store.k.shape[1], steps, 1.0 / math.sqrt(q.shape[-1]),
    )  # fmt: skip
    store.append(k, v, place)
    return y
