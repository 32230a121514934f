"""The k best tokens of each row of logits, with their log-probabilities, in one operator.

Decoding needs a handful of tokens out of 50,000. `log_softmax_topk` reads each row once from
memory, applies the row's bans and repetition penalty, and returns only (rows, k) numbers; Jittor's
own log_softmax followed by topk sorts whole rows and takes a second for 320 beams. Where a token is
to be drawn, it is drawn there too. `log_softmax_topk_numpy` is its plain twin, the definition of
what is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jlora.kernels.native import has, operator, problem, run
from jlora.system.runtime import jt

LARGEST_K = 1024  # the operator inserts into a sorted list, which is slow for a larger k

_LOWEST = np.finfo(np.float32).min


class Draw(NamedTuple):
    """How a token is drawn among all of the vocabulary, likeliest first.

    Attributes:
        temperature: what logits are divided by; 0: the likeliest token.
        u: from 0 to 1, 1 excluded: which part of the probability of the tokens that are left it
            falls on.
        top_k: only the likeliest so many are left; 0: all.
        top_p: of these the likeliest that together have this probability.
        min_p: of these the ones that are so many times as likely as the likeliest.
    """

    temperature: float = 0.0
    u: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def place(self, logprobs: np.ndarray) -> int:
        """Which of all tokens' log-probabilities, (V,) in falling order, is drawn."""
        if self.temperature == 0:
            return 0
        relative = (logprobs[: self.top_k or None] - logprobs[0]).astype(np.float64)
        weights = np.exp(relative / self.temperature)
        cumulative = weights.cumsum()
        # The token that carries the sum over top_p still counts, so one is always left.
        count = int(cumulative.searchsorted(self.top_p * cumulative[-1])) + 1
        count = min(count, int((weights >= self.min_p).sum()))  # the likeliest weighs 1
        place = cumulative[:count].searchsorted(self.u * cumulative[count - 1], side="right")
        return min(int(place), count - 1)


def log_softmax_topk(
    logits: jt.Var | np.ndarray,
    k: int,
    banned: Sequence[Sequence[int]] | None = None,
    penalised: Sequence[Sequence[int]] | None = None,
    penalty: float | np.ndarray = 1.0,
    biased: Sequence[Sequence[int]] | None = None,
    biases: Sequence[Sequence[float]] | None = None,
    allowed: np.ndarray | None = None,
    draws: Sequence[Draw] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best tokens of each row, best first, with their log-probabilities.

    Logits are edited in this order: penalised, biased, allowed, banned; ids outside the vocabulary
    are skipped.

    Args:
        logits: (rows, V) float32; of an array they are found without Jittor.
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
        draws: of each row, how a token is drawn.

    Returns:
        values (rows, min(k, V)) float32 and ids (rows, min(k, V)) int32. Equal logits stand in the
        order of their ids; tokens of probability 0 have -inf; a row with NaN or +inf gives NaN.
        With ``draws`` the drawn token stands before them: (rows, 1 + min(k, V)).
    """
    rows, size = logits.shape
    k = min(k, size)
    if k > LARGEST_K or problem() is not None or not has("topk_op"):
        edits = (banned, penalised, penalty, biased, biases, allowed)
        array = logits if isinstance(logits, np.ndarray) else logits.numpy()
        return log_softmax_topk_numpy(array, k, *edits, draws)
    edits = edit_arrays(rows, banned, penalised, penalty, biased, biases, allowed)
    if isinstance(logits, np.ndarray) or draws is not None:
        array = logits if isinstance(logits, np.ndarray) else logits.float32().numpy()
        return run_topk("topk_op", [array, *edits], rows, k, draws, allowed is not None)
    values, ids = operator(
        [(rows, k), (rows, k)],
        ["float32", "int32"],
        [logits.float32(), *map(jt.array, edits)],
        "topk_op",
        allowed is not None,
    )
    return values.numpy(), ids.numpy()


def run_topk(
    function: str,
    inputs: Sequence[np.ndarray],
    rows: int,
    k: int,
    draws: Sequence[Draw] | None,
    *numbers: float,
    integers: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Run an operator that chooses the k best and may draw; see `log_softmax_topk`.

    Raises:
        ValueError: draws for another number of rows.
    """
    values, ids = np.empty((rows, k), np.float32), np.empty((rows, k), np.int32)
    if draws is None:
        run(function, inputs, [values, ids], *numbers, 0, integers=integers)
        return values, ids
    if len(draws) != rows:
        raise ValueError(f"{len(draws)} draws for {rows} rows")
    numbers_of = np.array(draws, np.float64).reshape(rows, len(Draw._fields))
    drawn = np.empty((rows, 1), np.float32), np.empty((rows, 1), np.int32)
    run(function, [*inputs, numbers_of], [values, ids, *drawn], *numbers, 1, integers=integers)
    return np.concatenate([drawn[0], values], 1), np.concatenate([drawn[1], ids], 1)


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
    given = [len(edit) for edit in (banned, penalised, biased, biases, allowed) if edit is not None]
    if any(n != rows for n in given) or arrays[2].shape != added.shape:
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
    draws: Sequence[Draw] | None = None,
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
    ids = np.argsort(-logits, axis=1, kind="stable")  # stable: equal ones in order of id
    ids = ids if draws is not None else ids[:, :k]
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = logits.max(1, keepdims=True).astype(np.float64)
        shift[np.isneginf(shift)] = 0
        log_sum = np.log(np.exp(logits - shift).sum(1, keepdims=True))
        values = np.take_along_axis(logits, ids, axis=1) - shift - log_sum
    values[np.isneginf(np.take_along_axis(logits, ids, axis=1))] = -np.inf
    values[bad] = np.nan
    values, ids = values.astype(np.float32), ids.astype(np.int32)
    if draws is None:
        return values, ids
    rows_of = zip(draws, values, strict=True)
    places = [0 if not row[0] > -np.inf else draw.place(row) for draw, row in rows_of]
    places = np.array([[place, *range(min(k, size))] for place in places])
    return np.take_along_axis(values, places, 1), np.take_along_axis(ids, places, 1)


def _real(ids: Sequence[int], size: int) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < size)]
