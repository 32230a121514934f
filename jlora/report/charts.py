"""The charts of the HTML report: one run in full, or several runs laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from jlora.report.plots import COLORS, Line, Points, series, smooth, svg_chart
from jlora.report.runs import RunSummary

# Share of the longest run's steps that is left out: the steep start would flatten the rest.
STEEP = 0.1


@dataclass(frozen=True)
class Chart:
    """A drawing with its title; ``legend`` as (style, text), ``note`` beneath."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def charts_of(run: RunSummary) -> list[Chart]:
    """Loss, validation loss, learning rate and speed of one run, if they were recorded."""
    loss, valid = series(run.records, "loss"), series(run.records, "valid_loss")
    charts = []
    if loss:
        legend = [("raw", "each record"), ("mean", "moving mean")]
        legend += [("valid", "validation")] if valid else []
        lines = [Line(loss, "raw"), Line(smooth(loss), "mean"), Line(valid, "valid", markers=True)]
        svg = svg_chart(lines, _summary("Training loss", loss), short)
        charts.append(Chart("Training loss", svg, legend, _smoothing_note([run])))
    valid_lines = [Line(valid, "valid", markers=len(valid) <= 40)]
    rates, speeds = series(run.records, "lr"), series(run.records, "tokens_per_s")
    for title, points, lines in (
        ("Validation loss", valid, valid_lines),
        ("Learning rate", rates, [Line(rates, "mean")]),
        ("Tokens per second", speeds, [Line(speeds, "raw"), Line(smooth(speeds), "mean")]),
    ):
        if points:
            charts.append(Chart(title, svg_chart(lines, _summary(title, points), short)))
    return charts


def overlaid_charts(runs: Sequence[RunSummary]) -> list[Chart]:
    """Training loss (moving mean), validation loss and learning rate, one line for each run."""
    charts = []
    for title, key in (
        ("Training loss", "loss"),
        ("Validation loss", "valid_loss"),
        ("Learning rate", "lr"),
    ):
        curves = [series(run.records, key) for run in runs]
        note = ""
        if key == "loss":
            curves = _settled([smooth(points, max(10, len(points) // 20)) for points in curves])
            note = f"Moving means, without the steep start. {_smoothing_note(runs)}".strip()
        lines = [
            Line(points, line_style(index), markers=key == "valid_loss" and len(points) <= 40)
            for index, points in enumerate(curves)
        ]
        if any(curves):
            label = f"{title} of {sum(map(bool, curves))} runs"
            charts.append(Chart(title, svg_chart(lines, label, short), note=note))
    return charts


def line_style(index: int) -> str:
    """Classes of the style sheet: each run has a colour; when these run out, dashes."""
    return f"run c{index % len(COLORS)} d{index // len(COLORS) % 3}"


def short(value: float) -> str:
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


def _settled(curves: Sequence[Points]) -> list[Points]:
    """The curves without the start; a short run keeps at least its second half."""
    ends = [points[-1][0] if points else 0 for points in curves]
    cut = STEEP * max(ends, default=0)
    return [
        [point for point in points if point[0] >= min(cut, end / 2)]
        for points, end in zip(curves, ends)
    ]


def _smoothing_note(runs: Sequence[RunSummary]) -> str:
    smoothing = {run.setting("train.label_smoothing") or 0 for run in runs if run.config}
    values = sorted(value for value in smoothing if isinstance(value, (int, float)) and value)
    if not values:
        return ""
    shown = ", ".join(f"{value:g}" for value in values)
    return f"Training loss includes label smoothing ({shown}); validation loss does not."


def _summary(title: str, points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    return f"{title}: {short(start)} at step {first:,}, {short(end)} at step {last:,}"
