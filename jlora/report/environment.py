"""The machine and the versions a run was made with, kept as RUN/environment.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from jlora import machine
from jlora.errors import UserError
from jlora.files import read_text, write_text

ENVIRONMENT_NAME = "environment.json"
PACKAGES = ("jlora", "jittor", "numpy", "tokenizers", "safetensors")


def describe() -> dict[str, Any]:
    """This machine and this process: processor, memory, versions, peak memory in bytes so far.

    Importing nothing heavy: package versions are read from their metadata.
    """
    found: dict[str, Any] = {
        "processor": machine.cpu_model(),
        "processor_features": ", ".join(machine.cpu_features()) or None,
        "cores_used": machine.processors(),
        "memory_bytes": machine.memory_limit(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "peak_memory_bytes": peak_memory(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {key: value for key, value in found.items() if value is not None}


def record(run_folder: str | Path) -> None:
    """Write environment.json; over the pieces of a resumed run the highest peak memory stays.

    Raises:
        UserError: the file cannot be written, or one that is there is damaged.
    """
    path = Path(run_folder) / ENVIRONMENT_NAME
    found = describe()
    earlier = read(run_folder) if path.exists() else {}
    peaks = [one.get("peak_memory_bytes") for one in (found, earlier)]
    peaks = [peak for peak in peaks if isinstance(peak, int)]
    if peaks:
        found["peak_memory_bytes"] = max(peaks)
    write_text(path, json.dumps(found, indent=2) + "\n")


def read(run_folder: str | Path) -> dict[str, Any]:
    """Read environment.json.

    Raises:
        UserError: it is missing, or not a JSON object.
    """
    path = Path(run_folder) / ENVIRONMENT_NAME
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); remove the file"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; remove the file")
    return found


def peak_memory() -> int | None:
    """The most memory this process has held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
