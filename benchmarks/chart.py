"""The bar chart of `make bench`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.page import panels

COLUMNS = 2
OURS, THEIRS = "#c2410c", "#94a3b8"
BAR, MARGIN = 0.24, 0.75  # inches


def draw(figures: dict, path: Path) -> None:
    """Write ``path``.svg and ``path``.png: a panel for each kind of work, a bar for each side."""
    # By hand, as in jlora.report.plots: pyplot would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(figures["results"])
    if not shown:
        return
    about = figures["head"]
    rows = [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
    heights = [max(len(bars) for _, _, bars in row) * BAR + MARGIN for row in rows]
    figure = Figure(figsize=(10, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    isa = "" if about["isa"] == "native" else f", held to {about['isa'].upper()}"
    figure.suptitle(
        f"{about['processor']} ({', '.join(about['features'])}), {about['processors']} cores{isa}, "
        f"{about['date']}",
        fontsize=9,
    )
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for place, panel in zip(axes.flat, shown):
        draw_panel(place, *panel)
    for place in axes.flat[len(shown) :]:
        place.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=120)


def draw_panel(axes, title: str, unit: str, bars: list[tuple[str, float]]) -> None:
    names, amounts = zip(*bars)
    colors = [OURS if name.startswith("jlora") else THEIRS for name in names]
    places = range(len(names))
    axes.barh(places, amounts, color=colors, height=0.72)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{title}: {unit}", fontsize=9, loc="left")
    axes.set_xticks([])
    axes.set_xlim(0, 1.15 * max(amounts))
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    for place, amount in zip(places, amounts):
        text = f" {amount:,.0f}" if amount >= 100 else f" {amount:.3g}"
        axes.text(amount, place, text, va="center", fontsize=8)
