"""transformers and PEFT with `adapter_names`: a batch for every line on standard input."""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor


class Clock(LogitsProcessor):
    """Notes when each step's logits are there."""

    def __init__(self):
        self.times = []

    def __call__(self, _, scores):
        self.times.append(time.perf_counter())
        return scores


def main(spec: dict) -> None:
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, spec["adapters"][0], adapter_name="0")
    for number, path in enumerate(spec["adapters"][1:], 1):
        model.load_adapter(path, adapter_name=str(number))
    model = model.to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    print(json.dumps({"address": ""}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ids = tokenizer(job["prompts"], return_tensors="pt", padding=True, padding_side="left")
        clock, mixed = Clock(), {}
        if len(set(job["adapters"])) > 1:
            mixed["adapter_names"] = [str(number) for number in job["adapters"]]
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                **ids, **mixed, max_new_tokens=job["tokens"], do_sample=False,
                logits_processor=[clock],
            )  # fmt: skip
        print(json.dumps([each - started for each in clock.times]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
