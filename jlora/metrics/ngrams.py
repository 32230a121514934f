"""Words and n-gram counts as NIST's mteval-v13a defines them, for BLEU and NIST."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

# Without apostrophe, comma, hyphen and full stop: whether these separate depends on digits.
PUNCTUATION = re.compile(
    "([" + re.escape("".join(sorted(set(string.punctuation) - set("',-.")))) + "])"
)
POINT_AFTER_NON_DIGIT = re.compile(r"([^0-9])([.,])")
POINT_BEFORE_NON_DIGIT = re.compile(r"([.,])([^0-9])")
DASH_AFTER_DIGIT = re.compile(r"([0-9])(-)")
# The order matters: "&amp;lt;" becomes "<".
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokenize(text: str) -> list[str]:
    """Split one line into lower-case words, as mteval-v13a does for European languages.

    An empty line is the single empty word ``[""]``: the E2E challenge's script counts it so, and
    an empty hypothesis therefore has length 1.
    """
    text = text.replace("<skipped>", "")
    for entity, character in ENTITIES:
        text = text.replace(entity, character)
    text = PUNCTUATION.sub(r" \1 ", f" {text} ")
    text = POINT_AFTER_NON_DIGIT.sub(r"\1 \2 ", text)
    text = POINT_BEFORE_NON_DIGIT.sub(r" \1 \2", text)
    text = DASH_AFTER_DIGIT.sub(r"\1 \2 ", text)
    return [word.lower() for word in text.split()] or [""]


def ngram_counts(words: list[str], n: int) -> Counter:
    """How often each n-gram (a tuple of n words) occurs in one sentence."""
    return Counter(zip(*(words[start:] for start in range(n))))


def matches(hypothesis: list[str], references: Iterable[list[str]], n: int) -> Counter:
    """Counts of the hypothesis's n-grams that some reference has too.

    Each count is limited to that of the reference that has the n-gram most often (clipped counts).
    """
    most: Counter = Counter()
    for reference in references:
        most |= ngram_counts(reference, n)
    return ngram_counts(hypothesis, n) & most
