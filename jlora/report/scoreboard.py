"""The score table of one or several runs: one row for each system, with published scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlora.report.runs import RunSummary, group_by_seed, group_name
from jlora.report.tables import (
    VALID_LOSS,
    Metric,
    difference_of,
    markdown_table,
    mean_cell,
    metrics_of,
)
from jlora.system.files import read_text


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
        kind: ``before`` (the model before training), ``run``, ``difference``, ``mean`` or
            ``published``.
        trends: for a difference, ``better``, ``worse`` or empty for each cell.
        note: the source of a published row.
    """

    name: str
    cells: list[str]
    kind: str
    trends: list[str] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Board:
    """The systems of one task; ``columns`` are the labels of the cells."""

    task: str | None
    columns: list[str]
    rows: list[Row]


def score_boards(runs: Sequence[RunSummary]) -> list[Board]:
    """One table for each task, in the order of the runs; groups of seeds get a row with their mean.

    The validation loss is the last column. A task whose runs have neither scores nor validation
    has no table; a table without scores has no published rows.
    """
    boards = []
    for task in dict.fromkeys(run.task for run in runs):
        mine = [run for run in runs if run.task == task]
        metrics = metrics_of(*(_whole(part) for run in mine for part in (run.before, run.after)))
        others = published(task) if metrics else []
        if any(run.best_valid_loss is not None for run in mine):
            metrics.append(VALID_LOSS)
        if metrics:
            rows = _run_rows(mine, metrics) + [_published_row(one, metrics) for one in others]
            boards.append(Board(task, _labels(metrics), rows))
    return boards


def published(task: str | None) -> list[dict[str, Any]]:
    """The rows of published.yaml for a task: ``name``, ``source``, ``scores``, ``deviation``."""
    import yaml

    tables = yaml.safe_load(read_text(Path(__file__).with_name("published.yaml")))
    return tables.get(task, [])


def markdown(boards: Sequence[Board]) -> str:
    """The tables in Markdown, followed by the sources of the published rows."""
    blocks = []
    for board in boards:
        if len(boards) > 1:
            blocks.append(f"## {board.task or 'no task'}")
        blocks.append(
            markdown_table([["", *board.columns], *([r.name, *r.cells] for r in board.rows)])
        )
        notes = [f"- {row.name}: {row.note}" for row in board.rows if row.note]
        if notes:
            blocks.append("Published rows are of other models and test sets than the runs:")
            blocks.append("\n".join(notes))
    return "\n\n".join(blocks) + "\n"


def trend(metric: Metric, change: float | None) -> str:
    """``better`` or ``worse``; empty if the printed difference is zero."""
    if change is None or not metric.text(change, sign=True).strip("+-0."):
        return ""
    return "better" if (change > 0) != metric.lower_is_better else "worse"


def confusion(scores: Mapping[str, float]) -> list[list[str]] | None:
    """The confusion matrix of a choice between answers, as rows with a header; or None.

    A score ``confusion/true->false`` counts inputs whose answer is true and for which the model
    said false. Predictions that are no answer (``unparseable``) have a column if there are any.
    """
    counts = {}
    for key, value in scores.items():
        kind, _, pair = key.partition("/")
        right, arrow, given = pair.partition("->")
        if kind == "confusion" and arrow:
            counts[right, given] = value
    if not counts:
        return None
    answers = sorted({right for right, _ in counts})
    others = {given for (_, given), count in counts.items() if count} - set(answers)
    columns = answers + sorted(others)
    rows = [["", *(f"answered {given}" for given in columns)]]
    for right in answers:
        rows.append(
            [f"is {right}", *(f"{counts.get((right, given), 0):,.0f}" for given in columns)]
        )
    return rows


def _run_rows(runs: Sequence[RunSummary], metrics: Sequence[Metric]) -> list[Row]:
    rows, untouched = [], set()
    for group in group_by_seed(runs):
        for run in group:
            before, after = _whole(run.before), _with_loss(run)
            # Runs that start from the same model share their first row.
            if before and (run.model, tuple(sorted(before.items()))) not in untouched:
                untouched.add((run.model, tuple(sorted(before.items()))))
                name = "before" if len(runs) == 1 else f"{run.model or run.name}, untouched"
                rows.append(Row(name, [metric.cell(before) for metric in metrics], "before"))
            rows.append(Row(run.name, [metric.cell(after) for metric in metrics], "run"))
            if len(runs) == 1 and before and run.after:
                rows.append(_difference_row(before, after, metrics))
        if len(group) > 1:
            rows.append(_mean_row(group, metrics))
    return rows


def _difference_row(
    before: Mapping[str, float], after: Mapping[str, float], metrics: Sequence[Metric]
) -> Row:
    changes = [difference_of(metric, before, after) for metric in metrics]
    cells = [metric.text(change, sign=True) for metric, change in zip(metrics, changes)]
    trends = [trend(metric, change) for metric, change in zip(metrics, changes)]
    return Row("difference", [cell.replace("-", "−") for cell in cells], "difference", trends)


def _mean_row(group: Sequence[RunSummary], metrics: Sequence[Metric]) -> Row:
    cells = []
    for metric in metrics:
        values = [_with_loss(run)[metric.key] for run in group if metric.key in _with_loss(run)]
        cell = mean_cell(metric, values) if values else metric.text(None)
        cells.append(cell + (f" (n = {len(values)})" if 0 < len(values) < len(group) else ""))
    return Row(f"{group_name(group)}: mean ± s.d. of {len(group)} seeds", cells, "mean")


def _published_row(one: Mapping[str, Any], metrics: Sequence[Metric]) -> Row:
    cells = []
    for metric in metrics:
        deviation = one.get("deviation", {}).get(metric.key)
        cell = metric.text(one["scores"].get(metric.key))
        cells.append(cell + (f" ± {metric.text(deviation)}" if deviation is not None else ""))
    return Row(one["name"], cells, "published", note=one["source"])


def _with_loss(run: RunSummary) -> dict[str, float]:
    loss = run.best_valid_loss
    return {**_whole(run.after), **({} if loss is None else {VALID_LOSS.key: loss})}


def _whole(scores: Mapping[str, float]) -> dict[str, float]:
    """``BLEU/all`` is BLEU."""
    return {key[:-4] if key.endswith("/all") else key: value for key, value in scores.items()}


def _labels(metrics: Sequence[Metric]) -> list[str]:
    """Column headers; a metric that also exists for parts of the data is marked "all"."""
    parts = {metric.key.split("/")[0] for metric in metrics if "/" in metric.key}
    return [f"{metric.label} all" if metric.key in parts else metric.label for metric in metrics]
