"""``make bench-decode``: beam search over E2E's test inputs, compared with others."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks import lora_code, work
from benchmarks.sides import ROOT, Side, alternate
from jlora.system.machine import cpu_model, processors

INPUTS = 630  # distinct inputs of E2E's test set
MICROSOFT = "microsoft/LoRA"
PEERS = {
    "transformers fp32": {"precision": "fp32", "early_stopping": False},
    "transformers bf16": {"precision": "bf16", "early_stopping": False},
    "transformers bf16, early": {"precision": "bf16", "early_stopping": True},
    MICROSOFT: {},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--model", default="smollm2-135m",
        help="a name that `jlora pull` knows; gpt2-small and gpt2-medium have random weights and "
        "no end token, so that every text has all its tokens",
    )  # fmt: skip
    options.add_argument("--adapter", help="PEFT folder")
    options.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    options.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    options.add_argument("--batch-size", type=int, default=32, help="of jlora: places for inputs")
    options.add_argument("--inputs", type=int, default=128, help="of jlora in a round")
    options.add_argument("--peer-batch-size", type=int, default=8)
    options.add_argument("--lora-code", type=Path, default=lora_code.FOLDER,
                         help=f"a clone of {lora_code.ADDRESS}; made if missing")  # fmt: skip
    options.add_argument("--slow-inputs", type=int, default=3,
                         help=f"inputs of {MICROSOFT}, one a round after a warm-up")  # fmt: skip
    options.add_argument(
        "--rank-up-to", type=float,
        help="let jlora leave a prompt whose winner is certain, as its E2E recipes do",
    )  # fmt: skip
    options.add_argument("--beams", type=int, default=10)
    options.add_argument("--new-tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    with tempfile.TemporaryDirectory() as scratch:
        spec = make_spec(chosen, Path(scratch) / "prompts.json")
        sides = make_sides(spec, chosen)
        alternate(sides, chosen.rounds, warmup=1)
    best = seconds_each(sides[0])
    print(f"\n{chosen.model}, beam {chosen.beams}, at most {chosen.new_tokens} new tokens")
    print(f"{INPUTS} inputs are extrapolated from those timed; tokens: of the last best texts.")
    print(
        f"{'':26} {'timed':>6} {'s/input':>8} {'630 inputs':>11} {'tokens':>7} {'peak MB':>8} "
        f"{'ratio':>6}"
    )
    for side in sides:
        each, inputs = seconds_each(side), side.spec["inputs"]
        print(
            f"{side.name:26} {len(side.seconds) * inputs:6} {each:8.3f} {each * INPUTS / 60:7.1f} "
            f"min {side.extra['tokens'] / inputs:7.1f} {side.peak_mb:8.0f} {each / best:6.2f}"
        )
    result = {s.name: {"seconds": s.seconds, "peak_mb": s.peak_mb, "spec": s.spec} for s in sides}
    (chosen.out / "decode.json").write_text(json.dumps(result, indent=1))


def seconds_each(side: Side) -> float:
    """Seconds an input."""
    return side.median / side.spec["inputs"]


def make_sides(spec: dict, chosen: argparse.Namespace) -> list[Side]:
    """jlora's sides, then those of the peers that support the model."""
    ours = {**spec, "batch_size": chosen.batch_size, "inputs": chosen.inputs}
    sides = [
        Side(f"jlora {p}", "jlora_decode", "jlora", {**ours, "precision": p})
        for p in chosen.precisions
    ]
    theirs = {**spec, "batch_size": chosen.peer_batch_size, "inputs": chosen.peer_batch_size}
    for name in chosen.peers:
        if name != MICROSOFT:
            sides.append(Side(name, "torch_decode", "torch", {**theirs, **PEERS[name]}))
        elif spec["config"]:
            code = str(lora_code.clone(chosen.lora_code))
            one = {**spec, "batch_size": 1, "inputs": 1, "code": code}  # as its README has it
            sides.append(Side(name, "lora_decode", "torch", one, most_rounds=chosen.slow_inputs))
    return sides


def make_spec(chosen: argparse.Namespace, path: Path) -> dict:
    """The settings of all sides; the prompts are E2E's distinct test inputs in a random order.

    Random GPT-2 weights are used with SmolLM2's tokenizer, which splits E2E's texts much like
    GPT-2's.
    """
    from jlora.data.pull_models import pull
    from jlora.data.tasks import get_task
    from jlora.data.tokenizer import Tokenizer

    config = work.MODELS.get(chosen.model) if chosen.model.startswith("gpt2") else None
    folder = pull("smollm2-135m" if config else chosen.model)
    tokenizer = Tokenizer.from_folder(folder)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    task = get_task("e2e")
    groups = task.groups(task.read(data / "e2e" / "test.txt"))
    order = np.random.default_rng(0).permutation(len(groups))
    end = tokenizer.eos_token_id
    prompts = [[*tokenizer.encode(groups[i].prompt), end] for i in order]
    path.write_text(json.dumps(prompts))
    return {
        "model": None if config else str(folder), "config": config, "adapter": chosen.adapter,
        "prompts": str(path), "pad": end, "ends": [] if config else [end], "beams": chosen.beams,
        "new_tokens": chosen.new_tokens, "rank_up_to": chosen.rank_up_to,
    }  # fmt: skip


if __name__ == "__main__":
    main()
