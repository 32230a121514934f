"""A large model in jlora: loaded, trained, asked; and the memory that each took."""

from __future__ import annotations

import time

import psutil

from benchmarks.sides import peak_mb


def make(spec: dict):
    """One round is one update on the next batch; before the first it loads, after it generates."""
    from benchmarks.jlora_train import updates
    from jlora import LoraConfig, engine, get_peft_model, load
    from jlora.decoding.sampling import GenerateConfig, generate

    started = time.perf_counter()
    model = get_peft_model(load(spec["model"]), LoraConfig(**spec["lora"]))
    checkpoints = spec["checkpoint_activations"]
    engine.prepare(model, spec["precision"], False, checkpoints)
    said = {
        "load_seconds": time.perf_counter() - started,
        "loaded_mb": psutil.Process().memory_info().rss / 2**20,
        "load_peak_mb": peak_mb(),
    }
    update = updates(model, spec)

    def work():
        loss = update()
        if "tokens_a_second" not in said:
            model.eval()
            new = spec["new_tokens"]
            seconds = []
            for tokens in (1, 1 + new):  # what follows the first token
                begun = time.perf_counter()
                generate(model, [[1, 5, 9]], GenerateConfig((), max_new_tokens=tokens))
                seconds.append(time.perf_counter() - begun)
            said["tokens_a_second"] = new / (seconds[1] - seconds[0])
            model.train()
        return {**said, "loss": loss}

    return work
