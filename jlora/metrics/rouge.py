"""ROUGE-L (Lin 2004), the MS-COCO variant."""

from __future__ import annotations


def rouge_l(hypotheses: list[str], references: list[list[str]]) -> float:
    """Mean ROUGE-L of PTB-tokenised sentences, between 0 and 1.

    The F-measure with beta 1.2 of the longest common subsequence's best precision and best recall
    over the references. Computed by pycocoevalcap, the code that the E2E challenge uses.
    """
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    scores = [scorer.calc_score([text], group) for text, group in zip(hypotheses, references)]
    return sum(scores) / len(scores)
