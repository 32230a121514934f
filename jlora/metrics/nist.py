"""NIST (Doddington 2002), corpus level, as the E2E challenge computes it."""

from __future__ import annotations

import math
from collections import Counter

from jlora.metrics.ngrams import matches, ngram_counts

MAX_ORDER = 5
# Makes the penalty one half where the hypotheses have two thirds of the references' mean length.
BETA = -math.log(0.5) / math.log(1.5) ** 2


def nist(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Corpus NIST-5 of tokenised sentences: matched n-grams weighted by how informative they are.

    Args:
        hypotheses: one list of words for each input.
        references: for each input the list of its references, each a list of words.

    Reference implementation: tuetschek/e2e-metrics with ``-p``, which differs from mteval-v13a.pl
    where inputs have different numbers of references.
    """
    # Occurrences of every n-gram in all references; the empty n-gram counts the words.
    occurrences: Counter = Counter()
    for group in references:
        for words in group:
            occurrences[()] += len(words)
            for n in range(1, MAX_ORDER + 1):
                occurrences.update(ngram_counts(words, n))

    information = [0.0] * MAX_ORDER
    possible = [0] * MAX_ORDER
    reference_length = 0.0
    for hypothesis, group in zip(hypotheses, references):
        reference_length += sum(len(words) for words in group) / len(group)
        for index in range(MAX_ORDER):
            # As in the reference script, a sentence of fewer than n words counts negatively.
            possible[index] += len(hypothesis) - index
            for ngram, count in matches(hypothesis, group, index + 1).items():
                information[index] += count * math.log2(
                    occurrences[ngram[:-1]] / occurrences[ngram]
                )

    # The reference script divides by zero where the hypotheses have no n-gram of a length.
    total = sum(info / count for info, count in zip(information, possible) if count)
    ratio = sum(map(len, hypotheses)) / reference_length
    penalty = 1.0 if ratio >= 1 else math.exp(-BETA * math.log(ratio) ** 2)
    return penalty * total
