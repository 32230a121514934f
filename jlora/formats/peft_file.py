"""PEFT adapter folders <-> settings and numpy arrays.

A folder contains ``adapter_config.json`` and ``adapter_model.safetensors`` (or
``adapter_model.bin``). If jlora wrote it, ``jlora_adapter.json`` has the settings for which PEFT's
file has no field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.formats.torch_file import read_torch
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, recover_directory, write_text
from jlora.system.json_files import read_object

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH = "adapter_model.bin"
NOTES = "jlora_adapter.json"
_OWN_FILES = {CONFIG, SAFETENSORS, NOTES}


@dataclass
class AdapterFiles:
    """The content of a PEFT adapter folder.

    Attributes:
        config: ``adapter_config.json``.
        tensors: arrays by PEFT's keys (``base_model.model....lora_A.weight``).
        notes: ``jlora_adapter.json``; empty if there is none.
        path: the file of the tensors.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    notes: dict[str, Any]
    path: Path


def read_peft(folder: str | Path) -> AdapterFiles:
    """Read a PEFT adapter folder.

    Raises:
        UserError: there is no such folder, or a file is missing, damaged or of another kind.
    """
    folder = Path(folder)
    check_peft(folder)
    notes = read_object(folder / NOTES, "get the file anew") if (folder / NOTES).is_file() else {}
    config = read_object(folder / CONFIG, "get the file anew")
    if (folder / SAFETENSORS).is_file():
        return AdapterFiles(
            config, read_safetensors(folder / SAFETENSORS), notes, folder / SAFETENSORS
        )
    if (folder / TORCH).is_file():
        return AdapterFiles(config, read_torch(folder / TORCH), notes, folder / TORCH)
    raise UserError(f"{folder} holds neither {SAFETENSORS} nor {TORCH}; copy the weights too")


def check_peft(folder: Path) -> None:
    """Check that a folder is a PEFT adapter, reading nothing.

    Raises:
        UserError: no such folder, or no settings in it.
    """
    recover_directory(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder that holds {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no {CONFIG}, so it is no PEFT adapter; check the path")


def write_peft(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    notes: Mapping[str, Any],
) -> None:
    """Write a PEFT adapter folder, completely or not at all.

    If the folder contains other files they are kept, and the adapter files are replaced one by one.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(entry.name not in _OWN_FILES for entry in folder.iterdir()):
        _write_files(folder, config, tensors, notes)
    else:
        with atomic_path(folder, directory=True) as temporary:
            _write_files(temporary, config, tensors, notes)


def _write_files(folder: Path, config, tensors, notes) -> None:
    write_safetensors(folder / SAFETENSORS, tensors, metadata={"format": "pt"})
    write_text(folder / NOTES, json.dumps(notes, indent=2, sort_keys=True) + "\n")
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
