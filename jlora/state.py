"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jlora.errors import UserError
from jlora.files import atomic_path, read_text, recover_directory, write_text
from jlora.formats.safetensors_file import read_safetensors, write_safetensors


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: updates made. The batches and the random numbers of an update are functions of the
            seed and of this number, so nothing else need be kept of them.
        best_valid_loss, best_step: of the validation that was best so far.
        seconds: training time so far.
        fingerprint: hash of what decides the course of the run; a resumed run must agree.
    """

    step: int = 0
    best_valid_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    fingerprint: str = ""


def save_checkpoint(
    folder: Path,
    progress: Progress,
    adapter: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
) -> None:
    """Write a checkpoint folder; the one before stays whole until the new one is.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_path(folder, directory=True) as temporary:
        write_safetensors(temporary / "adapter.safetensors", adapter)
        write_safetensors(temporary / "optimizer.safetensors", optimizer)
        write_text(temporary / "progress.json", json.dumps(asdict(progress), indent=1) + "\n")


def load_checkpoint(folder: Path) -> tuple[Progress, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read a checkpoint folder: progress, adapter and optimiser tensors.

    Raises:
        UserError: there is none, or it is damaged.
    """
    recover_directory(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder.parent}: no checkpoint to resume from; start the run without --resume"
        )
    path = folder / "progress.json"
    try:
        progress = Progress(**json.loads(read_text(path)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of this version ({error}); start without --resume"
        ) from error
    adapter = read_safetensors(folder / "adapter.safetensors")
    return progress, adapter, read_safetensors(folder / "optimizer.safetensors")
