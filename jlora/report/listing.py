"""The list of runs that `jlora runs` prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from jlora.report.runs import RunSummary, group_by_seed, group_name
from jlora.report.tables import (
    VALID_LOSS,
    Metric,
    mean_and_deviation,
    mean_cell,
    metrics_of,
    plain_table,
    visible,
)

HEAD = ["run", "state", "task", "model", "method", "steps", "valid. loss", "scores", "age"]
TEXTS = 5  # columns that are words
MAIN_SCORES = 2


def sort_runs(runs: Sequence[RunSummary], by: str) -> list[RunSummary]:
    """Sort by folder name, by age (newest first), or by validation loss (lowest first)."""

    def key(run: RunSummary) -> Any:
        if by == "age":
            return -run.modified
        if by == "loss":
            return float("inf") if run.best_valid_loss is None else run.best_valid_loss
        return str(run.folder)

    return sorted(runs, key=key)


def list_runs(runs: Sequence[RunSummary], group: bool = False) -> str:
    """The runs as a table, followed by the problems of damaged ones.

    Args:
        group: show runs that differ by their seed as one row: mean ± sample standard deviation.
    """
    now = time.time()
    rows = [HEAD]
    for members in group_by_seed(runs) if group else [[run] for run in runs]:
        rows.append(_row(members, now))
    # Columns that are empty for all runs are left out.
    columns = [i for i in range(len(HEAD)) if any(row[i] != "–" for row in rows[1:])]
    shown = [[row[i] for i in columns] for row in rows]
    lines = [plain_table(shown, left=sum(i < TEXTS for i in columns))]
    lines += [f"damaged: {problem}" for run in runs for problem in run.problems]
    return "\n".join(lines)


def describe_runs(runs: Sequence[RunSummary], group: bool = False) -> list[dict[str, Any]]:
    """The same for programs: one JSON object for each run, or for each group of seeds.

    Returns:
        objects with ``folder``, ``task``, ``model``, ``method``, ``seed``, ``steps``,
        ``total_steps``, ``best_valid_loss``, ``before``, ``after`` (scores as fractions),
        ``seconds``, ``peak_memory_bytes``, ``modified`` (seconds since the epoch), ``state`` and
        ``problems``; with ``group`` objects with ``name``, ``runs`` (those objects), and ``n``,
        ``mean`` and ``deviation`` of the validation loss and of each score.
    """
    if not group:
        return [_describe(run) for run in runs]
    return [
        {
            "name": group_name(members),
            "runs": [_describe(run) for run in members],
            **_statistics(members),
        }
        for members in group_by_seed(runs)
    ]


def _row(members: Sequence[RunSummary], now: float) -> list[str]:
    run = members[0]
    values = [_values(member) for member in members]
    losses = [one[VALID_LOSS.key] for one in values if VALID_LOSS.key in one]
    metrics = metrics_of(*(member.after for member in members))[:MAIN_SCORES]
    scores = [f"{metric.label} {_cell(metric, values)}" for metric in metrics]
    steps = "–" if not run.steps and run.total_steps is None else f"{run.steps:,}"
    if run.total_steps is not None:
        steps += f"/{run.total_steps:,}"
    name = (
        visible(str(run.folder))
        if len(members) == 1
        else f"{group_name(members)} ({len(members)} seeds)"
    )
    return [
        name,
        run.state,
        run.task or "–",
        run.model or "–",
        run.method or "–",
        steps,
        mean_cell(VALID_LOSS, losses) if losses else "–",
        ", ".join(scores) or "–",
        age(now - max(member.modified for member in members)),
    ]


def _cell(metric: Metric, values: Sequence[Mapping[str, float]]) -> str:
    if len(values) == 1:
        return metric.cell(values[0])
    return mean_cell(metric, [one[metric.key] for one in values if metric.key in one])


def _values(run: RunSummary) -> dict[str, float]:
    loss = run.best_valid_loss
    return {**run.after, **({} if loss is None else {VALID_LOSS.key: loss})}


def _describe(run: RunSummary) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "task": run.task,
        "model": run.model,
        "method": run.method,
        "seed": run.seed,
        "steps": run.steps,
        "total_steps": run.total_steps,
        "best_valid_loss": run.best_valid_loss,
        "before": run.before,
        "after": run.after,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory,
        "modified": run.modified,
        "state": run.state,
        "problems": run.problems,
    }


def _statistics(members: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for member in members:
        for key, value in _values(member).items():
            found.setdefault(key, []).append(value)
    pairs = {key: mean_and_deviation(values) for key, values in found.items()}
    return {
        "n": {key: len(values) for key, values in found.items()},
        "mean": {key: mean for key, (mean, _) in pairs.items()},
        "deviation": {key: deviation for key, (_, deviation) in pairs.items()},
    }


def age(seconds: float) -> str:
    """``now``, ``5 min``, ``3 h``, ``12 d``."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"
