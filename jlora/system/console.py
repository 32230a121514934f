"""Messages to the user: single lines on standard error, so that results can be piped."""

from __future__ import annotations

import contextlib
import sys


def say(message: str) -> None:
    """Print a line of progress."""
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not stop training
        print(f"jlora: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a line about something that may not be what the user wants."""
    say(f"warning: {message}")
