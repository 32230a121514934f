"""The exception that users see as a single line, and words for its messages."""

from __future__ import annotations

import re
from typing import Any


class UserError(Exception):
    """Something the user can fix: a bad file, a bad setting, a missing program.

    The message is one line that says what is wrong, where, and what to do. The command line
    prints it as ``jlora: error: MESSAGE`` and exits with code 2; library users can catch it.
    """

    def __init__(self, message: str = ""):
        # Names from a damaged or hostile file may hold control characters: the message stays one
        # line, and cannot move the terminal's cursor.
        super().__init__(re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(message)))


def kind_of(value: Any) -> str:
    """The kind of a value from a JSON or YAML file, in plain words: "a number", "null"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {
        str: "a string", dict: "an object", list: "a list", tuple: "a list",
        int: "a number", float: "a number",
    }  # fmt: skip
    return kinds.get(type(value), f"of type {type(value).__name__}")


def one_line(error: Any) -> str:
    """An exception's text, or any other, without line breaks; its kind where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
