"""Where training records go: metrics.jsonl, the progress bar, Weights & Biases.

A record is a flat dict with an integer ``step`` (steps finished, from 1) and the values of that
moment: ``{"step", "loss", "lr", "tokens_per_s", "seconds"}`` from training, where ``seconds`` is
the training time so far, and ``{"step", "valid_loss"}`` from validation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jlora.errors import UserError
from jlora.files import atomic_path, os_error

METRICS_NAME = "metrics.jsonl"


class Logger(Protocol):
    """Anything that takes training records."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish; called once, after the last record."""


class Loggers:
    """Several loggers as one; a logger that fails is switched off and training goes on.

    The exception is a `UserError`: `MetricsLogger` raises it when the run folder can no longer be
    written, and then the checkpoints cannot be written either.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give ``record`` to every logger still on."""
        for logger in list(self.loggers):
            try:
                logger.log(record)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (a foreign library: training goes on)
                self.loggers.remove(logger)
                _warn(f"{_name(logger)} failed and is switched off ({_one_line(error)})")

    def close(self) -> None:
        """Close every logger, also when one of them fails to."""
        loggers, self.loggers = self.loggers, []
        failure = None
        for logger in loggers:
            try:
                logger.close()
            except UserError as error:
                failure = error
            except Exception as error:  # noqa: BLE001
                _warn(f"{_name(logger)} did not close well ({_one_line(error)})")
        if failure is not None:
            raise failure

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class MetricsLogger:
    """Appends one JSON line a record to ``path``; a line is on its way to the disk when `log` ends.

    Args:
        path: usually ``RUN/metrics.jsonl``.
        resume_step: None starts an empty file; a number continues the file of a run resumed at
            that step: later lines, which the resumed run will write again, are cut first.

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
            # Unbuffered: each record is one write, which a killed process cannot lose.
            self._handle = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise os_error("write", self.path, error) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append ``record``; NaN and infinity, which JSON has not, are written as null."""
        plain = {key: _plain(value) for key, value in record.items()}
        line = json.dumps(plain).encode() + b"\n"
        end = None
        try:
            end = self._handle.seek(0, 2)
            written = self._handle.write(line)
            if written != len(line):
                # A disk that fills up takes the first part of the line: take that back.
                raise OSError(28, "No space left on device")
        except OSError as error:
            if end is not None:
                with contextlib.suppress(OSError):
                    self._handle.truncate(end)
            raise os_error("write", self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


class ProgressLogger:
    """A progress bar on stderr: steps, time left, loss, tokens per second, validation loss.

    Args:
        total_steps: steps of the whole run.
        start_step: steps done before a resume; they do not count for the time left.
        stream: a text stream, by default stderr. A stream that is no terminal gets a line at most
            every 30 seconds instead of a moving bar.
    """

    def __init__(self, total_steps: int, start_step: int = 0, stream: Any = None) -> None:
        from tqdm import tqdm

        stream = sys.stderr if stream is None else stream
        terminal = bool(getattr(stream, "isatty", lambda: False)())
        self._values: dict[str, str] = {}
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=stream,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 30.0,
            # The bar takes the room that the rest leaves, so that 80 columns show everything.
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


class WandbLogger:
    """Sends the records to Weights & Biases (``pip install wandb``).

    By default nothing leaves the machine: ``mode="offline"`` writes below ``folder``, and
    ``wandb sync`` sends it later.

    Args:
        project: name of the wandb project.
        name: name of the run; None lets wandb choose.
        config: settings shown with the run.
        folder: where wandb keeps its files.
        mode: "offline", "online" or "disabled".

    Raises:
        UserError: wandb is not installed, or ``mode`` is none of the three.
    """

    def __init__(
        self,
        project: str = "jlora",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        mode: str = "offline",
    ) -> None:
        modes = ("offline", "online", "disabled")
        if mode not in modes:
            raise UserError(f"wandb mode {mode!r} is unknown; choose one of {', '.join(modes)}")
        if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
            raise UserError("wandb is not installed; run `pip install wandb` or leave wandb out")
        self._settings = {
            "project": project,
            "name": name,
            "config": dict(config or {}),
            "dir": None if folder is None else str(folder),
            "mode": mode,
        }
        self._run: Any = None

    def log(self, record: Mapping[str, Any]) -> None:
        """Send ``record``; the run is opened with the first one.

        Opening it late puts a refused key or a lost network under the care of `Loggers`.
        """
        if self._run is None:
            import wandb

            self._run = wandb.init(**self._settings)
        values = {key: _plain(value) for key, value in record.items() if key != "step"}
        self._run.log(values, step=int(record["step"]))

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl.

    A last line that a killed process left torn is dropped.

    Returns:
        the records in the file's order, each with an integer ``step``.

    Raises:
        UserError: the file is missing or unreadable, or a line before the last is damaged.
    """
    return [record for record, _ in _parse(Path(path))]


def truncate_metrics(path: str | Path, step: int) -> None:
    """Drop the records after ``step`` and a torn last line, atomically; kept lines do not change.

    Raises:
        UserError: the file is missing, damaged or cannot be written.
    """
    path = Path(path)
    kept = [line + b"\n" for record, line in _parse(path) if record["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Training time of a run, None when the records have no ``seconds``.

    A clock that starts again (a resumed run that counts from its own start) is added up.
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
    """What keeps ``record`` from being a record of metrics, None when nothing does."""
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


def _plain(value: Any) -> Any:
    """A JSON value: numpy scalars as Python numbers, NaN and infinity as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _name(logger: Logger) -> str:
    return type(logger).__name__


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _warn(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop training
        print(f"jlora: warning: {message}", file=sys.stderr)
