"""What is told on the way; standard output stays free for results."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """Print a line for whoever watches, on standard error."""
    print(f"jlora: {message}", file=sys.stderr, flush=True)
