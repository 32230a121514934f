"""What other packages add to jlora: entry points of theirs, loaded when they are asked for."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from jlora.system.errors import UserError


@functools.lru_cache
def plugins(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of a group, such as ``jlora.tasks``, by name."""
    found = importlib.metadata.entry_points()
    chosen = found.select(group=group) if hasattr(found, "select") else found.get(group, ())
    return {point.name: point for point in chosen}


def load_plugin(group: str, name: str, kind: type) -> Any:
    """The object that an entry point names; None where there is no such entry point.

    Args:
        kind: what it must be.

    Raises:
        UserError: it cannot be imported, or is something else.
    """
    point = plugins(group).get(name)
    if point is None:
        return None
    try:
        found = point.load()
    except Exception as error:  # whatever another package does when it is imported
        raise UserError(
            f"{name} of another package ({group}, {point.value}) cannot be imported: {error}; "
            "repair or uninstall that package"
        ) from error
    if not isinstance(found, kind):
        raise UserError(
            f"{name} of another package ({group}, {point.value}) is no {kind.__name__}; repair or "
            "uninstall that package"
        )
    return found
