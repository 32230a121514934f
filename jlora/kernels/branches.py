"""Low-rank branches as the native decoder reads them; see branches.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.formats import rounding
from jlora.kernels import structs

# The branches of a layer, by slot.
SLOT_BRANCH = np.dtype(structs.SlotBranch)
LANES = 16  # outputs of a panel of B
RUN = 32  # A's rows are filled up to whole runs of so many inputs, outputs to as many
LINE = 64  # bytes


@dataclass(frozen=True)
class PackedBranch:
    """A layer's ``scale * B A`` in the layout that a step reads.

    Attributes:
        record: SLOT_BRANCH (), with the addresses of the arrays.
        arrays: what must be held as long as the record is read.
    """

    record: np.ndarray
    arrays: tuple[np.ndarray, ...]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def pack_branch(
    A: np.ndarray, B: np.ndarray, scale: float, enabled: Sequence[bool] = (True,), narrow=False
) -> PackedBranch:
    """Lay out a branch.

    Args:
        A: (r * enabled blocks, in) float32.
        B: (out / blocks * enabled blocks, r) float32, the enabled blocks one after the other.
        scale: of the product; it goes into B before that is rounded.
        enabled: one flag for each of the equal blocks of outputs, see `jlora.layers.MergedLinear`.
        narrow: keep both rounded to bf16 (to nearest, ties to even) instead of float32.
    """
    r, rank = B.shape[1], len(A)
    width = len(B) // sum(enabled)
    inputs = -(-A.shape[1] // RUN) * RUN
    outputs = -(-width * len(enabled) // RUN) * RUN
    whole = np.zeros((outputs, rank), np.float32)  # B as one matrix
    first, last = np.full(outputs, rank), np.zeros(outputs, np.int64)  # ranks of each output
    for place, block in enumerate(np.flatnonzero(enabled)):
        rows = slice(block * width, (block + 1) * width)
        whole[rows, place * r : (place + 1) * r] = B[place * width : (place + 1) * width] * scale
        first[rows], last[rows] = place * r, (place + 1) * r
    first = first.reshape(-1, LANES).min(1)  # of each panel
    last = last.reshape(-1, LANES).max(1)
    reach = int((last - first).max())
    begin = np.minimum(first, rank - reach)
    ranks = begin[:, None] + np.arange(reach)  # (panels, reach)
    panels = whole.reshape(-1, LANES, rank).transpose(0, 2, 1)  # (panels, rank, 16)
    packed_b = np.take_along_axis(panels, ranks[:, :, None], 1)
    packed_a = np.zeros((rank, inputs), np.float32)
    packed_a[:, : A.shape[1]] = A
    arrays = [packed_a, packed_b]
    if narrow:
        arrays = [rounding.narrow("a branch", array, "BF16").view(np.uint16) for array in arrays]
    arrays = [_on_line(array) for array in arrays]
    arrays.append(np.where(last > first, begin, -1).astype(np.int32))
    record = np.zeros((), SLOT_BRANCH)
    for name, array in zip(("A", "B", "from"), arrays):
        record[name] = array.ctypes.data
    record["rank"], record["reach"], record["narrow"] = rank, reach, narrow
    return PackedBranch(record, tuple(arrays))


def _on_line(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a line of the processor's cache."""
    memory = np.empty(array.nbytes + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
