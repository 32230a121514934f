"""``make bench-decode``: beam search over E2E's test inputs beside transformers'."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.sides import ROOT, Side, alternate
from jlora.machine import cpu_model, processors

PEERS = {
    "transformers fp32": {"precision": "fp32", "early_stopping": False},
    "transformers bf16": {"precision": "bf16", "early_stopping": False},
    "transformers bf16, early": {"precision": "bf16", "early_stopping": True},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m", help="a name that `jlora pull` knows")
    options.add_argument("--adapter", help="PEFT folder; without one every text has all its tokens")
    options.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    options.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--peer-batch-size", type=int, default=8)
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
        sides = [
            Side(f"jlora {p}", "jlora_decode", "jlora",
                 {**spec, "precision": p, "batch_size": chosen.batch_size})
            for p in chosen.precisions
        ]  # fmt: skip
        peer = {**spec, "batch_size": chosen.peer_batch_size}
        sides += [Side(p, "torch_decode", "torch", {**peer, **PEERS[p]}) for p in chosen.peers]
        alternate(sides, chosen.rounds, warmup=1)
    best = sides[0].median / sides[0].spec["batch_size"]
    print(f"\n{chosen.model}, beam {chosen.beams}, at most {chosen.new_tokens} new tokens")
    print(f"{'':26} {'s/input':>8} {'630 inputs':>11} {'peak MB':>8} {'ratio':>6}")
    for side in sides:
        each = side.median / side.spec["batch_size"]
        print(
            f"{side.name:26} {each:8.3f} {each * 630 / 60:7.1f} min {side.peak_mb:8.0f} "
            f"{each / best:6.2f}"
        )
    result = {s.name: {"seconds": s.seconds, "peak_mb": s.peak_mb, "spec": s.spec} for s in sides}
    (chosen.out / "decode.json").write_text(json.dumps(result, indent=1))


def make_spec(chosen, path: Path) -> dict:
    """What both sides need; the prompts are E2E's distinct test inputs in a random order."""
    from jlora.pull import pull
    from jlora.tasks import get_task
    from jlora.tokenizer import Tokenizer

    folder = pull(chosen.model)
    tokenizer = Tokenizer.from_folder(folder)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    task = get_task("e2e")
    groups = task.groups(task.read(data / "e2e" / "test.txt"))
    order = np.random.default_rng(0).permutation(len(groups))
    end = tokenizer.eos_token_id
    prompts = [[*tokenizer.encode(groups[i].prompt), end] for i in order]
    path.write_text(json.dumps(prompts))
    return {
        "model": str(folder), "adapter": chosen.adapter, "prompts": str(path), "end": end,
        "beams": chosen.beams, "new_tokens": chosen.new_tokens, "rank_up_to": chosen.rank_up_to,
    }  # fmt: skip


if __name__ == "__main__":
    main()
