"""Exact match: how many texts are one of their references, word for word."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of texts that equal a reference; only the amount of white space may differ."""
    equal = [
        " ".join(text.split()) in {" ".join(each.split()) for each in group}
        for text, group in zip(hypotheses, references)
    ]
    return sum(equal) / len(equal)
