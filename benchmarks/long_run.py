"""``make bench ARGS=long_run``: does time or memory grow over many steps of varying lengths?

It also prints how long five epochs of E2E take at the measured speed. With ``--train`` a small
model is trained by `jlora.training.loop.train` instead, with checkpoints and validations.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks import work
from benchmarks.sides import ROOT, peak_mb
from jlora.system.machine import cpu_model, processors

E2E_ROWS = 42_061  # of its training split
PARTS = 10  # of the run, compared with each other


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="gpt2-medium", choices=work.MODELS)
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--rows", type=int, default=8, help="examples a step")
    options.add_argument("--precision", default="bf16")
    options.add_argument("--checkpoint-activations", action="store_true")
    options.add_argument("--train", action="store_true", help="the whole loop, of a small GPT-2")
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    chosen = options.parse_args()
    if chosen.train:
        train_small(chosen.steps, chosen.rows)
        return
    from benchmarks.jlora_train import make  # imports Jittor

    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
        path = Path(scratch) / "batches.npz"
        work.e2e_batches(path, data, chosen.model, chosen.rows, chosen.steps)
        step = make({
            "config": work.MODELS[chosen.model], "lora": work.lora_settings(chosen.model),
            "batches": str(path), "label_smoothing": 0.1, "precision": chosen.precision,
            "checkpoint_activations": chosen.checkpoint_activations,
        })  # fmt: skip
    seconds, resident = [], []
    for _ in range(chosen.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
        resident.append(resident_mb())
    report(chosen, seconds, resident)


#: The model of ``--train``; it uses the same operators as a large one.
SMALL = {
    "model_type": "gpt2", "vocab_size": 1000, "n_positions": 128, "n_embd": 64, "n_layer": 2,
    "n_head": 2,
}  # fmt: skip
SAMPLED = 50  # steps between two measurements of the memory
WARM_UP = 0.2  # share of the first steps, which the slope does not include


def train_small(steps: int, rows: int) -> None:
    """Resident memory of `jlora.training.loop.train` by step, and its slope."""
    from jlora import LoraConfig, engine, get_peft_model
    from jlora.data.batches import TokenExample
    from jlora.models.hub import build_model
    from jlora.training.loop import TrainConfig, train

    generator = np.random.default_rng(0)
    lengths = generator.integers(8, SMALL["n_positions"], 2000)
    examples = [
        TokenExample(generator.integers(0, SMALL["vocab_size"], length).tolist(), int(length) // 2)
        for length in lengths
    ]
    model = get_peft_model(build_model(SMALL), LoraConfig(r=4, target_modules=["c_attn"]))
    precision = engine.prepare(model, keep_weights=False)
    config = TrainConfig(
        batch_size=rows, steps=steps, valid_every=500, save_every=250, log_every=SAMPLED
    )
    samples: list[tuple[int, float]] = []

    class Sampler:
        def log(self, values: dict) -> None:
            if "loss" in values:
                samples.append((values["step"], resident_mb()))

        def close(self) -> None:
            pass

    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    with tempfile.TemporaryDirectory() as run:
        train(model, examples[100:], examples[:100], config, Path(run), lambda *_: [Sampler()])
    print(f"small GPT-2, {precision}, {rows} rows a step: {steps} steps")
    for step, resident in samples[:: max(1, len(samples) // PARTS)]:
        print(f"step {step:>6} {resident:10.1f} MB resident")
    late = np.array([each for each in samples if each[0] > WARM_UP * steps])
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    print(f"after {WARM_UP:.0%} of the steps: {slope * 1024 * 1000:+.0f} KB per 1,000 steps")


def report(chosen, seconds: list[float], resident: list[float]) -> None:
    part = max(1, len(seconds) // PARTS)
    print(f"{chosen.model}, {chosen.precision}, {chosen.rows} rows a step: {len(seconds)} steps")
    print(f"{'steps':>12} {'mean s':>8} {'median s':>9} {'resident MB':>12}")
    for start in range(0, len(seconds), part):
        own = seconds[start : start + part]
        print(
            f"{start + 1:>6}-{start + len(own):<5} {statistics.mean(own):8.3f} "
            f"{statistics.median(own):9.3f} {resident[start + len(own) - 1]:12.0f}"
        )
    peak = peak_mb()
    epochs = 5 * -(-E2E_ROWS // chosen.rows) * statistics.mean(seconds) / 3600
    print(f"peak {peak:.0f} MB; five epochs of E2E at the mean pace: {epochs:.2f} hours")
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = f"long_run-{chosen.model}-{chosen.precision}.json"
    result = {"seconds": seconds, "resident_mb": resident, "peak_mb": peak, "hours": epochs}
    (chosen.out / name).write_text(json.dumps(result))


def resident_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
