"""Imports microsoft/LoRA's own code from a clone; none of it is part of this project."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.sides import ROOT

ADDRESS = "https://github.com/microsoft/LoRA"
REVISION = "c4593f060e6a368d7bb5af5273b8e42810cdef90"
FOLDER = Path(os.environ.get("JLORA_LORA_CODE", ROOT / "runs" / "benchmarks" / "LoRA"))


def clone(folder: Path) -> Path:
    """Clone the repository if it is missing; returns its absolute path.

    Raises:
        SystemExit: it could not be cloned; the message says what to do.
    """
    folder = folder.absolute()
    if (_sources(folder) / "model.py").is_file():
        return folder
    print(f"cloning {ADDRESS} into {folder}", flush=True)
    try:
        subprocess.run(["git", "clone", "--quiet", ADDRESS, str(folder)], check=True)
        checkout = ["git", "-C", str(folder), "checkout", "--quiet", REVISION]
        subprocess.run(checkout, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{ADDRESS} could not be cloned ({error}). Clone it where there is a network, copy it "
            f"to {folder} (or name its folder by --lora-code or JLORA_LORA_CODE), or leave "
            "microsoft/LoRA out of --peers"
        ) from error
    return folder


def modules(folder: str, *names: str) -> list[ModuleType]:
    """Import modules of the clone's examples/NLG/src; loralib comes from the environment."""
    sys.path.insert(0, str(_sources(Path(folder))))
    return [importlib.import_module(name) for name in names]


def configuration(model: ModuleType, config: dict, lora: dict | None = None):
    """The model configuration for a Hugging Face ``config`` of a GPT-2."""
    adapter = {}
    if lora is not None:
        adapter = {
            "lora_attn_dim": lora["r"],
            "lora_attn_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
        }
    return model.GPT2Config(
        config["vocab_size"], config["n_positions"], n_ctx=config["n_positions"],
        n_embd=config["n_embd"], n_layer=config["n_layer"], n_head=config["n_head"], **adapter,
    )  # fmt: skip


def _sources(folder: Path) -> Path:
    return folder / "examples" / "NLG" / "src"
