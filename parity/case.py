"""Cases, and the comparison of the two sides' results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RULES = ("largest", "each", "exact")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        row: the row of the table that it belongs to.
        name: unique in its topic, and usable as the name of a folder.
        settings: what the two sides need to know; JSON values.
        tolerance: largest relative difference allowed.
        relative_to: what a difference is divided by: "largest", the largest magnitude in the
            reference's array; "each", every reference value itself; "exact", nothing may differ.
        golden: whether `parity.golden` stores it for the tests.
    """

    row: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    relative_to: str = "largest"
    golden: bool = False

    def __post_init__(self):
        assert self.relative_to in RULES, self.relative_to


@dataclass(frozen=True)
class Outcome:
    """The result of comparing the two sides of a case.

    ``where`` names the quantity that differs most; ``problem`` says what is wrong, or is empty.
    """

    absolute: float
    relative: float
    where: str
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem


def compare(
    case: Case, reference: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]
) -> Outcome:
    """Compare jlora's quantities with the reference's; both sides must have the same names."""
    alone = sorted(set(reference) ^ set(ours))
    if alone or not reference:
        return Outcome(
            math.inf, math.inf, "", f"only one side gave {', '.join(alone) or 'nothing'}"
        )
    worst = Outcome(0.0, 0.0, "", "")
    for name, expected in reference.items():
        found = _difference(case, name, np.asarray(expected), np.asarray(ours[name]))
        if found.problem and not worst.problem or (
            bool(found.problem) == bool(worst.problem) and found.relative > worst.relative
        ):  # fmt: skip
            worst = found
    return worst


def _difference(case: Case, name: str, expected: np.ndarray, found: np.ndarray) -> Outcome:
    if expected.shape != found.shape:
        problem = f"{name} is {found.shape} instead of {expected.shape}"
        return Outcome(math.inf, math.inf, name, problem)
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return Outcome(math.inf, math.inf, name, f"{name} is not finite")
    difference = np.abs(expected - found)
    absolute = float(difference.max(initial=0.0))
    scale = np.abs(expected)
    if case.relative_to != "each":
        scale = scale.max(initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = float(np.where(difference == 0, 0.0, difference / scale).max(initial=0.0))
    limit = 0.0 if case.relative_to == "exact" else case.tolerance
    problem = f"{name} differs by {relative:.3g}, more than {limit:g}" if relative > limit else ""
    return Outcome(absolute, relative, name, problem)
