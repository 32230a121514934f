"""The structs that the native decoder reads, and its calls; see decoder.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.kernels import structs
from jlora.kernels.gpu_library import DeviceMemory, on_gpu
from jlora.kernels.native import run
from jlora.kernels.topk import Draw, edit_arrays, rectangle, run_topk

# Kinds of weights: a `PackedWeight`, plain floats (n, k), plain floats (k, n).
PACKED, ROWS_FIRST, COLUMNS_FIRST = 1, 2, 3

LINEAR, NORM = np.dtype(structs.Linear), np.dtype(structs.Norm)
# MODEL: "positions" and "frequencies" are learned and rotary positions, 0 where there are none;
# "activation" is one of block.ACTIVATIONS, "gated" whether blocks have two layers "in".
BLOCK, MODEL = np.dtype(structs.Block), np.dtype(structs.Model)


class TokenMemory:
    """Keys and values of tokens: float32, or where ``narrow``, and on a GPU, bf16 as uint16.

    Attributes:
        shape: (layers, 2, tokens, width).
        address: where they stand.
    """

    def __init__(self, shape: tuple[int, ...], narrow: bool):
        self.shape = shape
        if on_gpu():
            self._memory = DeviceMemory(2 * int(np.prod(shape)))
            self.address = self._memory.address
        else:
            self._memory = np.empty(shape, np.uint16 if narrow else np.float32)
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


@dataclass(frozen=True)
class Pieces:
    """Tokens of P prompts to be run.

    Attributes:
        lengths: (P,) int32, how many of each come now.
        before: (P,) int32, how many were run earlier.
        sizes: (P,) int32, tokens that there is room for in each block.
        blocks: (P,) int64, addresses of (layers, 2, size, G, D), see `TokenMemory`, where those
            earlier ones have their keys and values and the new ones' are written behind them.
    """

    lengths: np.ndarray
    before: np.ndarray
    sizes: np.ndarray
    blocks: np.ndarray


@dataclass(frozen=True)
class Step:
    """One more token for each of R rows.

    Attributes:
        prompts, prompt_lengths: (R,) int64 and int32, addresses and sizes of the blocks of the
            rows' prompts, all of whose tokens were run. It is fastest with the rows of a prompt
            together.
        table: (R, any) int32, the place of each generated token, the new one included: the number
            of a token in slabs.
        lengths: (R,) int32, places of each row.
        slabs: (any,) int64, addresses of (layers, 2, slab_size, G, D), see `TokenMemory`.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    table: np.ndarray
    lengths: np.ndarray
    slabs: np.ndarray
    slab_size: int


_NO_INTS, _NO_ADDRESSES = np.zeros(0, np.int32), np.zeros(0, np.int64)
NO_PIECES = Pieces(_NO_INTS, _NO_INTS, _NO_INTS, _NO_ADDRESSES)
NO_STEP = Step(_NO_ADDRESSES, _NO_INTS, np.zeros((0, 1), np.int32), _NO_INTS, _NO_ADDRESSES, 1)


def run_rows(
    model, blocks, ids, positions, slots, wanted, pieces: Pieces = NO_PIECES, step: Step = NO_STEP
) -> np.ndarray:
    """Run tokens of prompts and of rows through the whole model in one pass over its weights.

    What a token gets does not depend on which others are run with it: bit for bit, but for packed
    products by oneDNN, which may sum in another order for another number of rows.

    Args:
        model, blocks: MODEL (1,) and BLOCK (layers,).
        ids, positions: (N,) int32, of the pieces' tokens one piece after the other, then of the
            step's.
        slots: (N,) int32, the place of each token's adapter in the layers' branches; -1: none.
        wanted: (W,) int32, numbers of the tokens whose states are wanted.

    Returns:
        (W, C) float32, the states.
    """
    if on_gpu():
        return _run_on_gpu(model, blocks, ids, positions, wanted, pieces, step)
    hidden = np.empty((len(wanted), int(model["C"][0])), np.float32)
    arrays = [
        model, blocks, ids, positions, slots,
        pieces.blocks, pieces.lengths, pieces.before, pieces.sizes,
        step.prompts, step.prompt_lengths, step.table, step.lengths, step.slabs, wanted,
    ]  # fmt: skip
    run("run_rows_op", arrays, [hidden], step.slab_size)
    return hidden


def _run_on_gpu(model, blocks, ids, positions, wanted, pieces: Pieces, step: Step) -> np.ndarray:
    """`run_rows` of whole prompts or of a step, with the branches of one adapter for all rows."""
    prompts, rows = len(pieces.lengths), len(step.lengths)
    last = np.cumsum(pieces.lengths) - 1 if prompts else np.arange(rows)
    if (
        (prompts and rows)
        or not np.array_equal(wanted, last)
        or not np.array_equal(pieces.before + pieces.lengths, pieces.sizes)
    ):
        raise ValueError("the GPU runs whole prompts or a step, and gives the last states")
    hidden = np.empty((len(wanted), int(model["C"][0])), np.float32)
    if prompts:
        arrays = [pieces.lengths, pieces.before, pieces.blocks]
        run("run_prompts_op", [model, blocks, ids, positions, *arrays], [hidden])
    else:
        arrays = [step.prompts, step.prompt_lengths, step.table, step.lengths, step.slabs]
        run("run_step_op", [model, blocks, ids, positions, *arrays], [hidden], step.slab_size)
    return hidden


def head_topk(
    hidden: np.ndarray,
    head: int,
    k: int,
    banned=None,
    penalised=None,
    penalty: float | np.ndarray = 1.0,
    cap: float | None = None,
    biased=None,
    biases=None,
    allowed: np.ndarray | None = None,
    words: int = 0,
    draws: Sequence[Draw] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`jlora.kernels.topk.log_softmax_topk` of the head's logits.

    No logits are written but those of rows whose token is drawn, some rows at a time.

    Args:
        hidden: (rows, C) float32.
        head: address of the head's packed weight, or of its floats (words, C).
        k: how many; V where the vocabulary V is smaller.
        cap: of the logits, see `jlora.models.head.LanguageHead`.
        words: of a head of floats; 0: it is packed. Not on a GPU, which has the first edits alone
            and draws nothing.
    """
    rows, k = len(hidden), min(k, words or structs.Weight.from_address(head).n)
    if on_gpu():
        given = (biased, allowed, draws)
        if words or any(each is not None for each in given) or np.ndim(penalty):
            raise ValueError("the GPU's head has neither floats nor draws nor these edits")
        values, ids = np.empty((rows, k), np.float32), np.empty((rows, k), np.int32)
        lists = [np.ascontiguousarray(rectangle(lists, rows)) for lists in (penalised, banned)]
        run("head_topk_op", [hidden, *lists], [values, ids], penalty, cap or 0, integers=[head])
        return values, ids
    edits = edit_arrays(rows, banned, penalised, penalty, biased, biases, allowed)
    numbers = (cap or 0, allowed is not None)
    inputs = [hidden, *edits]
    return run_topk("head_topk_op", inputs, rows, k, draws, *numbers, integers=[head, words])


def head_logits(
    hidden: np.ndarray, head: int, cap: float | None = None, words: int = 0
) -> np.ndarray:
    """The logits of each row, (rows, V) float32, whichever rows stand beside it.

    Args:
        hidden: (rows, C) float32.
        head, cap, words: see `head_topk`.
    """
    size = words or structs.Weight.from_address(head).n
    logits = np.empty((len(hidden), size), np.float32)
    run("head_logits_op", [hidden], [logits], cap or 0, integers=[head, words])
    return logits


def head_logprobs(
    hidden: np.ndarray, targets: np.ndarray, head: int, cap: float | None = None, words: int = 0
) -> np.ndarray:
    """The log-probability of a target of each row, (rows,) float32; NaN of one that is no word.

    Args:
        hidden: (rows, C) float32.
        targets: (rows,) int32.
        head, cap, words: see `head_topk`.
    """
    values = np.empty(len(hidden), np.float32)
    run("head_logprobs_op", [hidden, targets], [values], cap or 0, integers=[head, words])
    return values
