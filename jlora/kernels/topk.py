"""The k best tokens of each row of logits, with their log-probabilities, in one operator.

Decoding needs a handful of tokens out of 50,000. `log_softmax_topk` reads each row once from
memory, applies the row's bans and repetition penalty, and returns only (rows, k) numbers; Jittor's
own log_softmax followed by topk sorts whole rows and takes a second for 320 beams.
`log_softmax_topk_numpy` is its plain twin, the definition of what is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.kernels.native import has, operator, problem
from jlora.system.runtime import jt

LARGEST_K = 1024  # the operator inserts into a sorted list, which is slow for a larger k

_LOWEST = np.finfo(np.float32).min


def log_softmax_topk(
    logits: jt.Var,
    k: int,
    banned: Sequence[Sequence[int]] | None = None,
    penalised: Sequence[Sequence[int]] | None = None,
    penalty: float | np.ndarray = 1.0,
    biased: Sequence[Sequence[int]] | None = None,
    biases: Sequence[Sequence[float]] | None = None,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best tokens of each row, best first, with their log-probabilities.

    Logits are edited in this order: penalised, biased, allowed, banned; ids outside the vocabulary
    are skipped.

    Args:
        logits: (rows, V) float32.
        k: how many; V where V is smaller.
        banned: token ids of each row whose probability becomes 0, lists or an int array; ids
            below 0 are skipped. The rest is renormalised: microsoft/LoRA, too, sets logits to -inf
            before its softmax.
        penalised: token ids of each row whose logit is multiplied by ``penalty`` where it is
            negative and divided by it where not (CTRL, arXiv 1909.05858); an id given twice is
            penalised once.
        penalty: see ``penalised``; of all rows, or (rows,).
        biased: token ids of each row to whose logits ``biases`` are added; of an id given twice
            both are.
        biases: as many finite numbers for each row.
        allowed: (rows, ceil(V / 32)) int32, bit i % 32 of number i // 32 says whether token i may
            come; fewer numbers forbid what they lack. All others have probability 0.

    Returns:
        values (rows, min(k, V)) float32 and ids (rows, min(k, V)) int32. Equal logits stand in the
        order of their ids; tokens of probability 0 have -inf; a row with NaN or +inf gives NaN.
    """
    rows, size = logits.shape
    k = min(k, size)
    if k > LARGEST_K or problem() is not None or not has("topk_op"):
        edits = (banned, penalised, penalty, biased, biases, allowed)
        return log_softmax_topk_numpy(logits.numpy(), k, *edits)
    edits = edit_arrays(rows, banned, penalised, penalty, biased, biases, allowed)
    values, ids = operator(
        [(rows, k), (rows, k)],
        ["float32", "int32"],
        [logits.float32(), *map(jt.array, edits)],
        "topk_op",
        allowed is not None,
    )
    return values.numpy(), ids.numpy()


def edit_arrays(
    rows: int, banned=None, penalised=None, penalty=1.0, biased=None, biases=None, allowed=None
) -> list[np.ndarray]:
    """Edits of `log_softmax_topk` as the operators take them.

    Raises:
        ValueError: lists or arrays for another number of rows, or a bias that is not finite.
    """
    bits = np.full((rows, 1), -1, np.int32) if allowed is None else np.asarray(allowed)
    added = _rectangle([] if biases is None else biases, rows, 0, np.float32)
    arrays = [
        rectangle(penalised, rows),
        np.ascontiguousarray(np.broadcast_to(np.asarray(penalty, np.float32), (rows,))),
        rectangle(biased, rows),
        added,
        np.ascontiguousarray(bits).view(np.int32),
        rectangle(banned, rows),
    ]
    if any(len(array) != rows for array in arrays) or arrays[2].shape != added.shape:
        raise ValueError(f"edits of logits that do not fit {rows} rows")
    if not np.isfinite(added).all():
        raise ValueError("a bias of logits that is not finite")
    return arrays


def rectangle(lists: Sequence[Sequence[int]] | None, rows: int) -> np.ndarray:
    """Lists of ids -> (rows, longest) int32, filled up with -1; Jittor wants no empty Vars."""
    if isinstance(lists, np.ndarray) and lists.size:
        return np.ascontiguousarray(lists, np.int32)
    return _rectangle([] if lists is None else lists, rows, -1, np.int32)


def _rectangle(lists: Sequence[Sequence], rows: int, fill: float, dtype: type) -> np.ndarray:
    result = np.full((max(rows, len(lists)), max([1, *map(len, lists)])), fill, dtype)
    for row, numbers in enumerate(lists):
        result[row, : len(numbers)] = numbers
    return result


def log_softmax_topk_numpy(
    logits: np.ndarray,
    k: int,
    banned: Sequence[Sequence[int]] | None = None,
    penalised: Sequence[Sequence[int]] | None = None,
    penalty: float | np.ndarray = 1.0,
    biased: Sequence[Sequence[int]] | None = None,
    biases: Sequence[Sequence[float]] | None = None,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`log_softmax_topk` in plain numpy: its definition, and the way for a large k."""
    logits = np.array(logits, dtype=np.float32)
    bad = (np.isnan(logits) | np.isposinf(logits)).any(1)
    logits[bad] = 0
    logits[logits <= _LOWEST] = -np.inf
    rows, size = logits.shape
    factors = np.broadcast_to(np.asarray(penalty, np.float32), (rows,))
    for row in range(rows):
        if penalised is not None:
            ids = np.unique(_real(penalised[row], size))
            x = logits[row, ids]
            logits[row, ids] = np.where(x < 0, x * factors[row], x / factors[row])
        for token, bias in zip(biased[row], biases[row]) if biased is not None else ():
            if 0 <= token < size:
                logits[row, token] += np.float32(bias)
        if allowed is not None:
            bits = np.ascontiguousarray(allowed[row]).view(np.uint8)
            free = np.unpackbits(bits, count=size, bitorder="little")
            logits[row, free == 0] = -np.inf
        if banned is not None:
            logits[row, _real(banned[row], size)] = -np.inf
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]  # stable: equal ones in order of id
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = logits.max(1, keepdims=True).astype(np.float64)
        shift[np.isneginf(shift)] = 0
        log_sum = np.log(np.exp(logits - shift).sum(1, keepdims=True))
        values = np.take_along_axis(logits, ids, axis=1) - shift - log_sum
    values[np.isneginf(np.take_along_axis(logits, ids, axis=1))] = -np.inf
    values[bad] = np.nan
    return values.astype(np.float32), ids.astype(np.int32)


def _real(ids: Sequence[int], size: int) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < size)]
