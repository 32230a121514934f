"""The structs that the native decoder reads, and its two calls; see decoder.h."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.kernels import structs
from jlora.kernels.gpu_library import DeviceMemory, on_gpu
from jlora.kernels.native import run
from jlora.kernels.topk import rectangle

# Kinds of weights: a `PackedWeight`, plain floats (n, k), plain floats (k, n).
PACKED, ROWS_FIRST, COLUMNS_FIRST = 1, 2, 3

LINEAR, NORM = np.dtype(structs.Linear), np.dtype(structs.Norm)
# MODEL: "positions" and "frequencies" are learned and rotary positions, 0 where there are none;
# "activation" is one of block.ACTIVATIONS, "gated" whether blocks have two layers "in".
BLOCK, MODEL = np.dtype(structs.Block), np.dtype(structs.Model)


class TokenMemory:
    """Keys and values of tokens: float32 on the host; bf16, as uint16, on a GPU.

    Attributes:
        shape: (layers, 2, tokens, width).
        address: where they stand.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        if on_gpu():
            self._memory = DeviceMemory(2 * int(np.prod(shape)))
            self.address = self._memory.address
        else:
            self._memory = np.empty(shape, np.float32)
            self.address = self._memory.ctypes.data

    def numbers(self) -> np.ndarray:
        """As an array of ``shape``; a copy on a GPU."""
        if isinstance(self._memory, np.ndarray):
            return self._memory
        return self._memory.numpy(self.shape, np.uint16)

    def fill(self, parts: Sequence[np.ndarray]) -> None:
        """Write `numbers` of other tokens, one part after the other, from the first token on."""
        numbers, end = self.numbers(), 0
        for part in parts:
            begin, end = end, end + part.shape[2]
            numbers[:, :, begin:end] = part
        if not isinstance(self._memory, np.ndarray):
            self._memory = DeviceMemory.of(numbers)
            self.address = self._memory.address


def run_prompts(model, blocks, ids, positions, lengths, before, prompts) -> np.ndarray:
    """Run prompts, P of them one after the other in ``ids``.

    Args:
        model, blocks: MODEL (1,) and BLOCK (layers,).
        ids, positions: (sum of lengths,) int32.
        lengths: (P,) int32, tokens of each prompt.
        before: (P,) int32, tokens that stand before them and were run earlier.
        prompts: (P,) int64, addresses of (layers, 2, before + tokens, G, D) float32, where those
            earlier ones have their keys and values and the prompt's are written behind them.

    Returns:
        (P, C) float32, the state of each prompt's last token.
    """
    hidden = np.empty((len(lengths), int(model["C"][0])), np.float32)
    run("run_prompts_op", [model, blocks, ids, positions, lengths, before, prompts], [hidden])
    return hidden


def run_step(
    model, blocks, ids, positions, prompts, prompt_lengths, table, lengths, slabs, slab_size: int
) -> np.ndarray:
    """Run one more token of each of R rows; rows of one prompt stand together.

    Args:
        ids, positions: (R,) int32.
        prompts, prompt_lengths: (R,) int64 and int32, as `run_prompts` has written them.
        table: (R, any) int32, the place of each generated token, the new one included: the number
            of a token in slabs of ``slab_size``.
        lengths: (R,) int32, places of each row.
        slabs: (any,) int64, addresses of (layers, 2, slab_size, G, D) float32.

    Returns:
        (R, C) float32, the state of each row's newest token.
    """
    hidden = np.empty((len(ids), int(model["C"][0])), np.float32)
    arrays = [model, blocks, ids, positions, prompts, prompt_lengths, table, lengths, slabs]
    run("run_step_op", arrays, [hidden], slab_size)
    return hidden


def head_topk(
    hidden: np.ndarray,
    head: int,
    k: int,
    banned=None,
    penalised=None,
    penalty: float = 1.0,
    cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`jlora.kernels.topk.log_softmax_topk` of the head's logits, which are never written.

    Args:
        hidden: (rows, C) float32.
        head: address of the head's packed weight.
        k: how many; V where the vocabulary V is smaller.
        cap: of the logits, see `jlora.models.head.LanguageHead`.
    """
    rows, k = len(hidden), min(k, structs.Weight.from_address(head).n)
    values, ids = np.empty((rows, k), np.float32), np.empty((rows, k), np.int32)
    edits = [np.ascontiguousarray(rectangle(lists, rows)) for lists in (penalised, banned)]
    run("head_topk_op", [hidden, *edits], [values, ids], penalty, cap or 0, integers=[head])
    return values, ids
