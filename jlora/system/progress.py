"""The progress bar of long work, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from jlora.system.console import is_terminal

#: Seconds until a bar is shown, and between two of its lines.
TERMINAL = {"delay": 1.0, "mininterval": 0.2}
#: (tqdm shows a slow one after ``maxinterval`` whatever ``mininterval`` says: 10 s by default.)
PIPE = {"delay": 30.0, "mininterval": 30.0, "maxinterval": 30.0}


def progress(
    total: int | None | Iterable,
    what: str = "",
    unit: str = "",
    *,
    done: int = 0,
    leave: bool = False,
    stream: Any = None,
    **options: Any,
) -> Any:
    """A tqdm bar: ``update(n)`` moves it in a ``with`` statement, a ``for`` by itself.

    Work that takes less than a second shows none. Into a file or a pipe go no moving bars: at most
    one line every 30 seconds.

    Args:
        total: how many units there are, None if that is unknown; or a list to iterate over.
        what: is done, such as "decoding".
        unit: what is counted; "B" counts bytes, as kB, MB and GB.
        done: how many units were done before; they do not count in the estimate of the time left.
        leave: keep the finished bar on the screen.
        stream: a text stream, by default stderr.
        options: tqdm's own.
    """
    from tqdm import tqdm

    stream = sys.stderr if stream is None else stream
    terminal = is_terminal(stream)
    items = total if isinstance(total, Iterable) else None
    return tqdm(
        items,
        total=total if isinstance(total, int) else None,
        desc=what or None,
        unit=unit if unit == "B" else f" {unit}" if unit else "",
        unit_scale=unit == "B",
        initial=done,
        leave=leave,
        file=stream,
        dynamic_ncols=terminal,
        **{**(TERMINAL if terminal else PIPE), **options},
    )
