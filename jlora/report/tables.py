"""Scores and samples as text for the terminal and for Markdown."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlora.metrics.registry import TABLE, Metric, find_metric
from jlora.system.console import width_of
from jlora.system.errors import UserError

#: How scores are printed, in the order of their columns.
METRICS = TABLE
VALID_LOSS = Metric("valid_loss", "Valid. loss", 1, 3, lower_is_better=True)

# Intervals of other scores, and counts; the report shows them elsewhere.
_NO_SCORE = re.compile(r"(.+_(low|high)|confusion/.*|.*unparseable)")


@dataclass(frozen=True)
class Sample:
    """One input with the model's output; ``before`` and ``reference`` may be missing."""

    prompt: str
    after: str
    before: str | None = None
    reference: str | None = None


def metrics_of(*scores: Mapping[str, Any] | None) -> list[Metric]:
    """The metrics that occur in any of ``scores``: known ones in the paper's order, then others.

    A metric over a part of the test set (``multi-BLEU/unseen``) follows that over all of it. Values
    that are not numbers, and whole numbers (counts), are not scores.
    """
    present: dict[str, Metric] = {}
    for one in scores:
        for key, value in (one or {}).items():
            whole, _, part = key.partition("/")
            known = _known(whole)
            if _NO_SCORE.fullmatch(key) or not (
                isinstance(value, float) or (known and type(value) is int)
            ):
                continue
            label = f"{known.label or known.key} {part}".rstrip() if known else key
            present.setdefault(key, replace(known or Metric(key, key), key=key, label=label))
    order = [metric.key for metric in METRICS]
    known_metrics = [metric for metric in present.values() if metric.key.split("/")[0] in order]
    known_metrics.sort(key=lambda metric: order.index(metric.key.split("/")[0]))
    return known_metrics + [metric for metric in present.values() if metric not in known_metrics]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); the latter None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def mean_cell(metric: Metric, values: Sequence[float]) -> str:
    """Mean and sample standard deviation as the paper prints them: ``70.4 ± 0.1``."""
    mean, deviation = mean_and_deviation(values)
    return metric.text(mean) + (f" ± {metric.text(deviation)}" if deviation is not None else "")


def _known(key: str) -> Metric | None:
    try:
        return find_metric(key)
    except UserError:  # of another package that is broken: the score is printed as any number
        return None


def score_table(
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    extra_rows: Iterable[tuple[str, Mapping[str, float]]] = (),
    markdown: bool = False,
) -> str:
    """A table of scores, one row for each system, printed as in the paper (BLEU x 100 and so on).

    Args:
        before: scores before training as fractions ({"BLEU": 0.56, ...}), or None.
        after: scores of the fine-tuned model, or None.
        extra_rows: (name, scores) to compare with, for example a published system.
        markdown: a Markdown table instead of aligned plain text.

    Returns:
        lines joined by newlines, without one at the end.

    Raises:
        UserError: there are no scores.
    """
    rows = [(name, scores) for name, scores in (("before", before), ("after", after)) if scores]
    rows += list(extra_rows)
    metrics = metrics_of(*(scores for _, scores in rows))
    if not metrics:
        raise UserError("there are no scores to print; run `jlora evaluate` first")
    cells = [["", *(metric.label for metric in metrics)]]
    for name, scores in rows:
        cells.append([name, *(metric.cell(scores) for metric in metrics)])
    if before and after:
        difference = ["difference"]
        for metric in metrics:
            change = difference_of(metric, before, after)
            difference.append(metric.text(change, sign=True))
        cells.insert(3, difference)
    return markdown_table(cells) if markdown else plain_table(cells)


def difference_of(
    metric: Metric, before: Mapping[str, float], after: Mapping[str, float]
) -> float | None:
    """``after - before`` of the printed values, so that tables add up; None if one is missing."""
    if before.get(metric.key) is None or after.get(metric.key) is None:
        return None
    digits = metric.decimals
    old = round(before[metric.key] * metric.scale, digits)
    new = round(after[metric.key] * metric.scale, digits)
    return (new - old) / metric.scale


def pair_samples(
    after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] = ()
) -> list[Sample]:
    """Join prediction records ({"prompt", "prediction", "references"?}) by their prompt.

    If some inputs were also predicted before training, only those are kept.
    """
    old = {record["prompt"]: record["prediction"] for record in before}
    samples = []
    for record in after:
        prompt = record["prompt"]
        references = record.get("references") or [None]
        samples.append(Sample(prompt, record["prediction"], old.get(prompt), references[0]))
    paired = [sample for sample in samples if sample.before is not None]
    return paired or samples


def pick(samples: Sequence[Sample], count: int) -> list[Sample]:
    """``count`` samples spread evenly over all, always the same ones."""
    if count >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // count] for index in range(count)]


def samples(items: Sequence[Sample], count: int = 5, width: int = 88) -> str:
    """Sample inputs with the outputs before and after training, for the terminal."""
    blocks = []
    for sample in pick(items, count):
        lines = _field("input", sample.prompt, width)
        if sample.before is not None:
            lines += _field("before", sample.before, width)
        lines += _field("after", sample.after, width)
        if sample.reference is not None:
            lines += _field("reference", sample.reference, width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def slots(prompt: str) -> list[tuple[str, str]] | None:
    """The slots of an E2E input; None for any other text.

    Both notations are recognised: ``name : Blue Spice | area : riverside`` and
    ``name[Blue Spice], area[riverside]``.
    """
    text = prompt.strip()
    if re.fullmatch(r"(?:[^\[\],]+\[[^\[\]]*\]\s*,?\s*)+", text):
        pairs = re.findall(r"([^\[\],]+)\[([^\[\]]*)\]", text)
    else:
        parts = [part.partition(" : ") for part in text.split(" | ")]
        # A single "a : b" may just as well be a sentence with a colon.
        if len(parts) < 2 or not all(separator for _, separator, _ in parts):
            return None
        pairs = [(key, value) for key, _, value in parts]
    return [(key.strip(), value.strip()) for key, value in pairs]


def visible(text: str) -> str:
    """``text`` on one line, with control characters (which could affect the terminal) shown."""
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _field(label: str, text: str, width: int) -> list[str]:
    indent = 11
    shown = textwrap.shorten(visible(text), 600, placeholder=" …") or "(empty)"
    lines = textwrap.wrap(shown, max(20, width - indent))
    return [f"{label if number == 0 else '':<{indent}}{line}" for number, line in enumerate(lines)]


def plain_table(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows with aligned columns, the first ``left`` to the left; ``cells[0]`` is the header."""
    widths = [max(width_of(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = []
        for column, (cell, width) in enumerate(zip(row, widths)):
            space = " " * (width - width_of(cell))
            parts.append(cell + space if column < left else space + cell)
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "-" * max(map(width_of, lines)))
    return "\n".join(lines)


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; ``cells[0]`` is the header."""
    head, *rows = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in cells]
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
