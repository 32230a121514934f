"""The E2E NLG challenge's metrics: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

The numbers are those of the official script (tuetschek/e2e-metrics with ``-p``); Java is watched,
so a broken one is an error within seconds.
"""

from __future__ import annotations

from jlora.errors import UserError
from jlora.metrics.bleu import bleu
from jlora.metrics.cider import cider
from jlora.metrics.inputs import read_hypotheses, read_references
from jlora.metrics.java import find_java
from jlora.metrics.meteor import Meteor
from jlora.metrics.ngrams import tokenize
from jlora.metrics.nist import nist
from jlora.metrics.ptb import ptb_tokenize
from jlora.metrics.rouge import rouge_l

__all__ = ["E2E_METRICS", "evaluate_e2e", "find_java", "read_hypotheses", "read_references"]

E2E_METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")


def evaluate_e2e(hypotheses: list[str], references: list[list[str]]) -> dict[str, float]:
    """Score texts by the five metrics of the E2E challenge.

    Args:
        hypotheses: one text an input; an empty text is scored, not refused.
        references: for each input its one or more reference texts.

    Returns:
        BLEU (0 to 1), NIST, METEOR (0 to 1), ROUGE_L (0 to 1) and CIDEr (0 to 10), not rounded.

    Raises:
        UserError: the numbers of hypotheses and groups differ, there are none, a group is empty,
            or Java does not work.
    """
    _check(hypotheses, references)
    hypotheses = [_one_line(text) for text in hypotheses]
    references = [[_one_line(text) for text in group] for group in references]
    java = find_java()
    with Meteor(java) as meteor:  # reads its tables while the others are computed
        words = [tokenize(text) for text in hypotheses]
        reference_words = [[tokenize(text) for text in group] for group in references]
        scores = {"BLEU": bleu(words, reference_words), "NIST": nist(words, reference_words)}

        # Two runs, as in the official script: the tokeniser looks ahead past line ends.
        flat = iter(ptb_tokenize([text for group in references for text in group], java))
        references = [[next(flat) for _ in group] for group in references]
        hypotheses = ptb_tokenize(hypotheses, java)
        scores["ROUGE_L"] = rouge_l(hypotheses, references)
        scores["CIDEr"] = cider(hypotheses, references)
        scores["METEOR"] = meteor.score(hypotheses, references)
    return {name: float(scores[name]) for name in E2E_METRICS}


def _check(hypotheses: list[str], references: list[list[str]]) -> None:
    if len(hypotheses) != len(references):
        hint = "give one hypothesis for each group of references"
        if all(len(group) == 1 for group in references):
            hint += " (a reference file without empty lines has one reference for each input)"
        raise UserError(
            f"{len(hypotheses)} hypotheses but {len(references)} groups of references; {hint}"
        )
    if not hypotheses:
        raise UserError("no hypotheses to score; give at least one")
    for number, group in enumerate(references, start=1):
        if not group:
            raise UserError(f"input {number} has no references; give at least one")


def _one_line(text: str) -> str:
    """The text without line breaks, which would shift the lines of the Java tokeniser."""
    return " ".join(text.splitlines())
