"""Beam search and sampling by transformers' ``generate``, as its users run it."""

from __future__ import annotations

from benchmarks.prompts import Prompts


def make(spec: dict):
    """One round decodes the next prompts, or with ``streams`` so many texts of equal length."""
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
    prompts = Prompts(spec)

    def generate(batch: list[list[int]], **settings) -> list[list[int]]:
        """The new tokens of each."""
        longest = max(map(len, batch))
        ids = torch.tensor([[spec["pad"]] * (longest - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
        config = GenerationConfig(pad_token_id=spec["pad"], **settings)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return out[:, longest:].tolist()

    def work(streams: int = 0, tokens: int = 0, temperature: float = 0.0):
        if streams:
            batch = prompts.first(streams)
            drawn = {"temperature": temperature, "top_k": 0} if temperature else {}
            texts = generate(
                list(batch.values()), max_new_tokens=tokens, do_sample=bool(temperature), **drawn
            )
            return prompts.said(batch, texts, tokens)
        batch = prompts.next(spec["inputs"])
        texts = {}
        order = sorted(batch, key=lambda number: len(batch[number]))
        for start in range(0, len(order), spec["batch_size"]):
            some = order[start : start + spec["batch_size"]]
            found = generate(
                [batch[number] for number in some], num_beams=spec["beams"], do_sample=False,
                no_repeat_ngram_size=spec["no_repeat_ngram"], length_penalty=0.8,
                max_new_tokens=spec["new_tokens"], eos_token_id=spec["ends"] or None,
                early_stopping=spec["early_stopping"],
            )  # fmt: skip
            texts.update(zip(some, found))
        return prompts.said(batch, [texts[number] for number in batch])

    return work
