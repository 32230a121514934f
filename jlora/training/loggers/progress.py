"""The progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.system.progress import progress


class ProgressLogger:
    """A progress bar on stderr: steps, time left, loss, tokens per second, validation loss.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before a resume; they do not count in the estimate of the time left.
        stream: a text stream, by default stderr. If it is not a terminal it gets at most one line
            every 30 seconds instead of a moving bar.
    """

    def __init__(self, total_steps: int, start_step: int = 0, stream: Any = None) -> None:
        self._values: dict[str, str] = {}
        self._bar = progress(
            total_steps,
            done=start_step,
            leave=True,
            stream=stream,
            delay=0,
            # The bar takes the space that the other fields leave: everything fits in 80 columns.
            bar_format="{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
        )

    def log(self, record: Mapping[str, Any]) -> None:
        """Move the bar to the record's step and show its values."""
        if record.get("loss") is not None:
            self._values["loss"] = f"{float(record['loss']):.3f}"
        if record.get("tokens_per_s") is not None:
            self._values["tok/s"] = f"{float(record['tokens_per_s']):,.0f}"
        if record.get("valid_loss") is not None:
            self._values["valid"] = f"{float(record['valid_loss']):.4f}"
        self._bar.set_postfix(self._values, refresh=False)
        self._bar.update(max(0, int(record["step"]) - self._bar.n))

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        self._bar.close()
