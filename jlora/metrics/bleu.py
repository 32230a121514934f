"""BLEU (Papineni et al. 2002), corpus level, as the E2E challenge computes it."""

from __future__ import annotations

import math

from jlora.metrics.ngrams import matches

MAX_ORDER = 4


def bleu(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus BLEU-4 between 0 and 1 of tokenised sentences.

    Args:
        hypotheses: one list of words for each input.
        references: for each input the list of its references, each a list of words.

    Reference implementation: tuetschek/e2e-metrics with ``-p``. Where two reference lengths are
    equally near, the shorter one counts for the brevity penalty.
    """
    hits = [0] * MAX_ORDER
    possible = [0] * MAX_ORDER
    hypothesis_length = reference_length = 0
    for hypothesis, group in zip(hypotheses, references):
        length = len(hypothesis)
        for index in range(MAX_ORDER):
            hits[index] += sum(matches(hypothesis, group, index + 1).values())
            # As in the reference script, a sentence of fewer than n words counts negatively.
            possible[index] += length - index
        hypothesis_length += length
        reference_length += min((abs(len(words) - length), len(words)) for words in group)[1]

    # The floors only keep the logarithm defined where there are no hits or no n-grams at all.
    log_precision = sum(
        math.log(max(hit, 1e-15) / max(total, 1e-9)) for hit, total in zip(hits, possible)
    )
    brevity_penalty = 1.0
    if hypothesis_length <= reference_length:
        brevity_penalty = math.exp(1 - reference_length / hypothesis_length)
    return brevity_penalty * math.exp(log_precision / MAX_ORDER)
