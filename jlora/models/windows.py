"""Sliding windows: which layers see only the last tokens, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.models.config_fields import number, shown

FULL, SLIDING = "full_attention", "sliding_attention"


def check_unused_windows(config: Mapping[str, Any]) -> None:
    """Raises: ValueError: the windows are switched off, and layers listed that have one."""
    types = config.get("layer_types")
    if isinstance(types, list) and SLIDING in types:
        raise ValueError(f"layer_types has {SLIDING}, but use_sliding_window is not true")


def read_windows(
    config: Mapping[str, Any], layers: int, own_types: list[str], listed: bool
) -> tuple[int | None, list[str] | None]:
    """The window and the kind of each layer.

    Args:
        own_types: the kinds where the file does not list them.
        listed: whether transformers' class reads ``layer_types``.

    Returns:
        ``sliding_window`` and ``layer_types``; None and None where no layer has a window.

    Raises:
        ValueError: an unknown kind, a wrong number of them, or a window that is none.
    """
    types = config.get("layer_types")
    if types is not None and (
        not isinstance(types, list) or not set(map(str, types)) <= {FULL, SLIDING}
    ):
        raise ValueError(f"layer_types {types!r}: only {FULL} and {SLIDING} are supported")
    if types and not listed and set(types) != {FULL}:
        raise ValueError(f"layer_types {types!r}: only {FULL} is supported")
    types = types if types and listed else own_types
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, and the model {layers} layers")
    if SLIDING not in types:
        return None, None
    window = config.get("sliding_window")
    if type(window) is not int:
        number("sliding_window", window)
        raise ValueError(f"sliding_window is {shown(window)}, no whole number")
    number("sliding_window", window)
    return window, types
