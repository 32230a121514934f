"""Checkpoints: all that a run needs to go on as if it had never stopped.

A run keeps two, ``checkpoint`` and ``checkpoint.previous``, each a folder of tensors, progress and
``SHA256SUMS``. They are the newest and the one before; where the newest is damaged, the run goes on
from the other and does the steps between again, with the same result.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.system.console import warn
from jlora.system.errors import UserError
from jlora.system.files import (
    atomic_path,
    discard,
    os_error,
    read_text,
    replace_directory,
    sha256_of,
    write_text,
)

ADAPTER, OPTIMIZER, PROGRESS = "adapter.safetensors", "optimizer.safetensors", "progress.json"
#: In the form that `sha256sum -c SHA256SUMS` checks.
SUMS = "SHA256SUMS"


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

    def improves(self, valid_loss: float) -> bool:
        """Whether a validation loss is the best so far; one that is not finite never is."""
        best = self.best_valid_loss
        first = best is None or math.isnan(best)  # older versions kept a NaN
        return math.isfinite(valid_loss) and (first or valid_loss < best)


Checkpoint = tuple[Progress, dict[str, np.ndarray], dict[str, np.ndarray]]


class Damaged(Exception):
    """What is wrong with a checkpoint."""


def newest(run: Path) -> Path:
    """Where a run's newest checkpoint is."""
    return run / "checkpoint"


def previous(run: Path) -> Path:
    """Where the one before is."""
    return run / "checkpoint.previous"


def has_checkpoint(run: Path) -> bool:
    """Whether there is a checkpoint, good or not.

    A run that was killed between two renames has only the previous one.
    """
    return newest(run).is_dir() or previous(run).is_dir()


def save_checkpoint(
    run: Path,
    progress: Progress,
    adapter: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
) -> None:
    """Write a run's newest checkpoint; what was the newest is the previous one from then on.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_path(newest(run), directory=True, keep=previous(run)) as temporary:
        write_safetensors(temporary / ADAPTER, adapter)
        write_safetensors(temporary / OPTIMIZER, optimizer)
        write_text(temporary / PROGRESS, json.dumps(asdict(progress), indent=1) + "\n")
        sums = [f"{sha256_of(temporary / n)}  {n}\n" for n in (ADAPTER, OPTIMIZER, PROGRESS)]
        write_text(temporary / SUMS, "".join(sums))


def load_checkpoint(run: Path) -> Checkpoint:
    """Read a run's newest good checkpoint: progress, adapter and optimiser tensors.

    A damaged newest one is moved to ``checkpoint.damaged``, and a warning names both.

    Raises:
        UserError: there is none, none is good, or one cannot be read or moved.
    """
    if not has_checkpoint(run):
        raise UserError(f"{run}: no checkpoint to resume from; start the run without --resume")
    found, problems = None, []
    for folder in (newest(run), previous(run)):
        if folder.is_dir():
            try:
                found = read_checkpoint(folder)
                break
            except Damaged as error:
                problems.append(f"{folder} is damaged ({error})")
    if found is None:
        raise UserError(
            f"no good checkpoint to resume from: {' and '.join(problems)}; bring one back from a "
            "copy, or start a new run in another folder"
        )
    if problems:
        # Otherwise the next checkpoint would push the good one out and keep this one.
        aside = run / "checkpoint.damaged"
        try:
            discard(aside)
            replace_directory(newest(run), aside)
        except OSError as error:
            raise os_error("move", newest(run), error) from error
        warn(
            f"{problems[0]} and has been moved to {aside}; going on from the good "
            f"{previous(run)}, step {found[0].step}"
        )
    return found


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        Damaged: a file is missing, is not what its checksum says, or has no sense.
        UserError: a file cannot be read.
    """
    check_sums(folder)
    try:
        progress = Progress(**json.loads(read_text(folder / PROGRESS)))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{PROGRESS} is not of this version of jlora: {error}") from error
    return progress, read_safetensors(folder / ADAPTER), read_safetensors(folder / OPTIMIZER)


def check_sums(folder: Path) -> None:
    """Check that a checkpoint's files are the ones that were written."""
    names = (ADAPTER, OPTIMIZER, PROGRESS)
    if not (folder / SUMS).is_file():
        # Versions of jlora before the checksums wrote none.
        raise Damaged(
            f"no {SUMS}; if nothing else is wrong, make it there with `sha256sum {' '.join(names)} "
            f"> {SUMS}`"
        )
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii", "replace").splitlines()
        found = [f"{sha256_of(folder / name)}  {name}" for name in names]
    except FileNotFoundError as error:
        raise Damaged(f"no {Path(error.filename).name}") from error
    except OSError as error:
        raise os_error("read", folder, error) from error
    wrong = [line.split()[1] for line in found if line not in lines]
    if wrong:
        raise Damaged(f"{', '.join(wrong)} and {SUMS} do not agree")
