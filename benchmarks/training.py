"""The training part of `make bench`: a LoRA update on E2E's batches, and the sides that do it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import psutil

from benchmarks import lora_code, work
from benchmarks.environments import KEEP_MEMORY, missing, mkl
from benchmarks.peak import measure
from benchmarks.sides import PYTHON, ROOT, Side
from jlora.system.machine import cpu_model, processors

MICROSOFT = "microsoft/LoRA, "
PADDED_TO = 512  # the sequence length of microsoft/LoRA's README
BF16 = {"module": "torch_train", "environment": "peft", "precision": "bf16"}
#: Peers: where each runs, and what its module is told.
PEERS = {
    "PEFT fp32": {**BF16, "precision": "fp32"},
    "PEFT bf16": BF16,
    "PEFT bf16, memory kept": {**BF16, "variables": KEEP_MEMORY},
    "PEFT bf16, compiled": {**BF16, "compile": True, "variables": KEEP_MEMORY},
    "PEFT NF4": {**BF16, "precision": "nf4", "variables": KEEP_MEMORY},
    "mlx-lm": {"module": "mlx_train", "environment": "mlx"},
    "PEFT on Jittor 2.0": {
        "module": "torch_train", "environment": "jittor2", "precision": "fp32",
        "variables": {
            "nvcc_path": "", "JITTOR_TORCH_SHIM": "1", "HF_DEACTIVATE_ASYNC_LOAD": "1",
            "JITTOR_TORCH_RUNTIME_ROOT": str(PYTHON["jittor2"].parents[1] / "runtime"),
        },
    },
    MICROSOFT + "unpadded": {"module": "lora_train", "environment": "peft", "length": None},
    MICROSOFT + "padded to 512": {
        "module": "lora_train", "environment": "peft", "length": PADDED_TO,
    },
}  # fmt: skip
REFERENCE = "jlora bf16"
#: jlora's precisions and the peers that alternate; what stands together fits in 16 GB.
GROUPS = (
    (("bf16", "int8", "int8-both"), ("PEFT bf16", "PEFT bf16, memory kept", "PEFT bf16, compiled")),
    (("bf16", "fp32", "int4"), ("PEFT fp32",)),
    (("bf16",), ("mlx-lm", "PEFT NF4", "PEFT on Jittor 2.0")),
)


def batches(model: str, path: Path, rows: int, count: int) -> Path:
    """Batches with the lengths of E2E's examples."""
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    return work.e2e_batches(path, data, model, rows, count)


def needed(model: str, path: Path, rounds: int, warmup: int) -> tuple[float, float]:
    """Medians over the batches that are timed: tokens and floating-point operations of a step."""
    arrays = np.load(path)
    count = int(arrays["count"])
    used = [i % count for i in range(warmup, warmup + rounds)]
    flops = [
        work.training_flops(
            work.MODELS[model], arrays[f"lengths{i}"], int(arrays[f"mask{i}"].sum())
        )
        for i in used
    ]
    tokens = [arrays[f"lengths{i}"].sum() for i in used]
    return float(np.median(tokens)), float(np.median(flops))


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
    from datetime import date

    options.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    chosen = options.parse_args()
    fetch_code(chosen.models, chosen)
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    peak = max(measure().values())
    print(f"largest matrix product measured: {peak / 1e9:,.0f} GFLOP/s", flush=True)
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
        chosen: parsed options of `add_options`; ``checkpoint``, for the peers that need one, is a
            function that gives the folder of a model with random weights.
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
            sides.append(_peer(name, spec, model, chosen))
        elif model.startswith("gpt2"):
            sides.append(_microsoft(name, spec, batches, chosen))
    return sides


def _peer(name: str, spec: dict, model: str, chosen: argparse.Namespace) -> Side:
    settings = dict(PEERS[name])
    module, environment = settings.pop("module"), settings.pop("environment")
    variables = dict(settings.pop("variables", {}))
    side = Side(name, module, environment, {**spec, **settings}, variables=variables)
    side.problem = missing(environment)
    if settings.get("precision") == "nf4" and side.problem is None:
        side.spec["model"] = str(chosen.checkpoint(model))
    if environment == "mlx" and mkl() is not None:
        side.variables["LD_PRELOAD"] = str(mkl())
    return side


def _microsoft(name: str, spec: dict, batches: Path, chosen: argparse.Namespace) -> Side:
    settings = {**spec, "code": str(lora_code.clone(chosen.lora_code)), "rows": None}
    side = _peer(name, settings, "", chosen)
    if side.spec["length"] is not None:
        all_rows = len(np.load(batches)["lengths0"])
        fit = rows_that_fit(spec["config"], PADDED_TO, psutil.virtual_memory().available)
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
