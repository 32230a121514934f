"""A study's figures as PNG: similarity (the paper's figures 3, 4, 6, 7), spectra, amplification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.analysis.study import Study
from jlora.report.plots import new_figure, save_png
from jlora.system.files import check_writable, write_text

COLOURS = "viridis"


def write_study(study: Study, folder: Path) -> list[Path]:
    """analysis.json and the figures.

    Raises:
        UserError: the folder cannot be written.
    """
    check_writable(folder)
    write_text(folder / "analysis.json", study.to_json())
    return [folder / "analysis.json", *draw(study, folder)]


def draw(study: Study, folder: Path) -> list[Path]:
    """Draw the study's figures into ``folder``; returns the files.

    Raises:
        UserError: a file cannot be written.
    """
    files = [spectrum(study, folder / "spectrum.png")]
    if study.similarity:
        files.append(similarity(study, folder / "similarity.png"))
        files.append(similarity_by_layer(study, folder / "similarity-layers.png"))
    if any(layer.amplification for layers in study.layers for layer in layers.values()):
        files.append(amplification(study, folder / "amplification.png"))
    return files


def spectrum(study: Study, path: Path) -> Path:
    """Singular values of dW: one panel for each adapter and kind of layer, one line a layer."""
    kinds = study.kinds
    figure, panels = _grid(len(study.layers), len(kinds), 3.4, 2.8, sharey=True)
    depths = [layer.depth for layers in study.layers for layer in layers.values()]
    scale = _colour_scale(min(depths), max(depths))
    for row, (name, layers) in enumerate(zip(study.names, study.layers)):
        for column, kind in enumerate(kinds):
            axes = panels[row][column]
            for layer in layers.values():
                values = np.asarray(layer.singular_values)
                if layer.kind == kind and (values > 0).any():
                    shown = np.where(values > 0, values, np.nan)
                    colour = scale.to_rgba(layer.depth)
                    axes.plot(np.arange(1, len(values) + 1), shown, color=colour, linewidth=1)
            axes.set_yscale("log")
            axes.set_title(f"{name}: {kind}", fontsize=9)
            axes.set_xlabel("index")
            axes.grid(alpha=0.25)
    for row in panels:
        row[0].set_ylabel("singular value of dW")
    figure.colorbar(scale, ax=[axes for row in panels for axes in row], label="layer")
    return save_png(figure, path)


def similarity(study: Study, path: Path) -> Path:
    """phi(i, j), mean over the layers of each kind, and of random directions (figures 3 and 4)."""
    kinds = list(study.random)
    titles = [f"{kind}, mean of {len(study.similarity_of(kind))} layers" for kind in kinds]
    grids = [np.mean(list(study.similarity_of(kind).values()), axis=0) for kind in kinds]
    titles.append("random Gaussian")
    grids.append(study.random[kinds[0]])
    figure, ((*panels,),) = _grid(1, len(grids), 3.2, 3.2)
    for axes, title, phi in zip(panels, titles, grids):
        image = _heat_map(axes, phi, title)
        axes.set_xlabel(f"j ({study.names[1]})")
    panels[0].set_ylabel(f"i ({study.names[0]})")
    figure.suptitle(f"phi(i, j) of the directions of {study.matrix}", fontsize=10)
    figure.colorbar(image, ax=panels)
    return save_png(figure, path)


def similarity_by_layer(study: Study, path: Path) -> Path:
    """phi(i, j) of every layer, each kind in its own rows (figures 6 and 7)."""
    grids = {kind: study.similarity_of(kind) for kind in study.random}
    columns = min(8, max(len(each) for each in grids.values()))
    cells: list[tuple[str, np.ndarray] | None] = []
    for kind, by_depth in grids.items():
        cells += [(f"{kind} {depth}", phi) for depth, phi in by_depth.items()]
        cells += [None] * (-len(cells) % columns)
    figure, panels = _grid(len(cells) // columns, columns, 1.5, 1.6)
    for axes, cell in zip((axes for row in panels for axes in row), cells):
        if cell is None:
            axes.set_axis_off()
            continue
        image = _heat_map(axes, cell[1], cell[0])
        axes.title.set_fontsize(6)
        axes.tick_params(labelsize=6)
    figure.colorbar(image, ax=[axes for row in panels for axes in row], fraction=0.03, aspect=40)
    return save_png(figure, path)


def amplification(study: Study, path: Path) -> Path:
    """The amplification factor by depth: one panel for each adapter, one line a kind of layer."""
    figure, ((*panels,),) = _grid(1, len(study.layers), 4.6, 3.2, sharey=True)
    for axes, name, layers in zip(panels, study.names, study.layers):
        for kind in study.kinds:
            points = [
                (layer.depth, layer.amplification.factor)
                for layer in layers.values()
                if layer.kind == kind and layer.amplification
            ]
            if points:
                axes.plot(*zip(*sorted(points)), "o-", markersize=3, linewidth=1, label=kind)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("layer")
        axes.grid(alpha=0.25)
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("||dW|| / ||U^T W V^T||")
    return save_png(figure, path)


def _grid(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    """A figure and its panels, (rows, columns), each about ``width`` by ``height`` inches."""
    return new_figure(columns * width + 0.8, rows * height, rows, columns, **shared)


def _heat_map(axes: Any, phi: np.ndarray, title: str) -> Any:
    """phi with (1, 1) in the upper left corner, as the paper draws it."""
    a, b = phi.shape
    image = axes.imshow(
        phi, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0.5, b + 0.5, a + 0.5, 0.5),
    )  # fmt: skip
    axes.set_title(title, fontsize=9)
    axes.set_xticks(_some(b))
    axes.set_yticks(_some(a))
    return image


def _some(count: int) -> Sequence[int]:
    """At most nine whole numbers from 1 to ``count``."""
    return range(1, count + 1, max(1, math.ceil(count / 8)))


def _colour_scale(low: int, high: int) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, max(high, low + 1)), COLOURS)
