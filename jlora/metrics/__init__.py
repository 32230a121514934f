"""Scores of texts against references, by the names that tasks and recipes use.

BLEU, NIST, METEOR, ROUGE_L, CIDEr:
    the E2E NLG challenge's, as its official script prints them (tuetschek/e2e-metrics with ``-p``).
multi-BLEU, METEOR-WebNLG, TER, chrF++:
    WebNLG's and DART's, as microsoft/LoRA has them from WebNLG's GenerationEval: of lower-case text
    split at punctuation, with the first six references (`jlora.metrics.generation_eval`).
sacreBLEU:
    sacrebleu's standard form, of the texts as they are.

All are fractions (0 to 1), except NIST (no upper bound), CIDEr (0 to 10) and TER (0 is best, above
1 possible). Tasks that are a choice between a few answers: `jlora.metrics.accuracy`.

Every exchange with Java has a time limit: a broken Java is an error within seconds, not a hang.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence

from jlora.metrics.inputs import read_answers, read_hypotheses, read_references
from jlora.metrics.java import find_java
from jlora.metrics.meteor import Meteor
from jlora.metrics.registry import TABLE, Metric, find_metric, metric_names, register_metric
from jlora.metrics.texts import Texts, each
from jlora.system.errors import UserError

__all__ = [
    "E2E_METRICS",
    "METRICS",
    "Metric",
    "Texts",
    "check_metrics",
    "evaluate",
    "evaluate_e2e",
    "evaluate_parts",
    "find_java",
    "find_metric",
    "read_answers",
    "read_hypotheses",
    "read_references",
    "register_metric",
]


E2E_METRICS = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
_computed = [metric.key for metric in TABLE if metric.score is not None]
METRICS = (*E2E_METRICS, *(key for key in _computed if key not in E2E_METRICS))


def check_metrics(names: Sequence[str]) -> str | None:
    """Check that these scores can be computed on this machine, before hours of training.

    Returns:
        the path of the Java that they need; None if they need none.

    Raises:
        UserError: no name is given, a name is unknown (shows the nearest), or Java does not work.
    """
    check_names(names)
    return find_java() if any(metric.java for metric in _found(names).values()) else None


def _found(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of checked names."""
    return {name: metric for name in names if (metric := find_metric(name)) is not None}


def check_names(names: Sequence[str]) -> None:
    """Raises: UserError: no name is given, or a name is unknown (shows the nearest)."""
    every = list(dict.fromkeys([*METRICS, *metric_names()]))
    if isinstance(names, str) or not names:
        raise UserError(f"no list of metrics: {names!r}; there are {', '.join(every)}")
    for name in names:
        metric = find_metric(name)
        if metric is None or metric.score is None:
            lower = {known.lower(): known for known in every}
            near = difflib.get_close_matches(str(name).lower(), lower, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(lower[one] for one in near)}?"
            raise UserError(
                f"no metric {name!r}; {hint if near else 'there are ' + ', '.join(every)}"
            )


def evaluate(
    names: Sequence[str], hypotheses: list[str], references: list[list[str]]
) -> dict[str, float]:
    """Score texts by the named metrics.

    Args:
        names: keys of metrics, see `jlora.metrics.registry`.
        hypotheses: one text for each input; an empty text is scored, not refused.
        references: for each input a list of one or more reference texts. An empty one beside
            others has no effect on any score.

    Returns:
        the scores in the order of ``names``, not rounded.

    Raises:
        UserError: a name is unknown, the numbers of hypotheses and groups differ, there are none,
            a group is empty, or Java does not work.
    """
    return evaluate_parts(names, hypotheses, references, [None] * len(hypotheses))


def evaluate_e2e(hypotheses: list[str], references: list[list[str]]) -> dict[str, float]:
    """The five scores of the E2E challenge; see `evaluate`."""
    return evaluate(E2E_METRICS, hypotheses, references)


def evaluate_parts(
    names: Sequence[str],
    hypotheses: list[str],
    references: list[list[str]],
    parts: Sequence[str | None],
) -> dict[str, float]:
    """Score all texts together, and then each part of the data by itself; see `evaluate`.

    Args:
        parts: for each input the part that it belongs to ("seen", "unseen"), or None.

    Returns:
        the scores of all under the plain names, then those of each part under ``NAME/part``
        (``TER/unseen``), parts in the order in which they are first seen.

    Raises:
        UserError: as `evaluate`; the number of parts differs; or a part's name is empty.
    """
    _check(hypotheses, references, parts)
    java = check_metrics(names)
    hypotheses, references = each(_one_line, hypotheses, references)
    references = [without_empty(group) for group in references]
    everything = range(len(hypotheses))
    chosen: dict[str, Sequence[int]] = {"": everything}
    for part in dict.fromkeys(part for part in parts if part is not None):
        chosen[f"/{part}"] = [index for index in everything if parts[index] == part]

    metrics = _found(names)
    # METEOR loads its tables while the other scores are computed; below it is therefore last.
    ordered = sorted(metrics.values(), key=lambda metric: metric.meteor)
    scores = {}
    with contextlib.ExitStack() as stack:
        meteor = stack.enter_context(Meteor(java)) if ordered[-1].meteor else None
        for suffix, indices in chosen.items():
            texts = Texts(
                [hypotheses[index] for index in indices],
                [references[index] for index in indices],
                java,
                meteor,
            )
            found = {each.key: float(each.score(texts)) for each in ordered if each.score}
            scores.update({name + suffix: found[name] for name in names})
    return scores


def _check(hypotheses: list[str], references: list[list[str]], parts: Sequence[str | None]) -> None:
    if len(hypotheses) != len(references):
        hint = "give one hypothesis for each group of references"
        if all(len(group) == 1 for group in references):
            hint += " (a reference file without empty lines has one reference for each input)"
        if len(hypotheses) < len(references):
            hint += "; in a table of references the rows of one input must follow one another"
        raise UserError(
            f"{len(hypotheses)} hypotheses but {len(references)} groups of references; {hint}"
        )
    if not hypotheses:
        raise UserError("no hypotheses to score; give at least one")
    for number, group in enumerate(references, start=1):
        if not group:
            raise UserError(f"input {number} has no references; give at least one")
    if len(parts) != len(hypotheses):
        raise UserError(f"{len(parts)} parts for {len(hypotheses)} inputs; give one (or None) each")
    if "" in parts:
        raise UserError(f"input {parts.index('') + 1}: the name of its part is empty; give None")


def without_empty(group: list[str]) -> list[str]:
    """The references that have any text; one empty reference where none has.

    Lists padded with empty references, as GenerationEval's files are, so have the scores of the
    lists without them in every metric.
    """
    return [text for text in group if text.strip()] or [""]


def _one_line(text: str) -> str:
    """The text without line breaks, which would shift the lines of the Java tokeniser."""
    return " ".join(text.splitlines())
