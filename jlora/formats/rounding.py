"""Rounding float32 weights to narrower types, and measuring how much of an adapter that loses.

Rounding is done as by the gguf package (llama.cpp's own): to nearest, ties to even, for F16 and
BF16; blocks of 32 with a scale for the Q kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jlora.formats.gguf_kinds import dequantize, quantize
from jlora.system.errors import UserError


def narrow(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    """A float32 array converted to ``kind`` ("F32", "F16", "BF16", "Q8_0", ...).

    Args:
        name: the array's name in error messages.

    Returns:
        float32 or float16 of the same shape; for other kinds the bytes, uint8 (..., bytes a row).

    Raises:
        UserError: a value is too large for float16, which is also the type of a block's scale.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        stored = quantize(array, kind)
        fits = kind in ("F32", "BF16") or np.isfinite(widen(stored, kind)).all()
    if not fits:
        raise UserError(
            f"{name} has values up to {np.abs(array).max():.3g}, too large for {kind}; "
            "take bfloat16 or float32"
        )
    return stored


def widen(stored: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `narrow`: float32 in the array's own shape."""
    return dequantize(stored, kind).astype(np.float32, copy=False)


#: Numbers of the rows that `narrow_rows` converts together; the steps between stay in the cache.
TOGETHER = 1 << 18


def narrow_rows(name: str, array: np.ndarray, kind: str) -> Iterator[tuple[np.ndarray, float]]:
    """`narrow` some rows after the others.

    Returns:
        Of each piece what is stored, and the sum of the squares of what rounding changed in it.

    Raises:
        UserError: as `narrow`.
    """
    count = max(1, TOGETHER * len(array) // max(1, array.size)) if array.ndim > 1 else len(array)
    for start in range(0, len(array), max(1, count)):
        rows = array[start : start + count]
        stored = narrow(name, rows, kind)
        lost = 0.0 if kind == "F32" else norm(widen(stored, kind) - rows) ** 2
        yield stored, lost


def norm(array: np.ndarray) -> float:
    """The root of the sum of squares, in float64."""
    return float(np.sqrt(np.square(array, dtype=np.float64).sum()))


@dataclass(frozen=True)
class PrecisionLoss:
    """How much of an adapter's change may be lost by rounding the merged weights.

    With base weights W, merged weights W' (float32) and their rounded form R(W'), the loss is
    ``rms(R(W') - W') / rms(W' - W)``: 0 for float32, 1 if the rounding error is as large as the
    change itself. Both rms are taken over the weights that the adapter changes.
    It is a bound, not a prediction: the rounding error is spread evenly over all weights, and
    rounding the base weights alone gives about the same error.

    Attributes:
        kind: the narrower type.
        overall: the loss over all changed weights together.
        worst: the largest loss of a single tensor, which is ``tensor``.
    """

    kind: str
    overall: float
    worst: float
    tensor: str

    def __str__(self) -> str:
        if self.overall >= 1:
            return (
                f"{self.kind} rounds the changed weights by {self.overall:.1f} times the adapter's "
                f"change (rms; worst {self.worst:.1f} times, in {self.tensor}): take a wider type, "
                "or keep the adapter separate from its base model"
            )
        return (
            f"{self.kind} keeps {kept(self.overall)} of the adapter's change (the rounding error "
            f"is {percent(self.overall)} of it, rms); worst {self.tensor}: {kept(self.worst)}"
        )


def kept(loss: float) -> str:
    return percent(max(0.0, 1 - loss))


def percent(share: float) -> str:
    """A percentage with enough digits to distinguish 99.99 % from 100 %."""
    return f"{100 * share:.3g} %" if share < 0.1 else f"{100 * share:.2f} %"


def precision_loss(
    kind: str, errors: Mapping[str, float], changes: Mapping[str, float]
) -> PrecisionLoss | None:
    """The `PrecisionLoss` from the norms of each tensor's rounding error and of its change.

    Returns:
        None if nothing is changed, for example by an untrained adapter.
    """
    shares = {name: errors[name] / change for name, change in changes.items() if change > 0}
    if not shares:
        return None
    error = np.sqrt(sum(errors[name] ** 2 for name in shares))
    change = np.sqrt(sum(changes[name] ** 2 for name in shares))
    worst = max(shares, key=shares.__getitem__)
    return PrecisionLoss(kind, float(error / change), shares[worst], worst)
