"""One self-contained HTML page about runs: no scripts, no network, light and dark."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.report import environment
from jlora.report.charts import charts_of, line_style, overlaid_charts
from jlora.report.plots import loss_curve, loss_curves, series
from jlora.report.runs import REPORT_NAME, RunSummary, group_by_seed, read_run
from jlora.report.samples import References, shown_samples
from jlora.report.scoreboard import Board, confusion, markdown, score_boards
from jlora.report.tables import VALID_LOSS, metrics_of
from jlora.system.errors import UserError
from jlora.system.files import read_text, write_text
from jlora.training.loggers import METRICS_NAME

SAMPLES, SAMPLES_OF_MANY = 12, 6


def write_report(
    runs: str | Path | Sequence[str | Path],
    references: References | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write a page about one run or several, and table.md and loss.png beside it.

    metrics.jsonl is required; config.yaml, scores.json, predictions.jsonl, predictions_before.jsonl
    and environment.json each add a section to the page.

    Args:
        runs: run folders.
        references: target texts by prompt, for lines of predictions.jsonl without ``references``;
            None: those of the run's test data, if it can still be found.
        out: the HTML file; None: RUN/report.html of a single run, runs/report.html of several.

    Returns:
        the path of the page.

    Raises:
        UserError: a folder or its metrics are missing, a file in it is damaged, or the report
            cannot be written.
    """
    import jinja2

    folders = [runs] if isinstance(runs, (str, Path)) else list(runs)
    found = [_healthy(folder) for folder in folders]
    if not found:
        raise UserError("no run folder given")
    _tell_apart(found)
    if out is None:
        out = found[0].folder / REPORT_NAME if len(found) == 1 else Path("runs") / REPORT_NAME
    path, boards = Path(out), score_boards(found)
    loader = jinja2.Environment(
        autoescape=True,  # everything that a user or a model wrote is escaped
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = loader.from_string(read_text(Path(__file__).with_name("report.html.j2")))
    html = template.render(_page(found, boards, references))
    # JSON can contain half of a surrogate pair, which a UTF-8 file cannot.
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    _write_beside(path.parent, found, boards)
    return path


def duration(seconds: float) -> str:
    """``4 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(size: float) -> str:
    """Bytes as ``1.5 GiB`` or ``700 MiB``."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _healthy(folder: str | Path) -> RunSummary:
    run = read_run(folder)
    if run.problems:
        raise UserError(run.problems[0])
    if not run.records:
        raise UserError(
            f"{run.folder / METRICS_NAME} has no training records; train first with "
            "`jlora finetune`, or check the folder"
        )
    return run


def _tell_apart(runs: Sequence[RunSummary]) -> None:
    """Add parent folders to equal names until they differ."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(2, max(len(path.parts) for path in paths)):
        names = [run.name for run in runs]
        for run, path in zip(runs, paths):
            if names.count(run.name) > 1:
                run.name = os.path.join(*path.parts[-depth:])


def _page(
    runs: Sequence[RunSummary], boards: Sequence[Board], references: References | None
) -> dict[str, Any]:
    """The values that the template shows."""
    one = runs[0] if len(runs) == 1 else None
    tasks = list(dict.fromkeys(run.task for run in runs))
    samples = []
    for task in tasks:
        # Runs that differ by their seed write similar texts: only the first of them is shown.
        mine = [group[0] for group in group_by_seed(runs) if group[0].task == task]
        samples.append((task, shown_samples(mine, references, SAMPLES if one else SAMPLES_OF_MANY)))
    models = dict.fromkeys(run.model for run in runs)
    words = [*models, *tasks, *([one.method] if one else [])]
    return {
        "title": one.name if one else f"{len(runs)} runs",
        "kicker": "Fine-tuning run" if one else "Fine-tuning runs compared",
        "subtitle": " · ".join(word for word in words if word),
        "facts": _facts_of(one) if one else _facts_of_many(runs),
        "boards": boards,
        "confusions": [(run.name, table) for run in runs if (table := _answers(run))],
        "legend": [] if one else [(line_style(i), run.name) for i, run in enumerate(runs)],
        "charts": charts_of(one) if one else overlaid_charts(runs),
        "samples": [(task, shown) for task, shown in samples if shown],
        "several_tasks": len(tasks) > 1,
        "costs": [] if one else [_cost(run) for run in runs],
        "changes": [] if one else _changes(runs),
        "runs": runs,
        "machines": [_machine(run) for run in runs],
        "marks": any("<ins>" in o.html or "<del>" in o.html
                     for _, shown in samples for sample in shown for o in sample.outputs),
    }  # fmt: skip


def _write_beside(folder: Path, runs: Sequence[RunSummary], boards: Sequence[Board]) -> None:
    if boards:
        write_text(folder / "table.md", markdown(boards))
    if any(series(run.records, key) for run in runs for key in ("loss", "valid_loss")):
        if len(runs) == 1:
            loss_curve(runs[0].records, folder / "loss.png")
        else:
            loss_curves([(run.name, run.records) for run in runs], folder / "loss.png")


def _fact(label: str, value: str, note: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _facts_of(run: RunSummary) -> list[dict[str, str]]:
    """The main numbers at the top of the page."""
    facts = []
    for metric in metrics_of(run.after)[:1]:
        value, _, interval = metric.cell(run.after).partition(" ")
        before = f"{metric.text(run.before.get(metric.key))} before" if run.before else ""
        note = ", ".join(word for word in (interval, before) if word)
        facts.append(_fact(metric.label, value, note))
    if run.best_valid_loss is not None:
        note = f"at step {run.best_step:,}" if run.best_step else "before training"
        facts.append(_fact("Best validation loss", VALID_LOSS.text(run.best_valid_loss), note))
    train = series(run.records, "loss")
    if train:
        last = [value for _, value in train[-min(50, max(1, len(train) // 4)) :]]
        note = f"mean of the last {len(last)} records" if len(last) > 1 else ""
        facts.append(_fact("Final training loss", f"{sum(last) / len(last):.3f}", note))
    note = f"in {duration(run.seconds)}" if run.seconds is not None else ""
    facts.append(_fact("Steps", f"{run.steps:,}", note))
    if run.peak_memory is not None:
        facts.append(_fact("Peak memory", memory(run.peak_memory)))
    return facts


def _facts_of_many(runs: Sequence[RunSummary]) -> list[dict[str, str]]:
    facts = [_fact("Runs", f"{len(runs)}")]
    several = len({run.task for run in runs}) > 1
    for task in dict.fromkeys(run.task for run in runs):
        scored = [run for run in runs if run.task == task and run.after]
        metrics = metrics_of(*(run.after for run in scored))[:1]
        for metric in metrics:
            best = max(scored, key=lambda run: run.after.get(metric.key, float("-inf")))
            label = f"Best {metric.label}" + (f", {task}" if several else "")
            facts.append(_fact(label, metric.text(best.after.get(metric.key)), best.name))
    losses = [run for run in runs if run.best_valid_loss is not None]
    if losses and not several:
        best = min(losses, key=lambda run: run.best_valid_loss or 0.0)
        facts.append(
            _fact("Best validation loss", VALID_LOSS.text(best.best_valid_loss), best.name)
        )
    seconds = [run.seconds for run in runs if run.seconds is not None]
    if seconds:
        facts.append(_fact("Training time", duration(sum(seconds)), "of all runs"))
    return facts


def _answers(run: RunSummary) -> dict[str, Any] | None:
    table = confusion(run.after)
    if table is None:
        return None
    unread = run.after.get("generated_unparseable")
    note = "" if unread is None else f"Generated texts that say none of these: {unread:,.0f}"
    return {"rows": table, "note": note}


def _cost(run: RunSummary) -> list[str]:
    speeds = sorted(value for _, value in series(run.records, "tokens_per_s"))
    total = "" if run.total_steps is None else f" / {run.total_steps:,}"
    return [
        run.name,
        run.method or "–",
        f"{run.steps:,}{total}",
        "–" if run.seconds is None else duration(run.seconds),
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "–",
        "–" if run.peak_memory is None else memory(run.peak_memory),
        run.state,
    ]


def _changes(runs: Sequence[RunSummary]) -> list[list[str]]:
    """The settings that differ between the runs: name, then the value in each run."""
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [[name, *(settings.get(name, "–") for settings in flat)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = "–" if value is None else str(value)
    return found


def _machine(run: RunSummary) -> dict[str, Any]:
    """Heading and (label, text) rows about the machine."""
    found = run.environment or environment.describe()
    if not run.environment:
        # The memory of this process is not that of the training.
        found.pop("peak_memory_bytes", None)
    rows = [] if run.seconds is None else [("Training time", duration(run.seconds))]
    labels = {"peak_memory_bytes": "Peak memory", "memory_bytes": "Memory"}
    for key, value in found.items():
        label = labels.get(key, key.replace("_", " "))
        label = key if key in environment.PACKAGES else label[:1].upper() + label[1:]
        if key.endswith("_bytes") and isinstance(value, (int, float)):
            value = memory(value)
        elif isinstance(value, list):
            value = "\n".join(map(str, value))
        elif isinstance(value, dict):
            value = "\n".join(f"{name}: {one}" for name, one in value.items())
        rows.append((label, str(value)))
    own = (
        "Environment" if run.environment else "Environment (of the machine that wrote this report)"
    )
    return {"heading": own, "rows": rows}
