"""Spans of a text's characters as spans of its tokens, and examples cut to a length by them."""

from __future__ import annotations

from collections.abc import Sequence

from jlora.data.batches import TokenExample

Spans = list[tuple[int, int]]


def encode_spans(
    tokenizer, texts: Sequence[str], spans: Sequence[Spans]
) -> tuple[list[list[int]], list[Spans], list[bool]]:
    """Texts as tokens, and spans of their characters as spans of the tokens.

    A text becomes tokens as a whole. A token that holds characters on both sides of a span's
    beginning belongs to the span, one at its end does not.

    Returns:
        The ids of each text; its spans that have a token, as (first, past the last); and whether
        there was a token on both sides of an edge.
    """
    wholes = tokenizer.encode_batch(texts)
    edges = [
        sorted({0, len(text), *(edge for span in each for edge in span)})
        for text, each in zip(texts, spans)
    ]
    pieces = [
        [text[start:end] for start, end in zip(cuts, cuts[1:])] or [""]
        for text, cuts in zip(texts, edges)
    ]
    firsts = tokenizer.encode_batch([each[0] for each in pieces])
    others = iter(tokenizer.encode_after([piece for each in pieces for piece in each[1:]]))
    found, joined = [], []
    for text, whole, cuts, first, count, each in zip(texts, wholes, edges, firsts, pieces, spans):
        parts = [first, *(next(others) for _ in count[1:])]
        place, tokens = 0, {0: 0}
        for cut, part in zip(cuts[1:], parts):
            place += len(part)
            tokens[cut] = place
        apart = [token for part in parts for token in part] == whole
        broken = False
        if not apart:  # look at each edge by itself
            for cut in cuts[1:-1]:
                before = tokenizer.encode(text[:cut])
                tokens[cut] = _common(before, whole)
                broken |= tokens[cut] < len(before)
            tokens[len(text)] = len(whole)
        # The first token of all has nothing before it to be predicted from.
        inner = [(max(1, tokens[start]), tokens[end]) for start, end in each]
        found.append([(start, end) for start, end in inner if start < end])
        joined.append(broken)
    return wholes, found, joined


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    pairs = enumerate(zip(first, second))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def fit(
    ids: list[int],
    spans: Sequence[tuple[int, int]],
    longest: int,
    too_long: str = "cut",
    begin: Sequence[int] = (),
) -> TokenExample | None:
    """An example of at most ``longest`` input tokens; None: no answer fits.

    Of one that is too long the beginning goes, but for ``begin``, the begin token, and never a part
    of an answer: those that are still there whole, behind some of what came before, are trained.
    """
    cut = len(ids) - 1 - longest
    if cut <= 0:
        return _example(ids, spans, 0)
    if too_long == "drop":
        return None
    ids = ids[: spans[-1][1]]  # behind the last answer there is nothing to learn
    cut = len(ids) - 1 - longest
    if cut <= 0:
        return _example(ids, spans, 0)
    first, ids = _without_front(ids, cut, begin)
    kept = [(start, end) for start, end in spans if start > first]
    if not kept:
        return None
    return _example(ids, [(start - cut, end - cut) for start, end in kept], cut)


def fit_all(ids: list[int], longest: int, begin: Sequence[int] = ()) -> TokenExample:
    """An example of which every token is trained; one that is too long loses its beginning.

    ``begin``, the begin token, stays.
    """
    cut = max(0, len(ids) - 1 - longest)
    return TokenExample(_without_front(ids, cut, begin)[1] if cut else ids, 1, cut)


def _without_front(ids: list[int], cut: int, begin: Sequence[int]) -> tuple[int, list[int]]:
    """``ids`` without ``cut`` of the first behind ``begin``, and the first place that is left."""
    begin = list(begin) if ids[: len(begin)] == list(begin) else []
    first = cut + len(begin)
    return first, [*begin, *ids[first:]]


def _example(ids: list[int], spans: Sequence[tuple[int, int]], cut: int) -> TokenExample:
    whole = len(spans) == 1 and spans[0][1] == len(ids)
    return TokenExample(ids, spans[0][0], cut, () if whole else tuple(spans))
