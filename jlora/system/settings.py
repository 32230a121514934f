"""How settings classes check themselves: in ``__post_init__``, so that no wrong one can exist.

The classes are plain dataclasses, for recipes and for Python alike. A recipe adds what only a text
can get wrong: unknown names and values of a wrong kind (`jlora.runs.recipe`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jlora.system.errors import UserError


def check_setting(holds: bool, name: str, value: Any, rule: str) -> None:
    """Raises UserError unless ``holds``, what ``rule`` says of the setting."""
    if not holds:
        raise UserError(f"{name} is {value}, but must be {rule}")


def check_least(settings: Any, least: float, *names: str) -> None:
    """Raises UserError unless all of these settings are at least that large; NaN is not."""
    for name in names:
        value = getattr(settings, name)
        if not value >= least:
            raise UserError(f"{name} must be at least {least}, not {value}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises UserError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}")
