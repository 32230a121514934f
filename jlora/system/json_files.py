"""JSON files that hold one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError, kind_of
from jlora.system.files import read_text


def read_object(path: str | Path, way_out: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        way_out: what to do where it holds none, such as "download it again".

    Raises:
        UserError: the file cannot be read, is not JSON (with the line), or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); {way_out}") from error
    except (ValueError, RecursionError) as error:  # an endless number; brackets in brackets
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not JSON ({reason}); {way_out}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object, but {kind_of(value)}; {way_out}")
    return value
