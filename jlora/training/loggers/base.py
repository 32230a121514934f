"""The interface of a logger, and several loggers as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jlora.system.console import warn
from jlora.system.errors import UserError, one_line


class Logger(Protocol):
    """Anything that takes training records."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish; called once, after the last record."""


# What a service's library may raise; some call sys.exit when a login fails.
FAILURES = (Exception, SystemExit)


class Loggers:
    """Several loggers as one; a logger that fails is switched off and training goes on.

    The exception is a `UserError`: `MetricsLogger` raises it when the run folder can no longer be
    written, and then the checkpoints cannot be written either.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give ``record`` to every logger that has not been switched off."""
        for logger in list(self.loggers):
            try:
                logger.log(record)
            except UserError:
                raise
            except FAILURES as error:
                self.loggers.remove(logger)
                warn(f"{_name(logger)} failed and is switched off ({_reason(error)})")

    def close(self) -> None:
        """Close every logger, even if closing one of them fails."""
        loggers, self.loggers = self.loggers, []
        failure = None
        for logger in loggers:
            try:
                logger.close()
            except UserError as error:
                failure = error
            except FAILURES as error:
                warn(f"{_name(logger)} did not close well ({_reason(error)})")
        if failure is not None:
            raise failure

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def plain(value: Any) -> Any:
    """A value for JSON: numpy scalars become Python numbers, NaN and infinity None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _name(logger: Logger) -> str:
    return type(logger).__name__


def _reason(error: BaseException) -> str:
    name, text = type(error).__name__, one_line(error)
    return name if text == name else f"{name}: {text}"
