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
    penalty: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best tokens of each row, best first, with their log-probabilities.

    Args:
        logits: (rows, V) float32.
        k: how many; V where V is smaller.
        banned: token ids of each row whose probability becomes 0, lists or an int array; ids
            below 0 are skipped. The rest is renormalised: microsoft/LoRA, too, sets logits to -inf
            before its softmax.
        penalised: token ids of each row whose logit is multiplied by ``penalty`` where it is
            negative and divided by it where not (CTRL, arXiv 1909.05858), before the bans; an id
            given twice is penalised once.
        penalty: see ``penalised``.

    Returns:
        values (rows, min(k, V)) float32 and ids (rows, min(k, V)) int32. Equal logits stand in the
        order of their ids; tokens of probability 0 have -inf; a row with NaN or +inf gives NaN.
    """
    rows, size = logits.shape
    k = min(k, size)
    if k > LARGEST_K or problem() is not None or not has("topk_op"):
        return log_softmax_topk_numpy(logits.numpy(), k, banned, penalised, penalty)
    edits = [jt.array(rectangle(lists, rows)) for lists in (penalised, banned)]
    values, ids = operator(
        [(rows, k), (rows, k)],
        ["float32", "int32"],
        [logits.float32(), *edits],
        "topk_op",
        penalty,
    )
    return values.numpy(), ids.numpy()


def rectangle(lists: Sequence[Sequence[int]] | None, rows: int) -> np.ndarray:
    """Lists of ids -> (rows, longest) int32, filled up with -1; Jittor wants no empty Vars."""
    if isinstance(lists, np.ndarray) and lists.size:
        return lists.astype(np.int32)
    width = max([1, *map(len, lists)]) if lists is not None else 1
    result = np.full((rows, width), -1, dtype=np.int32)
    if lists is not None:
        for row, ids in enumerate(lists):
            result[row, : len(ids)] = ids
    return result


def log_softmax_topk_numpy(
    logits: np.ndarray,
    k: int,
    banned: Sequence[Sequence[int]] | None = None,
    penalised: Sequence[Sequence[int]] | None = None,
    penalty: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """`log_softmax_topk` in plain numpy: its definition, and the way for a large k."""
    logits = np.array(logits, dtype=np.float32)
    bad = (np.isnan(logits) | np.isposinf(logits)).any(1)
    logits[bad] = 0
    logits[logits <= _LOWEST] = -np.inf
    for row in range(len(logits)):
        if penalised is not None:
            ids = np.unique(_real(penalised[row]))
            x = logits[row, ids]
            factor = np.float32(penalty)
            logits[row, ids] = np.where(x < 0, x * factor, x / factor)
        if banned is not None:
            logits[row, _real(banned[row])] = -np.inf
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]  # stable: equal ones in order of id
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = logits.max(1, keepdims=True).astype(np.float64)
        shift[np.isneginf(shift)] = 0
        log_sum = np.log(np.exp(logits - shift).sum(1, keepdims=True))
        values = np.take_along_axis(logits, ids, axis=1) - shift - log_sum
    values[np.isneginf(np.take_along_axis(logits, ids, axis=1))] = -np.inf
    values[bad] = np.nan
    return values.astype(np.float32), ids.astype(np.int32)


def _real(ids: Sequence[int]) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    return ids[ids >= 0]
