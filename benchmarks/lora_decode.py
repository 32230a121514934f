"""Beam search by microsoft/LoRA's own code, in float32, with prompts padded to 512 as shipped.

Its function ``beam`` is called as its script calls it. Replaced are the module's ``args``, which
the script makes from its command line, and gathering from several GPUs, which needs CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from benchmarks import lora_code

LENGTH = 512


def make(spec: dict):
    """One round decodes the next batch of prompts."""
    import torch

    code, model = lora_code.modules(spec["code"], "gpt2_beam", "model")
    # Without an adapter, as on the other sides.
    network = model.GPT2LMModel(lora_code.configuration(model, spec["config"]))
    prompts = json.loads(Path(spec["prompts"]).read_text())
    size = spec["batch_size"]
    code.args = SimpleNamespace(
        device="cpu", beam=spec["beams"], eval_len=spec["new_tokens"], length_penalty=0.8,
        no_repeat_ngram_size=4, repetition_penalty=1.0, min_length=0, eos_token_id=spec["ends"],
        rank=1,  # rank 0 would write the results to a file
    )  # fmt: skip
    gathered = []
    code.distributed_gather = lambda args, tensor: gathered.append(tensor)
    code.distributed_sync = lambda args: None
    done = 0

    def work():
        nonlocal done
        batch = [prompts[(done + i) % len(prompts)] for i in range(size)]
        query = torch.tensor([prompt + [0] * (LENGTH - len(prompt)) for prompt in batch])
        data = {
            "id": torch.arange(done, done + size),
            "query": query,
            "query_len": torch.tensor([len(prompt) for prompt in batch]),
        }
        done += size
        gathered.clear()
        code.beam(network, [data], code.args)
        _, found = gathered  # of the ids, and of the best sequences with zeros after their end
        return {"inputs": size, "tokens": int(found.ne(0).sum())}

    return work
