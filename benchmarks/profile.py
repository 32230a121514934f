"""``python -m benchmarks.profile``: a training step by parts, and what each product reaches.

Processor time of one thread, so that other programs on the machine matter little.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from ctypes import c_char_p
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks import work
from benchmarks.sides import ROOT

SQUARE = 1024  # rows, n and k of the product whose speed is the peak
OPERATORS = {  # of the library, by what they are part of
    "target_loss_op": "head and loss", "embedding_op": "embeddings", "rows_op": "embeddings",
    "dropout_op": "embeddings", "pack_op": "packing", "adamw_op": "optimiser",
}  # fmt: skip


@dataclass
class Part:
    """What the library has counted of one part: see kernels/profile.h."""

    name: str
    seconds: float
    operations: float
    calls: int


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m", choices=work.MODELS)
    options.add_argument("--precision", default="bf16")
    options.add_argument("--batch", default="e2e-8", help="e2e-ROWS or ROWSxTOKENS")
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--all-linear", action="store_true", help="LoRA on all linear layers")
    options.add_argument("--steps", type=int, default=3, help="counted; the fastest is printed")
    chosen = options.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", JLORA_PROFILE="1")
    from jlora.system.machine import cpu_model

    print(f"{cpu_model()}, one thread, processor time, {date.today()}")
    with tempfile.TemporaryDirectory() as scratch:
        steps = run(chosen, Path(scratch) / "batches.npz")
    report(min(steps, key=lambda step: step["step"]), peak_of("bf16"))


def run(chosen, path: Path) -> list[dict]:
    """Steps on one batch: seconds of the step's phases, and the library's parts."""
    from benchmarks.jlora_train import batch_of
    from jlora import LoraConfig, engine, get_peft_model
    from jlora.models.hub import build_model
    from jlora.system.runtime import jt
    from jlora.training.adamw import AdamW, OptimConfig
    from jlora.training.loop import batch_loss

    config = work.MODELS[chosen.model]
    if chosen.batch.startswith("e2e-"):
        data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
        work.e2e_batches(path, data, chosen.model, int(chosen.batch[4:]), 9)
    else:
        rows, tokens = map(int, chosen.batch.split("x"))
        work.even_batches(path, config["vocab_size"], rows, tokens, 1)
    arrays = np.load(path)
    tokens = [int(arrays[f"lengths{i}"].sum()) for i in range(int(arrays["count"]))]
    typical = int(np.argsort(tokens)[len(tokens) // 2])
    settings = {**work.lora_settings(chosen.model, chosen.all_linear), "r": chosen.rank}
    model = get_peft_model(build_model(config), LoraConfig(**settings))
    engine.prepare(model, chosen.precision, keep_weights=False)
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer, batch = AdamW(parameters, OptimConfig()), batch_of(arrays, typical, True)
    model.train()
    targets = int(arrays[f"mask{typical}"].sum())
    flops = work.training_flops(config, arrays[f"lengths{typical}"], targets)
    print(f"{chosen.model} {chosen.precision}, {chosen.batch}: {tokens[typical]} tokens, "
          f"{targets} targets; LoRA r {settings['r']}, {settings['target_modules']}")  # fmt: skip
    clock, found = time.process_time, []
    for _ in range(chosen.steps + 2):
        parts()  # forgets what was counted
        times = [clock()]
        loss = batch_loss(model, batch, 0.1)
        gradients = jt.grad(loss, parameters)
        times.append(clock())
        gradients = optimizer.arrays(gradients)
        times.append(clock())
        counted = parts()
        optimizer.step(gradients, 2e-4)
        loss.item()
        times.append(clock())
        graph, execution, update = np.diff(times)
        found.append({"step": times[-1] - times[0], "graph": graph, "execution": execution,
                      "optimiser": update, "parts": counted, "flops": flops})  # fmt: skip
    return found[2:]


def parts() -> list[Part]:
    """What the library has counted since the last call."""
    from jlora.kernels import native

    lines = native.library().profile_lines
    lines.restype = c_char_p
    rows = [line.split(" ", 3) for line in lines().decode().splitlines()]
    return [Part(name, float(s), float(o), int(c)) for s, o, c, name in rows]


def report(step: dict, peak: float) -> None:
    """Print a step by parts, and its products by their sizes."""
    sums, products = defaultdict(float), {}
    for part in step["parts"]:
        sums[group_of(part.name)] += part.seconds
        if part.operations:
            products.setdefault(part.name, part)
    sums["graph (Python)"], sums["optimiser"] = step["graph"], step["optimiser"]
    inside = sum(part.seconds for part in step["parts"])
    sums["Jittor"] = step["execution"] - inside
    print(f"\nstep {step['step']:.3f} s, {step['flops'] / 1e9:.0f} GFLOP needed: "
          f"{step['flops'] / step['step'] / 1e9:.0f} GFLOP/s, "
          f"{step['flops'] / step['step'] / peak:.1%} of the peak of {peak / 1e9:.0f}")  # fmt: skip
    for name, seconds in sorted(sums.items(), key=lambda item: -item[1]):
        print(f"  {name:28} {1000 * seconds:8.1f} ms {seconds / step['step']:6.1%}")
    print(f"\n{'products':62} {'calls':>5} {'ms':>7} {'GFLOP/s':>8} {'of peak':>8}")
    for name, part in sorted(products.items(), key=lambda item: -item[1].seconds):
        speed = part.operations / part.seconds
        print(f"{name.replace('_op', ''):62} {part.calls:5} {1000 * part.seconds:7.1f} "
              f"{speed / 1e9:8.0f} {speed / peak:8.1%}")  # fmt: skip


def group_of(name: str) -> str:
    """The part of a step that one of the library's parts belongs to."""
    operator, *inner = name.split("/")
    if operator in OPERATORS:
        return OPERATORS[operator]
    if not inner:
        return "rest of the blocks" if operator.startswith("block") else operator
    if inner[0] in ("forward", "backward"):
        return f"products {inner[0]}"
    return inner[0]


def peak_of(kind: str, rounds: int = 10) -> float:
    """FLOP/s of a square product with nothing done with its results."""
    from ctypes import c_int64

    from jlora.kernels.native import call
    from jlora.kernels.packed_linear import PackedWeight
    from jlora.system.runtime import jt

    rng = np.random.default_rng(0)
    weight = jt.array(rng.standard_normal((SQUARE, SQUARE), np.float32))
    packed, best = PackedWeight(weight, transposed=False, kind=kind), np.inf
    for _ in range(rounds):
        begun = time.process_time()
        call("bare_product", c_int64, packed.address, SQUARE, False, 1)
        best = min(best, time.process_time() - begun)
    return 2 * SQUARE**3 / best


if __name__ == "__main__":
    main()
