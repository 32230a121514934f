"""Tasks that are a choice between a few answers: finding the answer in a text, and accuracy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from jlora.system.errors import UserError

Z_95 = 1.959963984540054  # the standard normal distribution's 97.5 % quantile
UNPARSEABLE = "unparseable"

_WORD = re.compile(r"[^\W_]+")


def parse_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a freely written text begins with, or None.

    Only letters and digits are compared, without regard to case, and the choice has to end at the
    end of a word. With the choices "true" and "false", ``" True, because ..."`` gives true, and
    ``"truthful"``, ``"It is true"`` and ``"yes"`` give None. If one choice is the beginning of
    another ("New", "New York"), the longer one wins.

    Raises:
        UserError: there are no two different choices.
    """
    words = _words(text)
    best = None
    for choice, its_words in _checked(choices).items():
        fits = words[: len(its_words)] == its_words
        if fits and (best is None or len(its_words) > len(_words(best))):
            best = choice
    return best


def accuracy(
    predicted: Sequence[str | None], gold: Sequence[str], choices: Sequence[str]
) -> dict[str, float]:
    """How many answers are right.

    Args:
        predicted: one of ``choices`` for each input, None for an answer that is none of them, which
            counts as wrong.
        gold: the right answers.
        choices: all possible answers.

    Returns:
        - ``accuracy``: share of right answers; ``accuracy_low`` and ``accuracy_high``: the ends of
          its 95 % interval (Wilson 1927).
        - ``majority``: the share of the most common right answer, which is the accuracy of a model
          that always gives this answer.
        - ``unparseable``: how many predictions are None (an int).
        - ``confusion/GOLD->PREDICTED``: the number of inputs with the right answer GOLD for which
          PREDICTED was given (ints, for every pair); ``confusion/GOLD->unparseable`` for None.

    Raises:
        UserError: the numbers of answers differ, there are none, one is none of the choices, or
            there are no two different choices.
    """
    _checked(choices)
    if len(predicted) != len(gold):
        raise UserError(
            f"{len(predicted)} predicted answers but {len(gold)} right ones; give one an input"
        )
    if not gold:
        raise UserError("no answers to score; give at least one")
    for kind, answers in (("right", gold), ("predicted", predicted)):
        for number, answer in enumerate(answers, start=1):
            if answer not in choices and (answer is not None or kind == "right"):
                raise UserError(
                    f"{kind} answer {number} is {answer!r}, which is none of {', '.join(choices)}"
                )

    pairs = Counter(zip(gold, predicted))
    right = sum(pairs[choice, choice] for choice in choices)
    low, high = wilson_interval(right, len(gold))
    scores = {
        "accuracy": right / len(gold),
        "accuracy_low": low,
        "accuracy_high": high,
        "majority": max(Counter(gold).values()) / len(gold),
        "unparseable": sum(answer is None for answer in predicted),
    }
    for answer in choices:
        for given in (*choices, None):
            label = UNPARSEABLE if given is None else given
            scores[f"confusion/{answer}->{label}"] = pairs[answer, given]
    return scores


def wilson_interval(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The confidence interval of a share of which ``right`` of ``total`` were seen (Wilson 1927).

    It holds the true shares p with ``|right / total - p| <= z sqrt(p (1 - p) / total)``, stays
    between 0 and 1, and is not empty even where all or none are right.
    """
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _checked(choices: Sequence[str]) -> dict[str, list[str]]:
    """The words of each choice."""
    if isinstance(choices, str) or len(choices) < 2:
        raise UserError(f"choices {choices!r}: give a list of at least two answers")
    words = {choice: _words(choice) for choice in choices}
    if len({tuple(one) for one in words.values()}) < len(choices) or [] in words.values():
        raise UserError(
            f"choices {', '.join(choices)}: their letters and digits have to differ, in any case"
        )
    return words
