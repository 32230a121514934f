"""CIDEr (Vedantam et al. 2015): the CIDEr-D variant with clipping and a length penalty."""

from __future__ import annotations


def cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus CIDEr of PTB-tokenised sentences, between 0 and 10.

    The inverse document frequencies are those of these references, so a single input always scores
    0. Computed by pycocoevalcap, the code that the E2E challenge uses.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    if not any(text.split() for group in references for text in group):
        return 0.0  # no n-gram to match, which pycocoevalcap does not expect
    scorer = CiderScorer(n=4, sigma=6.0)
    for text, group in zip(hypotheses, references):
        scorer += (text, group)
    return float(scorer.compute_score()[0])
