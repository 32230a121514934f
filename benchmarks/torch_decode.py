"""Beam search by transformers' ``generate``, as its users run it."""

from __future__ import annotations

import json
from pathlib import Path


def make(spec: dict):
    """One round decodes the next batch of prompts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    if spec["model"]:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    else:
        config = AutoConfig.for_model(**spec["config"])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config.eos_token_id = None  # generate() takes it where ours is None
    device = spec.get("device", "cpu")
    model.eval().to(device)
    if spec["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, spec["adapter"]).merge_and_unload()
    prompts = json.loads(Path(spec["prompts"]).read_text())
    size = spec["batch_size"]
    config = GenerationConfig(
        num_beams=spec["beams"], no_repeat_ngram_size=4, length_penalty=0.8, do_sample=False,
        max_new_tokens=spec["new_tokens"], eos_token_id=spec["ends"] or None,
        pad_token_id=spec["pad"],
        early_stopping=spec["early_stopping"],
    )  # fmt: skip
    done = 0

    def work():
        nonlocal done
        batch = [prompts[(done + i) % len(prompts)] for i in range(size)]
        done += size
        longest = max(map(len, batch))
        ids = torch.tensor([[spec["pad"]] * (longest - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return {"inputs": size, "tokens": int(out[:, longest:].ne(spec["pad"]).sum())}

    return work
