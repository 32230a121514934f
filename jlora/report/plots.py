"""Curves of a run, drawn twice: as a PNG to show elsewhere, and as inline SVG for the HTML report.

Matplotlib draws the PNG files, those of `jlora.analysis` too. The charts of the page are written by
hand: they take colours and letters from its style sheet and so follow light and dark mode.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from jlora.system.errors import UserError
from jlora.system.files import atomic_path

Points = list[tuple[int, float]]


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The finite values of ``key`` as (step, value), in order of the steps."""
    points = [
        (record["step"], float(record[key]))
        for record in metrics
        if record.get(key) is not None and math.isfinite(record[key])
    ]
    return sorted(points, key=lambda point: point[0])


def smooth(points: Points, window: int | None = None) -> Points:
    """Centred moving mean over ``window`` points (default: a fortieth of all points).

    At the start the window is smaller on both sides, to keep the steep fall of a loss; at the end
    only the right side is cut, or the last points would be as noisy as the raw ones.
    """
    half = (window or len(points) // 40) // 2
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for index, (step, _) in enumerate(points):
        reach = min(half, index)
        first, end = index - reach, min(index + reach + 1, len(points))
        smoothed.append((step, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def thin(points: Points, buckets: int = 300) -> Points:
    """At most ``2 * buckets`` points: the minimum and maximum of each bucket."""
    if len(points) <= 2 * buckets:
        return points
    kept = []
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        low = min(part, key=lambda point: point[1])
        high = max(part, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept


def loss_curve(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw training and validation loss over the steps into a PNG.

    Raises:
        UserError: no record has a loss, or the file cannot be written.
    """
    train, valid = series(metrics, "loss"), series(metrics, "valid_loss")
    if not train and not valid:
        raise UserError(f"no loss to draw into {path}: the metrics hold none; train first")
    figure, ((axes,),) = new_figure(8, 4.5)
    if train:
        axes.plot(*zip(*train), color="#9db8d9", linewidth=0.8, label="training, each record")
        axes.plot(*zip(*smooth(train)), color="#1f5fa8", linewidth=1.8, label="training, mean")
    if valid:
        axes.plot(*zip(*valid), "o-", color="#b4510f", markersize=4, label="validation")
    _dress(axes, "loss (nats per token)")
    axes.legend(frameon=False)
    return save_png(figure, path)


def loss_curves(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: str | Path) -> Path:
    """Draw the losses of several runs, (name, metrics) each, into a PNG: training, validation.

    Raises:
        UserError: no record has a loss, or the file cannot be written.
    """
    figure, (axes,) = new_figure(11, 4.5, columns=2)
    handles = {}
    for index, (name, metrics) in enumerate(runs):
        style = {
            "color": COLORS[index % len(COLORS)],
            "linestyle": ("-", "--", ":")[index // len(COLORS) % 3],
        }
        loss, valid = series(metrics, "loss"), series(metrics, "valid_loss")
        train = smooth(loss, max(10, len(loss) // 20))
        if train:
            (handles[name],) = axes[0].plot(*zip(*train), linewidth=1.5, **style)
        if valid:
            (handles[name],) = axes[1].plot(*zip(*valid), marker="o", markersize=3, **style)
    if not handles:
        raise UserError(f"no loss to draw into {path}: the metrics hold none; train first")
    _dress(axes[0], "training loss, moving mean (nats per token)")
    _dress(axes[1], "validation loss (nats per token)")
    # matplotlib's legend omits labels that begin with an underscore.
    labels = [f" {name}" if name.startswith("_") else name for name in handles]
    legend = figure.legend(
        list(handles.values()), labels, loc="outside lower center", ncols=3, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return save_png(figure, path)


# Colours of the lines of several runs, in the order of the page's style sheet.
COLORS = ("#1f5fa8", "#b4510f", "#17693a", "#8a3ffc", "#b3266b", "#0f7c86", "#7a6200", "#59616b")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any
) -> tuple[Any, Any]:
    """A figure of that size in inches, and its panels as an array (rows, columns)."""
    # Figure and Agg by hand: pyplot would look for a display and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _dress(axes: Any, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_png(figure: Any, path: str | Path) -> Path:
    """Write a figure, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Letters that matplotlib's font lacks are drawn as boxes; the warning helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png")
    return Path(path)


@dataclass(frozen=True)
class Line:
    """One line of an SVG chart; ``style`` is a class of the page's style sheet."""

    points: Points
    style: str
    markers: bool = False


# Size in the chart's own coordinates; the page scales it.
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 30, 12, 34


def svg_chart(lines: Sequence[Line], label: str, number: Callable[[float], str]) -> Markup:
    """A line chart over the steps as inline SVG.

    Args:
        lines: drawn in this order; lines without points are omitted.
        label: the description for screen readers.
        number: formats a value of the vertical axis.
    """
    lines = [line for line in lines if line.points]
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x_low, x_high = min(steps), max(steps)
    y_ticks = ticks(min(values), max(values), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        share = (step - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}"{_ys(y(tick))}/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(tick):.1f}" dy="0.35em" text-anchor="end">'
            f"{escape(number(tick))}</text>"
        )
    for tick in ticks(x_low, x_high, 6, whole=True) if x_high > x_low else [x_low]:
        if x_low <= tick <= x_high:
            shown = f"{tick / 1000:g}k" if tick >= 10_000 else f"{tick:,.0f}"
            parts.append(
                f'<text x="{x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{shown}</text>'
            )
    for line in lines:
        points = thin(line.points)
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        if len(points) > 1:
            parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        if line.markers or len(points) == 1:
            for step, value in points:
                parts.append(
                    f'<circle class="{line.style}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5">'
                    f"<title>step {step:,}: {escape(number(value))}</title></circle>"
                )
    parts.append("</svg>")
    return Markup("".join(parts))


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose ``low`` to ``high``."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _ys(value: float) -> str:
    return f' y1="{value:.1f}" y2="{value:.1f}"'
