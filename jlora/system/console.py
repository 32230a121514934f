"""Messages to the user: single lines on standard error, so that results can be piped."""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from typing import Any

COLOURS = {"bold": 1, "red": 31, "green": 32, "yellow": 33}


def say(message: str) -> None:
    """Print a line of progress."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop training
        print(f"jlora: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a line about something that may not be what the user wants."""
    say(f"{paint('warning:', 'yellow', sys.stderr)} {message}")


def width_of(text: str) -> int:
    """How many columns a terminal gives a text: a Chinese character takes two, an accent none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def paint(text: str, colour: str, stream: Any) -> str:
    """The text in a colour of `COLOURS`, or as it is where the stream shows none."""
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if has_colours(stream) else text


def has_colours(stream: Any) -> bool:
    """Whether a stream is a terminal, and the user has not turned colours off (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal(stream) and not plain


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; False for whatever a test or a notebook puts there."""
    return bool(getattr(stream, "isatty", lambda: False)())
