"""The sides of the training benchmarks and their options."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import numpy as np
import psutil

from benchmarks import lora_code, work
from benchmarks.peak import measure
from benchmarks.sides import ROOT, Side
from jlora.system.machine import cpu_model, processors

MICROSOFT = "microsoft/LoRA, "
# torch returns its large temporaries to the system at every step and gets their pages back by page
# faults, which are slow in a virtual machine. With these settings glibc's malloc keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
PADDED_TO = 512  # the sequence length of microsoft/LoRA's README
PEERS = {
    "PEFT fp32": {"precision": "fp32"},
    "PEFT bf16": {"precision": "bf16"},
    "PEFT bf16, memory kept": {"precision": "bf16", "variables": KEEP_MEMORY},
    "PEFT bf16, compiled": {"precision": "bf16", "compile": True},
    MICROSOFT + "unpadded": {"length": None},
    MICROSOFT + "padded to 512": {"length": PADDED_TO},
}


def add_options(options: argparse.ArgumentParser, peers: list[str]) -> None:
    """Add the options that select the sides; ``peers`` is the default."""
    options.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], help="jlora's own")
    options.add_argument("--peers", nargs="*", default=peers, choices=list(PEERS))
    options.add_argument("--lora-code", type=Path, default=lora_code.FOLDER,
                         help=f"a clone of {lora_code.ADDRESS}; made if missing")  # fmt: skip
    options.add_argument("--slow-rounds", type=int, default=2,
                         help="most rounds of the padded side")  # fmt: skip
    options.add_argument("--padded-rows", type=int,
                         help="rows of a padded batch, the time being scaled to all; default: "
                         "as many as fit in memory")  # fmt: skip


def begin(options: argparse.ArgumentParser) -> tuple[argparse.Namespace, float]:
    """Parse the options, fetch the code that is needed and print the machine.

    Returns:
        The options, and the FLOP/s of the largest matrix product measured.
    """
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    chosen = options.parse_args()
    fetch_code(chosen.models, chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    peak = measure()
    print(f"largest matrix product measured: bf16 {peak / 1e9:,.0f} GFLOP/s", flush=True)
    return chosen, peak


def fetch_code(models: list[str], chosen: argparse.Namespace) -> None:
    """Clone microsoft/LoRA if it is among the sides, to fail before any measurement."""
    wanted = any(name.startswith(MICROSOFT) for name in chosen.peers)
    if wanted and any(model.startswith("gpt2") for model in models):
        lora_code.clone(chosen.lora_code)


def training_sides(model: str, batches: Path, chosen: argparse.Namespace) -> list[Side]:
    """jlora's sides, then those of the chosen peers that support the model.

    Args:
        model: name of ``work.MODELS``.
        batches: what ``work.write_batches`` wrote.
        chosen: parsed options of `add_options`.
    """
    spec = {
        "config": work.MODELS[model],
        "lora": work.lora_settings(model),
        "batches": str(batches.absolute()),
        "label_smoothing": 0.1,
    }
    sides = [
        Side(f"jlora {p}", "jlora_train", "jlora", {**spec, "precision": p})
        for p in chosen.precisions
    ]
    for name in chosen.peers:
        if not name.startswith(MICROSOFT):
            settings = dict(PEERS[name])
            variables = settings.pop("variables", {})
            both = {**spec, **settings}
            sides.append(Side(name, "torch_train", "torch", both, variables=variables))
        elif model.startswith("gpt2"):
            sides.append(_microsoft(name, spec, batches, chosen))
    return sides


def _microsoft(name: str, spec: dict, batches: Path, chosen: argparse.Namespace) -> Side:
    spec = {**spec, "code": str(lora_code.clone(chosen.lora_code)), "rows": None, **PEERS[name]}
    side = Side(name, "lora_train", "torch", spec)
    if spec["length"] is not None:
        all_rows = len(np.load(batches)["lengths0"])
        fit = rows_that_fit(spec["config"], spec["length"], psutil.virtual_memory().available)
        rows = min(all_rows, chosen.padded_rows or fit)
        side.spec["rows"], side.part = rows, rows / all_rows
        side.most_rounds, side.apart = chosen.slow_rounds, True
        if rows < all_rows:
            side.name += f" ({rows} of {all_rows} rows, scaled)"
    return side


def rows_that_fit(config: dict, length: int, available: int) -> int:
    """Rows of ``length`` tokens, a power of two, that microsoft/LoRA trains in ``available`` bytes.

    Per row it holds about five times the logits and, in every layer, three times the attention
    scores and sixteen times the hidden states: 1.2 GB for GPT-2 small at 512, 2.5 GB for medium.
    """
    width, layers, vocabulary = config["n_embd"], config["n_layer"], config["vocab_size"]
    scores = config["n_head"] * length**2
    row = 4 * (5 * vocabulary * length + layers * (3 * scores + 16 * width * length))
    weights = 4 * (12 * width * width * layers + vocabulary * width)
    # A fifth is left free, for errors of the estimate and for other programs.
    rows = int((0.8 * available - weights) / row)
    return 1 << (max(rows, 1).bit_length() - 1)
