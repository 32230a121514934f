"""Loggers of training records: metrics.jsonl, the progress bar, services such as TensorBoard.

A record is a flat dict with an integer ``step`` (number of finished steps, from 1) and its values:
``{"step", "loss", "lr", "tokens_per_s", "seconds"}`` from training, where ``seconds`` is
the training time so far, and ``{"step", "valid_loss"}`` from validation.
"""

from __future__ import annotations

from jlora.training.loggers.base import Logger, Loggers
from jlora.training.loggers.metrics import (
    METRICS_NAME,
    MetricsLogger,
    read_metrics,
    training_seconds,
    truncate_metrics,
)
from jlora.training.loggers.progress import ProgressLogger
from jlora.training.loggers.services import (
    LOGGERS,
    ServiceLogger,
    SwanLabLogger,
    TensorBoardLogger,
    WandbLogger,
    check_loggers,
    make_logger,
)

__all__ = [
    "LOGGERS",
    "METRICS_NAME",
    "Logger",
    "Loggers",
    "MetricsLogger",
    "ProgressLogger",
    "ServiceLogger",
    "SwanLabLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "make_logger",
    "read_metrics",
    "training_seconds",
    "truncate_metrics",
]
