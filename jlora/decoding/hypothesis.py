"""`Hypothesis`: one text that was generated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Hypothesis:
    """One generated text.

    Attributes:
        ids: the generated tokens, the end token included where ``finished``.
        logprob: the sum of their log-probabilities, natural logarithm.
        length: their number.
        finished: whether the last one is an end token.
        text: what they say, without the end token, stripped; empty before it is decoded.
    """

    ids: list[int]
    logprob: float
    length: int
    finished: bool
    text: str = ""

    @property
    def text_ids(self) -> list[int]:
        """The tokens without the end token."""
        return self.ids[:-1] if self.finished else self.ids

    def score(self, length_penalty: float) -> float:
        """``logprob / length ** length_penalty``; higher is better.

        In float32 as microsoft/LoRA computes it, so that ties fall alike.
        """
        return float(np.float32(self.logprob) / np.float32(self.length**length_penalty))
