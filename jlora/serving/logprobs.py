"""Log-probabilities in the two forms that OpenAI's protocol has for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jlora.serving.answers import Score
from jlora.serving.grammar import Grammars

LEAST = -9999.0  # OpenAI's for tokens that can't come: JSON has no infinity


class Scores:
    """Writes tokens with their log-probabilities."""

    def __init__(self, grammars: Grammars):
        self._bytes = functools.lru_cache(maxsize=100_000)(grammars.token_bytes)

    def of_completion(self, scores: Sequence[Score], alternatives: int) -> dict[str, Any]:
        """The form of /v1/completions: a list for each kind of value."""
        tops: list[dict[str, float] | None] | None = [] if alternatives else None
        for score in scores if alternatives else ():
            if score.logprob is None:
                tops.append(None)
                continue
            # The likeliest first; two tokens may have one text. The chosen one is always there.
            found: dict[str, float] = {}
            for token, logprob in (*score.top, (score.token, score.logprob)):
                found.setdefault(self._name(token), _finite(logprob))
            tops.append(found)
        return {
            "tokens": [self._name(score.token) for score in scores],
            "token_logprobs": [_finite(score.logprob) for score in scores],
            "top_logprobs": tops,
            "text_offset": [score.offset for score in scores],
        }

    def of_chat(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The form of /v1/chat/completions: an object for each token."""
        content = [
            {
                **self._entry(score.token, score.logprob),
                "top_logprobs": [self._entry(*each) for each in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        value = self._bytes(token)
        return {
            "token": self._name(token, ""), "logprob": _finite(logprob), "bytes": list(value),
        }  # fmt: skip

    def _name(self, token: int, prefix: str = "bytes:") -> str:
        """The text of a token; where it is a part of a character, its bytes."""
        value = self._bytes(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in value)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
