"""Rotary positions (Su et al., arXiv 2104.09864): settings, angles, and the layers that turn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jlora.models.config_fields import number
from jlora.system.runtime import jt, nn

CONTEXT = "original_max_position_embeddings"
#: Form of scaling -> what it needs.
ROPE_SETTINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", CONTEXT),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor", CONTEXT),
}
OPTIONAL = {"longrope": ("factor", "attention_factor")}


@dataclass(frozen=True)
class Rope:
    """The angles of one kind of rotary positions.

    Attributes:
        frequencies: angle per position of each pair of dimensions, (R / 2,) float32.
        limit: the longest text for which these are right; None: there is none.
        long: what longer texts take, (R / 2,) float32; None: they are refused.
        amplitude: what turned numbers are multiplied by.
    """

    frequencies: np.ndarray
    limit: int | None = None
    long: np.ndarray | None = None
    amplitude: float = 1.0

    def is_long(self, lengths: np.ndarray, new: int | np.ndarray) -> np.ndarray:
        """Which texts take the long frequencies; ``new``: how many of their tokens come now.

        Raises:
            ValueError: a text that is too long, or that outgrows the limit after some of its keys
                were turned by the short frequencies.
        """
        longer = lengths > self.limit
        if longer.any() and self.long is None:
            raise ValueError(
                f"a text of {lengths.max()} tokens is longer than max_position_embeddings "
                f"{self.limit}, and rope_type dynamic is not computed beyond"
            )
        past = lengths - new
        if (longer & (past > 0) & (past <= self.limit)).any():
            raise ValueError(
                f"the text outgrows {CONTEXT} {self.limit}, beyond which rope_type longrope turns "
                "all of it by other angles; generate less, or run the whole text without a cache"
            )
        return longer

    def turns(self, position: jt.Var, lengths) -> tuple[jt.Var, jt.Var]:
        """Cosines and sines of positions (B, T), (B, T, R / 2) each; ``lengths()`` of the texts."""
        frequencies = self.frequencies
        if self.limit is not None:
            longer = self.is_long(lengths(), position.shape[1])[..., None]
            if longer.any():
                frequencies = np.where(longer, self.long, frequencies)
        angle = position.float32().unsqueeze(-1) * jt.array(frequencies)
        cos, sin = jt.cos(angle), jt.sin(angle)
        return (cos, sin) if self.amplitude == 1 else (cos * self.amplitude, sin * self.amplitude)


def rope_settings(config: dict, partial: float | None = None) -> tuple[float, dict | None]:
    """Base and scaling of the rotary embedding that a config.json asks for.

    Older files have ``rope_theta`` and ``rope_scaling``; transformers 5 writes both as one dict,
    ``rope_parameters``.

    Args:
        partial: the share of a head that is turned, which the file may name again; None: all.

    Returns:
        theta, and ``{"rope_type": ..., number by number of ROPE_SETTINGS}`` or None for no scaling.

    Raises:
        ValueError: another kind of scaling, a number that is missing or none, or two settings that
            contradict each other.
    """
    found = [
        one_rope_setting(config, key, partial)
        for key in ("rope_scaling", "rope_parameters")
        if config.get(key) not in (None, {})
    ] or [one_rope_setting({**config, "rope_scaling": {}}, "rope_scaling", partial)]
    if found[0] != found[-1]:
        raise ValueError("rope_scaling and rope_parameters contradict each other; leave one out")
    return found[0]


def one_rope_setting(config: dict, key: str, partial: float | None) -> tuple[float, dict | None]:
    """What one of the two fields says, see `rope_settings`."""
    settings = config[key]
    if not isinstance(settings, dict):
        raise ValueError(f"{key} is {settings!r}, not an object with rope_type")
    layers = [name for name, value in settings.items() if isinstance(value, dict)]
    if layers:
        raise ValueError(f"{key} by layer type ({', '.join(layers)}) is not supported")
    share = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1 if partial is None else partial):
        raise ValueError(f"partial_rotary_factor {share!r} is not supported")
    where = f"{key}.rope_theta" if "rope_theta" in settings else "rope_theta"
    theta = number(where, settings.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = settings.get("rope_type") or settings.get("type")
    if kind is None:
        others = [name for name in settings if name in sum(ROPE_SETTINGS.values(), ())]
        if others:
            raise ValueError(
                f"{key} has {', '.join(others)} but no rope_type; write one of default, "
                f"{', '.join(ROPE_SETTINGS)}"
            )
    if kind in (None, "default"):
        return theta, None
    if kind not in ROPE_SETTINGS:
        raise ValueError(f"{key} of type {kind!r} is not supported")
    if kind in ("llama3", "longrope"):  # where transformers looks for it
        given = {CONTEXT: config.get("max_position_embeddings", 2048), **settings}
        settings = {**given, CONTEXT: config.get(CONTEXT, given[CONTEXT])}
    missing = [name for name in ROPE_SETTINGS[kind] if name not in settings]
    if missing:
        raise ValueError(f"{key} of type {kind!r} lacks {', '.join(missing)}")
    names = [*ROPE_SETTINGS[kind], *(n for n in OPTIONAL.get(kind, ()) if settings.get(n))]
    values = {name: _numbers(f"{key}.{name}", settings[name]) for name in names}
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(f"{key}.high_freq_factor must be above low_freq_factor")
    return theta, {"rope_type": kind, **values}


def _numbers(name: str, value) -> float | list[float]:
    """A number above 0, or of longrope's two fields a list of them."""
    if not name.endswith(("short_factor", "long_factor")):
        return number(name, value)
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}, not a list of numbers")
    return [number(name, each) for each in value]


def make_rope(theta: float, size: int, scaling: dict | None, context: int) -> Rope:
    """The angles that a config asks for, as transformers computes them.

    Args:
        size: how many numbers of a head are turned, R.
        scaling: see `rope_settings`.
        context: max_position_embeddings.

    Raises:
        ValueError: longrope's lists have another length.
    """
    half = np.arange(0, size, 2, dtype=np.float64) / size
    frequencies = 1.0 / theta**half
    kind = None if scaling is None else scaling["rope_type"]
    if kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "dynamic":  # beyond the context its base grows with the text
        return Rope(frequencies.astype(np.float32), context)
    elif kind == "longrope":
        return _longrope(frequencies, scaling, context)
    elif kind == "llama3":
        old_context = scaling[CONTEXT]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # How far each wave lies between "longer than the old context" (0) and "short" (1).
        turns = old_context * frequencies / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return Rope(frequencies.astype(np.float32))


def _longrope(frequencies: np.ndarray, scaling: dict, context: int) -> Rope:
    """LongRoPE (arXiv 2402.13753): one list of divisors up to the old context, one beyond."""
    for name in ("short_factor", "long_factor"):
        if len(scaling[name]) != len(frequencies):
            raise ValueError(
                f"rope_scaling.{name} has {len(scaling[name])} numbers, and a head "
                f"{len(frequencies)} pairs that turn"
            )
    old_context = scaling[CONTEXT]
    factor = scaling.get("factor", context / old_context)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        grows = factor > 1
        amplitude = math.sqrt(1 + math.log(factor) / math.log(old_context)) if grows else 1.0
    short, long = (
        (frequencies / scaling[name]).astype(np.float32) for name in ("short_factor", "long_factor")
    )
    return Rope(short, int(old_context), long, amplitude)


class Rotary(nn.Module):
    """Turns each pair (x[i], x[i + R/2]) of a head's first R numbers by its position's angle."""

    def execute(self, x: jt.Var, cos: jt.Var, sin: jt.Var) -> jt.Var:
        """x (B, T, H, D), cos and sin (B, T, R / 2) -> (B, T, H, D)."""
        half = cos.shape[-1]
        a, b = x[..., :half], x[..., half : 2 * half]
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        turned = [a * cos - b * sin, b * cos + a * sin]
        rest = [x[..., 2 * half :]] if 2 * half < x.shape[-1] else []
        return jt.concat([*turned, *rest], dim=-1)


class InterleavedRotary(nn.Module):
    """`Rotary` of neighbours, (x[2 i], x[2 i + 1])."""

    def execute(self, x: jt.Var, cos: jt.Var, sin: jt.Var) -> jt.Var:
        B, T, H, D = x.shape
        half = cos.shape[-1]
        pairs = x[..., : 2 * half].reshape(B, T, H, half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        turned = jt.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
        turned = turned.reshape(B, T, H, 2 * half)
        return turned if 2 * half == D else jt.concat([turned, x[..., 2 * half :]], dim=-1)
