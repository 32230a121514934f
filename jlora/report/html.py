"""One self-contained HTML page about a run folder: no scripts, no network, light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.data import json_lines, string_field
from jlora.errors import UserError
from jlora.files import read_text, write_text
from jlora.loggers import METRICS_NAME, read_metrics, training_seconds
from jlora.report import environment
from jlora.report.plots import Line, series, smooth, svg_chart
from jlora.report.tables import Sample, difference_of, metrics_of, pair_samples, pick, slots

REPORT_NAME = "report.html"
SAMPLES = 12


def write_report(
    run_folder: str | Path, references: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """Write RUN/report.html from what the run folder holds.

    metrics.jsonl is needed; config.yaml, scores.json, predictions.jsonl,
    predictions_before.jsonl and environment.json each add their part of the page.

    Args:
        run_folder: the folder of one run.
        references: target texts by prompt, shown beside the outputs where a line of
            predictions.jsonl has no ``references`` of its own.

    Returns:
        the path of the report.

    Raises:
        UserError: the folder or its metrics are missing, a file in it is damaged, or the report
            cannot be written.
    """
    import jinja2

    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the one that `jlora finetune` made")
    metrics_path = folder / METRICS_NAME
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    if not metrics:
        raise UserError(
            f"{metrics_path} holds no training records; train first with `jlora finetune`, "
            "or check the folder"
        )
    config_text, config = _config(folder / "config.yaml")
    before, after = _scores(folder / "scores.json")
    seconds = training_seconds(metrics)
    loader = jinja2.Environment(
        autoescape=True,  # everything a user or a model wrote is text, never markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = loader.from_string(read_text(Path(__file__).with_name("report.html.j2")))
    html = template.render(
        title=folder.resolve().name,
        subtitle=_subtitle(config),
        facts=_facts(metrics, before, after, seconds),
        scores=score_rows(before, after),
        has_before=bool(before),
        has_after=bool(after),
        charts=_charts(metrics, config),
        samples=[_sample(sample) for sample in _samples(folder, references)],
        config_text=config_text,
        environment=_environment(folder, seconds),
    )
    path = folder / REPORT_NAME
    # JSON may spell half of a surrogate pair, which no file takes.
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))
    return path


def score_rows(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> list[dict[str, str]]:
    """One row a metric: label, before, after, difference, and whether it got better or worse."""
    rows = []
    for metric in metrics_of(before, after):
        change = difference_of(metric, before or {}, after or {})
        shown = metric.text(change, sign=True)
        trend = ""
        if change is not None and shown.strip("+-0."):
            trend = "better" if (change > 0) != metric.lower_is_better else "worse"
        rows.append(
            {
                "label": metric.label,
                "before": metric.text((before or {}).get(metric.key)),
                "after": metric.text((after or {}).get(metric.key)),
                "difference": shown.replace("-", "−"),
                "trend": trend,
            }
        )
    return rows


def duration(seconds: float) -> str:
    """``4 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _config(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The text of config.yaml and what it says; (None, {}) when it is not there."""
    if not path.exists():
        return None, {}
    import yaml

    text = read_text(path)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}: not YAML ({problem}); mend or remove the file") from error
    return text, config if isinstance(config, dict) else {}


def _scores(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(before, after) of scores.json, None for each that is not there."""
    if not path.exists():
        return None, None
    try:
        scores = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); run `jlora evaluate` again"
        ) from error
    parts = [scores.get(key) for key in ("before", "after")] if isinstance(scores, dict) else [0]
    if not all(part is None or isinstance(part, dict) for part in parts):
        raise UserError(
            f'{path}: not {{"before": {{...}}, "after": {{...}}}}; run `jlora evaluate` again'
        )
    before, after = (
        {key: value for key, value in part.items() if type(value) in (int, float)} if part else None
        for part in parts
    )
    return before, after


def _samples(folder: Path, references: Mapping[str, Sequence[str]] | None) -> list[Sample]:
    after = _predictions(folder / "predictions.jsonl", references)
    before = _predictions(folder / "predictions_before.jsonl")
    return pick(pair_samples(after, before), SAMPLES)


def _predictions(
    path: Path, references: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Prompt, prediction and references of each line, [] when the file is not there."""
    if not path.exists():
        return []
    records = []
    for number, row in json_lines(path):
        prompt = string_field(row, "prompt", path, number)
        found = row.get("references") or (references or {}).get(prompt) or []
        if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
            raise UserError(f"{path}:{number}: 'references' is not a list of strings")
        text = string_field(row, "prediction", path, number)
        records.append({"prompt": prompt, "prediction": text, "references": found})
    return records


def _sample(sample: Sample) -> dict[str, Any]:
    prompt = sample.prompt.strip()
    return {
        "slots": slots(prompt),
        "prompt": prompt if len(prompt) <= 700 else prompt[:700].rstrip() + " …",
        "before": None if sample.before is None else sample.before.strip(),
        "after": sample.after.strip(),
        "reference": None if sample.reference is None else sample.reference.strip(),
    }


def _subtitle(config: Mapping[str, Any]) -> str:
    parts = [_find(config, key) for key in ("model", "task")]
    return " · ".join(str(part) for part in parts if isinstance(part, str))


def _find(config: Mapping[str, Any], key: str) -> Any:
    """The value of ``key`` in the settings or in one of their sections."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(section.get(key), (str, int, float)):
            return section[key]
    return None


def _facts(
    metrics: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    seconds: float | None,
) -> list[dict[str, str]]:
    """The few numbers at the top of the page: label, value, note."""
    facts = []
    for metric in metrics_of(after)[:1]:
        note = f"{metric.text((before or {}).get(metric.key))} before" if before else ""
        facts.append({"label": metric.label, "value": metric.text(after[metric.key]), "note": note})
    valid = series(metrics, "valid_loss")
    if valid:
        step, best = min(valid, key=lambda point: point[1])
        facts.append(
            {
                "label": "Best validation loss",
                "value": f"{best:.3f}",
                "note": f"at step {step:,}" if step else "before training",
            }
        )
    train = series(metrics, "loss")
    if train:
        last = [value for _, value in train[-50:]]
        facts.append(
            {
                "label": "Final training loss",
                "value": f"{sum(last) / len(last):.3f}",
                "note": f"mean of the last {len(last)} records" if len(last) > 1 else "",
            }
        )
    steps = max(record["step"] for record in metrics)
    note = f"in {duration(seconds)}" if seconds is not None else ""
    facts.append({"label": "Steps", "value": f"{steps:,}", "note": note})
    return facts


def _charts(
    metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The charts of the page: title, legend as (style, text), drawing, note."""
    loss, valid = series(metrics, "loss"), series(metrics, "valid_loss")
    charts = []
    if loss:
        lines = [Line(loss, "raw"), Line(smooth(loss), "mean"), Line(valid, "valid", markers=True)]
        legend = [("raw", "each record"), ("mean", "moving mean")]
        legend += [("valid", "validation")] if valid else []
        smoothing = _find(config, "label_smoothing")
        charts.append(
            {
                "title": "Training loss",
                "legend": legend,
                "svg": svg_chart(lines, _summary("Training loss", loss), _short),
                "note": f"Training loss includes label smoothing ({smoothing}); validation loss "
                "does not."
                if smoothing
                else "",
            }
        )
    valid_lines = [Line(valid, "valid", markers=len(valid) <= 40)]
    rates, speeds = series(metrics, "lr"), series(metrics, "tokens_per_s")
    for title, points, lines in (
        ("Validation loss", valid, valid_lines),
        ("Learning rate", rates, [Line(rates, "mean")]),
        ("Tokens per second", speeds, [Line(speeds, "raw"), Line(smooth(speeds), "mean")]),
    ):
        if points:
            svg = svg_chart(lines, _summary(title, points), _short)
            charts.append({"title": title, "legend": [], "svg": svg, "note": ""})
    return charts


def _summary(title: str, points: list[tuple[int, float]]) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{title}: {_short(start)} at step {first:,}, {_short(end)} at step {last:,}"


def _short(value: float) -> str:
    """A number for an axis, short: ``2e-4``, ``1.25``, ``1,500``, ``12k``."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.01:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _environment(folder: Path, seconds: float | None) -> dict[str, Any]:
    """Heading and (label, text) rows about the machine."""
    recorded = (folder / environment.ENVIRONMENT_NAME).exists()
    found = environment.read(folder) if recorded else environment.describe()
    if not recorded:
        # This process's memory says nothing about the training's.
        found.pop("peak_memory_bytes", None)
    rows = []
    if seconds is not None:
        rows.append(("Training time", duration(seconds)))
    labels = {"peak_memory_bytes": "Peak memory", "memory_bytes": "Memory"}
    for key, value in found.items():
        label = labels.get(key, key.replace("_", " "))
        if key.endswith("_bytes") and isinstance(value, (int, float)):
            value = f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
        rows.append(
            (label[:1].upper() + label[1:] if key not in environment.PACKAGES else key, value)
        )
    heading = "Environment" if recorded else "Environment (of the machine that wrote this report)"
    return {"heading": heading, "rows": [(label, str(value)) for label, value in rows]}
