"""A study as tables for the terminal: means over the layers of each kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.analysis.study import Layer, Study
from jlora.report.tables import plain_table


def tables(study: Study) -> str:
    """All tables of a study."""
    blocks = [
        spectrum_table(study),
        similarity_table(study) if study.similarity else None,
        amplification_table(study),
    ]
    return "\n\n".join(block for block in blocks if block)


def _groups(study: Study) -> list[tuple[str, str, list[Layer]]]:
    """(adapter, kind, its layers)"""
    groups = []
    for name, layers in zip(study.names, study.layers):
        for kind in study.kinds:
            found = [layer for layer in layers.values() if layer.kind == kind]
            if found:
                groups.append((name, kind, found))
    return groups


def spectrum_table(study: Study) -> str:
    """Frobenius norm, singular values, and the number of them that make up most of the change."""
    rows = [["singular values of dW", "", "layers", "r", "||dW||", "s1", "s2/s1", "sr/s1", "90 %"]]
    for name, kind, layers in _groups(study):
        padded = [np.asarray([*layer.singular_values, 0.0]) for layer in layers]
        first = _mean([values[0] for values in padded])
        rows.append([
            name, kind, str(len(layers)), _ranks(layers),
            f"{_mean([np.linalg.norm(values) for values in padded]):.3g}", f"{first:.3g}",
            *(
                f"{_mean([values[at] / values[0] if values[0] else 0 for values in padded]):.2f}"
                for at in (1, -2)
            ),
            f"{_mean([most_of(values) for values in padded]):.1f}",
        ])  # fmt: skip
    note = "90 %: how many directions hold that share of ||dW||^2. All are means over the layers."
    return f"{plain_table(rows)}\n{note}"


def most_of(values: np.ndarray, share: float = 0.9) -> int:
    """The number of singular values that make up ``share`` of the sum of squares."""
    sums = np.square(values).cumsum()
    return int(np.searchsorted(sums, share * sums[-1])) + 1 if sums[-1] else 0


def similarity_table(study: Study) -> str:
    """phi at the corners of its matrix, compared with that of random directions."""
    names = study.names
    rows = [["phi(i, j)", "layers", "a", "b", "(1, 1)", "(1, b)", "(a, b)", "random (a, b)"]]
    for kind, random in study.random.items():
        grids = list(study.similarity_of(kind).values())
        a, b = random.shape
        rows.append([
            kind, str(len(grids)), str(a), str(b),
            *(f"{_mean([phi[at] for phi in grids]):.3f}" for at in ((0, 0), (0, -1), (-1, -1))),
            f"{random[-1, -1]:.3f}",
        ])  # fmt: skip
    note = f"directions of {study.matrix}; i of {names[0]}, j of {names[1]}; means over the layers."
    return f"{plain_table(rows)}\n{note}"


def amplification_table(study: Study) -> str | None:
    """The paper's table 7."""
    title = "||U^T W V^T||, U and V of"
    rows = [[title, "", "r", "dW", "W", "random", "||W||", "||dW||", "factor", "from", "to"]]
    for name, kind, layers in _groups(study):
        measured = [layer.amplification for layer in layers if layer.amplification]
        if not measured:
            continue
        factors = [each.factor for each in measured]
        columns = ("in_update", "in_own", "in_random", "weight", "change")
        rows.append([
            name, kind, _ranks(layers),
            *(f"{_mean([getattr(each, column) for each in measured]):.3g}" for column in columns),
            *(f"{value:.2f}" for value in (np.median(factors), min(factors), max(factors))),
        ])  # fmt: skip
    if len(rows) == 1:
        return None
    # The median, not the mean: one layer whose directions W hardly has would dominate a mean.
    note = "factor: ||dW|| / ||U^T W V^T||, median, least and greatest; the rest are means."
    return f"{plain_table(rows)}\n{note}"


def _ranks(layers: list[Layer]) -> str:
    ranks = sorted({layer.rank for layer in layers})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
