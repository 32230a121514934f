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
TOGETHER = 4  # rows of A whose lines stand in turn
LINE = 64  # bytes


@dataclass(frozen=True)
class PackedBranch:
    """A layer's ``scale * B A`` in the layout that a step reads, see branches.h.

    Attributes:
        A: (rank / 4, lines, 4, numbers of a line) float32, or bf16 as uint16.
        B: (panels, reach, 16), or in bf16 (panels, reach / 2, 16, 2).
        first: (panels,) int32.
        rank, reach: what A and B have of each.
    """

    A: np.ndarray
    B: np.ndarray
    first: np.ndarray
    rank: int
    reach: int


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
    r = B.shape[1]
    width = len(B) // sum(enabled)
    rank, inputs = _up_to(len(A), TOGETHER), _up_to(A.shape[1], RUN)
    outputs = _up_to(width * len(enabled), RUN)
    whole = np.zeros((outputs, rank), np.float32)  # B as one matrix
    first, last = np.full(outputs, rank), np.zeros(outputs, np.int64)  # ranks of each output
    for place, block in enumerate(np.flatnonzero(enabled)):
        rows = slice(block * width, (block + 1) * width)
        whole[rows, place * r : (place + 1) * r] = B[place * width : (place + 1) * width] * scale
        first[rows], last[rows] = place * r, (place + 1) * r
    first = first.reshape(-1, LANES).min(1)  # of each panel
    last = last.reshape(-1, LANES).max(1)
    reach = _up_to(int((last - first).max()), 2 if narrow else 1)
    begin = np.minimum(first, rank - reach)
    ranks = begin[:, None] + np.arange(reach)  # (panels, reach)
    panels = whole.reshape(-1, LANES, rank).transpose(0, 2, 1)  # (panels, rank, 16)
    packed_b = np.take_along_axis(panels, ranks[:, :, None], 1)
    packed_a = np.zeros((rank, inputs), np.float32)
    packed_a[: len(A), : A.shape[1]] = A
    if narrow:
        packed_a, packed_b = _bf16(packed_a), _bf16(packed_b)
        packed_b = packed_b.reshape(-1, reach // 2, 2, LANES).transpose(0, 1, 3, 2)
    lines = packed_a.reshape(
        -1, TOGETHER, packed_a.nbytes // rank // LINE, LINE // packed_a.itemsize
    )
    begin = np.where(last > first, begin, -1).astype(np.int32)
    return PackedBranch(lines.transpose(0, 2, 1, 3), packed_b, begin, rank, reach)


def place_branches(
    branches: Sequence[PackedBranch], offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Copy branches into one memory, in the order in which they are read.

    Args:
        offset: lines from the memory's beginning; where several adapters are read in turn, other
            ones for each keep equal places of them out of the same sets of the cache.

    Returns:
        SLOT_BRANCH of each, and the memory, which must be held as long as those are read.
    """
    arrays = [array for branch in branches for array in (branch.A, branch.B, branch.first)]
    sizes = [_up_to(array.nbytes, LINE) for array in arrays]
    memory = np.empty((offset + 1) * LINE + sum(sizes), np.uint8)
    at = -memory.ctypes.data % LINE + offset * LINE
    addresses = []
    for array, size in zip(arrays, sizes):
        copy = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        addresses.append(memory.ctypes.data + at)
        at += size
    records = np.zeros(len(branches), SLOT_BRANCH)
    for i, name in enumerate(("A", "B", "from")):
        records[name] = addresses[i::3]
    for name in ("rank", "reach"):
        records[name] = [getattr(branch, name) for branch in branches]
    records["narrow"] = [branch.A.dtype == np.uint16 for branch in branches]
    return records, memory


def _bf16(x: np.ndarray) -> np.ndarray:
    return rounding.narrow("a branch", x, "BF16").view(np.uint16)


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
