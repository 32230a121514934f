"""The machine and the package versions of a run, stored as RUN/environment.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jlora.system import machine
from jlora.system.files import write_text
from jlora.system.json_files import read_object

ENVIRONMENT_NAME = "environment.json"
PACKAGES = ("jlora", "jittor", "numpy", "tokenizers", "safetensors")
#: What changes how sums are rounded, and its name in a message.
ROUNDING = {"processor": "processor", "threads": "threads", "jittor": "Jittor", "numpy": "NumPy"}


def describe() -> dict[str, Any]:
    """This machine and this process: processor, memory, versions, peak memory in bytes so far.

    Nothing heavy is imported: package versions are read from their metadata.
    """
    found: dict[str, Any] = {
        "processor": machine.cpu_model(),
        "processor_features": ", ".join(machine.cpu_features()) or None,
        "cores_used": machine.processors(),
        "threads": os.environ.get("OMP_NUM_THREADS"),  # set by jlora.system.runtime
        "memory_bytes": machine.memory_limit(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "peak_memory_bytes": machine.peak_memory(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {key: value for key, value in found.items() if value is not None}


def record(
    run_folder: str | Path,
    data_hashes: Mapping[str, str] | None = None,
    total_steps: int | None = None,
) -> None:
    """Write environment.json: the result of `describe`, the run's data files, commands and times.

    Called at each stage of a run and again when it is resumed. The highest peak memory, the first
    start, all command lines and the arguments of earlier calls are kept.

    Args:
        data_hashes: SHA-256 of each data file, by the file's name.
        total_steps: of the whole training, if the recipe gives epochs.

    Raises:
        UserError: the file cannot be written, or the existing one is damaged.
    """
    path = Path(run_folder) / ENVIRONMENT_NAME
    found = describe()
    earlier = read(run_folder) if path.exists() else {}
    now = time.time()
    config = Path(run_folder) / "config.yaml"  # written when a run begins
    begun = min(now, config.stat().st_mtime) if config.exists() else now
    commands = [one for one in earlier.get("commands") or [] if isinstance(one, str)]
    told = {
        "git_revision": git_revision(),
        "commands": list(dict.fromkeys([*commands, command_line()])),
        "data_sha256": dict(data_hashes) if data_hashes else earlier.get("data_sha256"),
        "total_steps": earlier.get("total_steps") if total_steps is None else total_steps,
        "started": earlier.get("started") or _utc(begun),
        "finished": _utc(now),
    }
    found.update({key: value for key, value in told.items() if value is not None})
    peaks = [one.get("peak_memory_bytes") for one in (found, earlier)]
    peaks = [peak for peak in peaks if isinstance(peak, int)]
    if peaks:
        found["peak_memory_bytes"] = max(peaks)
    write_text(path, json.dumps(found, indent=2) + "\n")


def rounding_changes(run_folder: str | Path) -> list[str]:
    """How this process differs from the one that a run began in, where its sums are rounded.

    Returns:
        One ``threads 2 -> 1`` for each; nothing of what either side does not say.

    Raises:
        UserError: environment.json is damaged.
    """
    if not (Path(run_folder) / ENVIRONMENT_NAME).exists():
        return []
    then, now = read(run_folder), describe()
    known = [key for key in ROUNDING if key in then and key in now]
    return [f"{ROUNDING[k]} {then[k]} -> {now[k]}" for k in known if then[k] != now[k]]


def read(run_folder: str | Path) -> dict[str, Any]:
    """Read environment.json.

    Raises:
        UserError: it is missing, or not a JSON object.
    """
    return read_object(Path(run_folder) / ENVIRONMENT_NAME, "remove the file")


def git_revision() -> str | None:
    """Revision of jlora's own checkout, with ``(dirty)`` if tracked files have changed.

    None without git, or if this jlora is not a checkout: an installed one may be inside another
    project's repository.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=here.parent, capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip

    try:
        git("ls-files", "--error-unmatch", here.name)
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return f"{revision} (dirty)" if changed else revision


def command_line() -> str:
    """The command line of this process, without the path of the program itself."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    name = "jlora" if name in ("__main__.py", "cli.py", "jlora") else name or "python"
    return shlex.join([name, *arguments])


def _utc(seconds: float) -> str:
    """``2026-01-31T12:00:00+00:00``"""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
