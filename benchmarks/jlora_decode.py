"""Beam search in jlora, as `jlora generate` does it."""

from __future__ import annotations

import json
from pathlib import Path


def make(spec: dict):
    """One round decodes more prompts than fit in a batch: the next one replaces one that ends."""
    from jlora import PeftModel, engine, load
    from jlora.decoding.beam import BeamConfig, beam_search
    from jlora.layers import set_trainable
    from jlora.models.hub import build_model
    from jlora.system.runtime import use_gpu

    use_gpu(spec.get("device") == "cuda")
    model = load(spec["model"]) if spec["model"] else build_model(spec["config"])
    set_trainable(model, ())
    if spec["adapter"]:
        model = PeftModel.from_pretrained(model, spec["adapter"])
    engine.prepare(model, spec["precision"], keep_weights=False)
    model.eval()
    prompts = json.loads(Path(spec["prompts"]).read_text())
    size = spec["inputs"]
    config = BeamConfig(
        eos_token_ids=tuple(spec["ends"]), num_beams=spec["beams"], no_repeat_ngram_size=4,
        length_penalty=0.8, max_new_tokens=spec["new_tokens"], batch_size=spec["batch_size"],
        rank_up_to=spec["rank_up_to"],
    )  # fmt: skip
    done = 0

    def work():
        nonlocal done
        batch = [prompts[(done + i) % len(prompts)] for i in range(size)]
        done += size
        found = beam_search(model, batch, config)
        return {"inputs": size, "tokens": sum(best[0].length for best in found)}

    return work
