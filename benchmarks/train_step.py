"""``make bench-train``: a LoRA training step, compared with PEFT and microsoft/LoRA."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import operators, work
from benchmarks.sides import ROOT, alternate
from benchmarks.training import PEERS, add_options, begin, training_sides


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", nargs="+", default=list(work.MODELS), choices=work.MODELS)
    options.add_argument("--batches", nargs="+", default=["8x64", "e2e-8", "e2e-16"])
    add_options(options, peers=list(PEERS))
    options.add_argument("--rounds", type=int, default=9)
    chosen, peak = begin(options)
    results = []
    for model in chosen.models:
        line, compiled = operators.describe(model, chosen.precisions[0])
        print(f"\n{line}", flush=True)
        for batch in chosen.batches:
            results.append({**compare(model, batch, chosen, peak), "operators": compiled})
    (chosen.out / "train_step.json").write_text(json.dumps(results, indent=1))


def compare(model: str, batch: str, chosen, peak: float) -> dict:
    """Run one model on one kind of batch on all sides and print the rows."""
    config = work.MODELS[model]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "batches.npz"
        if batch.startswith("e2e-"):
            data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
            work.e2e_batches(path, data, model, int(batch[4:]), chosen.rounds + 2)
        else:
            rows, tokens = map(int, batch.split("x"))
            work.even_batches(path, config["vocab_size"], rows, tokens)
        sides = training_sides(model, path, chosen)
        alternate(sides, chosen.rounds)
        arrays = np.load(path)
        count = int(arrays["count"])
        used = [i % count for i in range(2, 2 + chosen.rounds)]
        flops = np.median([
            work.training_flops(config, arrays[f"lengths{i}"], int(arrays[f"mask{i}"].sum()))
            for i in used
        ])  # fmt: skip
        tokens = np.median([arrays[f"lengths{i}"].sum() for i in used])
    best = sides[0]
    print(f"\n{model}, {batch}: {tokens:.0f} tokens a step")
    wide = max(len(side.name) for side in sides)
    print(
        f"{'':{wide}} {'s/step':>8} {'tokens/s':>9} {'MFU':>6} {'peak MB':>8} {'ratio':>6} "
        f"{'first':>7}"
    )
    for side in sides:
        share = flops / side.median / peak
        print(
            f"{side.name:{wide}} {side.median:8.3f} {tokens / side.median:9.0f} {share:6.1%} "
            f"{side.peak_mb:8.0f} {side.median / best.median:6.2f} {side.first_seconds:6.1f}s",
            flush=True,
        )
    return {
        "model": model, "batch": batch, "tokens": float(tokens), "flops": float(flops),
        "peak_flops": peak,
        "sides": {s.name: {"seconds": s.seconds, "peak_mb": s.peak_mb, "first": s.first_seconds,
                           "part": s.part}
                  for s in sides},
    }  # fmt: skip


if __name__ == "__main__":
    main()
