"""Which numbers from 0 to 1 draw which token, by plain loops in float64."""

from __future__ import annotations

import numpy as np


def interval(logits, token, temperature, top_k=0, top_p=1.0, min_p=0.0) -> tuple[float, float]:
    """The numbers u that draw ``token``: from low to high, both nan if none does.

    Args:
        logits: (V,), minus infinity for tokens that may not come.
    """
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    order = [t for t in np.argsort(-p, kind="stable").tolist() if p[t] > 0]
    order = order[: top_k or None]
    whole, kept, mass = p[order].sum(), [], 0.0
    for t in order:  # until the mass is reached, the token that reaches it included
        if mass < top_p * whole and p[t] >= min_p * p[order[0]]:
            kept.append(t)
        mass += p[t]
    if token not in kept:
        return np.nan, np.nan
    ends = p[kept].cumsum() / p[kept].sum()
    place = kept.index(token)
    return float(ends[place - 1]) if place else 0.0, float(ends[place])


def is_drawn(logits, token, u, *, rounding=2e-6, **setting) -> bool:
    """Whether ``u`` draws the token, or would if it were less than ``rounding`` away."""
    low, high = interval(logits, token, **setting)
    return low - rounding <= u <= high + rounding
