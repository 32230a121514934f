"""The prompts of the decoding benchmarks, and what a side says of its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

Batch = dict[int, list[int]]  # number of a prompt -> its tokens


class Prompts:
    """The token lists in ``spec["prompts"]``, in turn."""

    def __init__(self, spec: dict):
        self.all = json.loads(Path(spec["prompts"]).read_text())
        self.ends, self.done = set(spec["ends"]), 0

    def next(self, many: int) -> Batch:
        """The prompts after those given before; the first ones again after the last."""
        numbers = [(self.done + i) % len(self.all) for i in range(many)]
        self.done += many
        return {number: self.all[number] for number in numbers}

    def first(self, many: int) -> Batch:
        return {number: self.all[number] for number in range(many)}

    def said(self, batch: Batch, texts: Iterable[Sequence[int]], length: int = 0) -> dict:
        """Inputs, tokens without ends, and answers of a round.

        Raises:
            RuntimeError: a text has not the given length.
        """
        texts = list(texts)
        for text in texts if length else ():
            if len(text) != length:
                raise RuntimeError(f"wrote {len(text)} tokens instead of {length}")
        answers = {str(i): self.until_end(text) for i, text in zip(batch, texts)}
        tokens = sum(map(len, answers.values()))
        return {"inputs": len(batch), "tokens": tokens, "answers": answers}

    def until_end(self, text: Sequence[int]) -> list[int]:
        """The tokens before the first end."""
        tokens = [int(token) for token in text]
        ends = [i for i, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0]] if ends else tokens
