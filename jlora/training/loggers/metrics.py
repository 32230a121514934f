"""metrics.jsonl: the records of a run, one JSON object for each line."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError
from jlora.system.files import atomic_path, os_error
from jlora.training.loggers.base import plain

METRICS_NAME = "metrics.jsonl"


class MetricsLogger:
    """Appends a JSON line for each record to ``path``; `log` returns when the line is written.

    Args:
        path: usually ``RUN/metrics.jsonl``.
        resume_step: None starts an empty file. A number continues the file of a run that is resumed
            at that step: later lines, which the run will write again, are removed first.

    Raises:
        UserError: the file cannot be written, or the file to continue is damaged.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is not None and self.path.exists():
            truncate_metrics(self.path, resume_step)
        else:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(b"")
        try:
            # Unbuffered: each record is one write, and none is lost if the process is killed.
            self._handle = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise os_error("write", self.path, error) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record``; NaN and infinity, which JSON does not have, are written as null."""
        values = {key: plain(value) for key, value in record.items()}
        line = json.dumps(values).encode() + b"\n"
        end = None
        try:
            end = self._handle.seek(0, 2)
            written = self._handle.write(line)
            if written != len(line):
                # A full disk may have written the first part of the line: remove it.
                raise OSError(28, "No space left on device")
        except OSError as error:
            if end is not None:
                with contextlib.suppress(OSError):
                    self._handle.truncate(end)
            raise os_error("write", self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl.

    An incomplete last line, left by a killed process, is ignored.

    Returns:
        the records in the file's order, each with an integer ``step``.

    Raises:
        UserError: the file is missing or unreadable, or a line before the last is damaged.
    """
    return [record for record, _ in _parse(Path(path))]


def truncate_metrics(path: str | Path, step: int) -> None:
    """Remove the records after ``step`` and an incomplete last line; atomic, other lines are kept.

    Raises:
        UserError: the file is missing, damaged or cannot be written.
    """
    path = Path(path)
    kept = [line + b"\n" for record, line in _parse(path) if record["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Training time of a run; None if the records have no ``seconds``.

    If the clock starts again at zero, as in a resumed run, the times are added.
    """
    total, previous = 0.0, None
    for record in metrics:
        seconds = record.get("seconds")
        if isinstance(seconds, (int, float)) and math.isfinite(seconds):
            if previous is not None and seconds < previous:
                total += previous
            previous = seconds
    return None if previous is None else total + previous


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The records of ``path``, each with the bytes of its line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise os_error("read", path, error) from error
    while lines and not lines[-1].strip():
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            problem = _problem(record)
        except ValueError:  # not JSON, or not UTF-8
            if number == len(lines):
                break
            problem = "is not JSON"
        if problem:
            raise UserError(
                f"{path}:{number}: the line {problem}; metrics have one JSON object a line with a "
                "whole `step`: remove the line or restore the file"
            )
        parsed.append((record, line))
    return parsed


def _problem(record: object) -> str | None:
    """What is wrong with ``record`` as a record of metrics, or None."""
    if not isinstance(record, dict):
        return "is not a JSON object"
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or abs(step) > 2**53:
        return "has no whole number `step`"
    for key in ("loss", "valid_loss", "lr", "tokens_per_s", "seconds"):
        value = record.get(key)
        if value is None or isinstance(value, float):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**53:
            return f"has no number in `{key}`"
    return None
