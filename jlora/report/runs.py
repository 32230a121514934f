"""Reading a run folder, for the list of runs and for the report."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jlora.report import environment
from jlora.report.plots import series
from jlora.report.tables import visible
from jlora.system.errors import UserError
from jlora.system.files import os_error, read_text
from jlora.system.json_files import read_object
from jlora.system.lock import is_held
from jlora.training.loggers import METRICS_NAME, read_metrics, training_seconds

CONFIG_NAME = "config.yaml"
SCORES_NAME = "scores.json"
PREDICTIONS_NAME = "predictions.jsonl"
REPORT_NAME = "report.html"

T = TypeVar("T")


@dataclass
class RunSummary:
    """One run folder.

    Attributes:
        name: the folder's name, as one printable line.
        config, config_text: config.yaml; {} and None without one.
        records: metrics.jsonl.
        steps: finished updates; total_steps: of the whole training, or None if unknown.
        best_valid_loss: in nats per token, reached at best_step.
        before, after: scores as fractions, {} if there are none.
        seconds: training time; peak_memory: bytes.
        environment: environment.json.
        modified: time of the newest file in the folder, in seconds since the epoch.
        problems: one message, with file and line, for each damaged file.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    total_steps: int | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    modified: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def model(self) -> str | None:
        """The model of the recipe."""
        return _text(self.setting("model"))

    @property
    def task(self) -> str | None:
        """The task of the recipe."""
        return _text(self.setting("data.task"))

    @property
    def seed(self) -> int | None:
        """train.seed."""
        seed = self.setting("train.seed")
        return seed if type(seed) is int else None

    @property
    def method(self) -> str | None:
        """``lora r=4``, ``full``, ...; None without a recipe."""
        if not self.config:
            return None
        method = _text(self.setting("method")) or "lora"
        rank = self.setting("lora.r")
        return f"{method} r={rank}" if method == "lora" and type(rank) is int else method

    @property
    def state(self) -> str:
        """``damaged``, ``finished``, ``running`` or ``interrupted``.

        A run is finished if it has scores, or if its training is complete and no decoding has
        begun.
        """
        if self.problems:
            return "damaged"
        decoding = os.path.exists(self.folder / f"{PREDICTIONS_NAME}.partial")
        if self.total_steps is None:
            trained = os.path.exists(self.folder / REPORT_NAME)
        else:
            trained = self.steps >= self.total_steps
        if self.after or (trained and not decoding):
            return "finished"
        return "running" if is_held(self.folder) else "interrupted"

    def setting(self, path: str) -> Any:
        """A setting such as ``train.optim.lr``; None if the recipe does not have it."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_run(folder: str | Path) -> RunSummary:
    """Read a run folder; damaged files in it are reported in ``problems``.

    Raises:
        UserError: ``folder`` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the one that `jlora finetune` made")
    run = RunSummary(folder, visible(folder.resolve().name) or "run")
    problems = run.problems
    run.config_text, run.config = _read(folder / CONFIG_NAME, read_config, (None, {}), problems)
    run.records = _read(folder / METRICS_NAME, read_metrics, [], problems)
    scores = _read(folder / SCORES_NAME, read_scores, {}, problems)
    run.before, run.after = scores.get("before", {}), scores.get("after", {})
    run.environment = _read(
        folder / environment.ENVIRONMENT_NAME,
        lambda path: environment.read(path.parent),
        {},
        problems,
    )
    run.steps = max([record["step"] for record in run.records], default=0)
    for found in (run.setting("train.steps"), run.environment.get("total_steps")):
        if type(found) is int:
            run.total_steps = found
            break
    valid = series(run.records, "valid_loss")
    if valid:
        run.best_step, run.best_valid_loss = min(valid, key=lambda point: point[1])
    run.seconds = training_seconds(run.records)
    peak = run.environment.get("peak_memory_bytes")
    run.peak_memory = peak if type(peak) is int else None
    run.modified = _newest(folder)
    if not run.config and not run.records and not problems:
        problems.append(f"{folder}: neither settings nor training records in it")
    return run


def find_runs(folder: str | Path, depth: int = 3) -> list[Path]:
    """Run folders at or below ``folder``, at most ``depth`` levels down, sorted by name.

    A run folder contains config.yaml or metrics.jsonl; its subfolders are not searched.

    Raises:
        UserError: there is no such folder, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the runs")
    try:
        list(folder.iterdir())
    except OSError as error:
        raise os_error("read", folder, error) from error
    return list(_find(folder, depth))


def group_by_seed(runs: Sequence[RunSummary]) -> list[list[RunSummary]]:
    """Group finished runs that differ only by ``train.seed``, ordered by their first run.

    A second run with the same seed, and a run without settings, form groups of their own.
    """
    groups: dict[Any, list[RunSummary]] = {}
    for run in runs:
        key: Any = str(run.folder)
        if run.seed is not None and run.state == "finished":
            train = {name: value for name, value in run.config["train"].items() if name != "seed"}
            key = json.dumps({**run.config, "train": train}, sort_keys=True, default=str)
            if any(other.seed == run.seed for other in groups.get(key, [])):
                key = str(run.folder)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def group_name(runs: Sequence[RunSummary]) -> str:
    """The common beginning of the names of a group: ``lora-seed1``, ``lora-seed2`` -> ``lora``."""
    first, last = min(run.name for run in runs), max(run.name for run in runs)
    same = next((i for i, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first))
    return re.sub(r"([-_. ]+(seed|s)?|seed)[-_. ]*\d*$", "", first[:same]) or runs[0].name


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a run's config.yaml and its settings.

    Raises:
        UserError: it cannot be read, or is not a YAML mapping.
    """
    import yaml

    text = read_text(path)
    try:
        # Aliases, which jlora never writes, can expand a small file without limit.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise UserError(f"{path}: a YAML alias (*name) in it; fix or remove the file")
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}: not YAML ({problem}); fix or remove the file") from error
    except ValueError as error:  # an impossible date, say
        raise UserError(f"{path}: not YAML ({error}); fix or remove the file") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a mapping of settings; fix or remove the file")
    return text, config


def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """``{"before": {...}, "after": {...}}`` of scores.json: the finite numbers of each.

    Raises:
        UserError: it cannot be read, or does not have this form.
    """
    scores = read_object(path, "run `jlora evaluate` again")
    parts = [scores.get(key) for key in ("before", "after")]
    if not all(part is None or isinstance(part, dict) for part in parts):
        raise UserError(
            f'{path}: not {{"before": {{...}}, "after": {{...}}}}; run `jlora evaluate` again'
        )
    return {
        name: {
            key: value
            for key, value in (part or {}).items()
            if type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value)
        }
        for name, part in zip(("before", "after"), parts)
    }


def _read(path: Path, read: Callable[[Path], T], default: T, problems: list[str]) -> T:
    """The result of ``read``; ``default`` if the file is missing or (added to problems) damaged."""
    if not os.path.lexists(path):
        return default
    try:
        return read(path)
    except UserError as error:
        problems.append(visible(str(error)))
    except RecursionError:
        problems.append(f"{path}: nested too deeply; fix or remove the file")
    return default


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if any(os.path.exists(folder / name) for name in (CONFIG_NAME, METRICS_NAME)):
        yield folder
        return
    if depth == 0:
        return
    try:
        children = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:  # folders without read permission are skipped
        return
    for child in children:
        if not child.name.startswith("."):
            yield from _find(child, depth - 1)


def _newest(folder: Path) -> float:
    """When a file of the run last changed; files of the report do not count."""
    names = (CONFIG_NAME, METRICS_NAME, SCORES_NAME, PREDICTIONS_NAME)
    paths = [folder / name for name in names if os.path.exists(folder / name)]
    return max(os.path.getmtime(path) for path in paths or [folder])


def _text(value: Any) -> str | None:
    return visible(value) if isinstance(value, str) else None
