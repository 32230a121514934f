"""Hypotheses and references in the forms that metrics need."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from jlora.metrics.generation_eval import MAX_REFERENCES, prepare, word_tokenize
from jlora.metrics.meteor import Meteor
from jlora.metrics.ngrams import tokenize
from jlora.metrics.ptb import ptb_tokenize


class Texts:
    """Hypotheses and references in the forms that metrics need, each computed at its first use.

    Attributes:
        hypotheses: one text for each input.
        references: for each input its reference texts.
        plain: both.
        java: path of the Java to use, where a metric needs one.
        meteor: METEOR's program, where a metric needs it.
    """

    def __init__(
        self,
        hypotheses: list[str],
        references: list[list[str]],
        java: str | None = None,
        meteor: Meteor | None = None,
    ) -> None:
        self.hypotheses, self.references = hypotheses, references
        self.plain = (hypotheses, references)
        self.java = java
        self.meteor = meteor

    @cached_property
    def mteval(self) -> tuple[list, list]:
        """Lower-case words, split as mteval-v13a does."""
        return each(tokenize, *self.plain)

    @cached_property
    def ptb(self) -> tuple[list, list]:
        """Sentences of the Penn Treebank tokeniser."""
        hypotheses, references = self.plain
        # Two runs, as in the official script: the tokeniser looks ahead past line ends.
        flat = iter(ptb_tokenize([text for group in references for text in group], self.java))
        references = [[next(flat) for _ in group] for group in references]
        return ptb_tokenize(hypotheses, self.java), references

    @cached_property
    def prepared(self) -> tuple[list, list]:
        """Texts as microsoft/LoRA writes them for GenerationEval."""
        hypotheses, references = self.plain
        return each(prepare, hypotheses, [group[:MAX_REFERENCES] for group in references])

    @cached_property
    def nltk(self) -> tuple[list, list]:
        """Words of NLTK's tokeniser, of prepared texts."""
        return each(word_tokenize, *self.prepared)


def each(function: Callable[[Any], Any], hypotheses: list, references: list) -> tuple[list, list]:
    return (
        [function(text) for text in hypotheses],
        [[function(text) for text in group] for group in references],
    )
