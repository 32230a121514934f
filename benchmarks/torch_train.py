"""A LoRA training step with transformers and PEFT."""

from __future__ import annotations

import time

import numpy as np
import psutil

from benchmarks.sides import gpu_megabytes, peak_mb


def make(spec: dict):
    """One round is one update on the next batch."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = dict(spec["lora"])
    # PEFT's equivalent of two blocks of rank r is one adapter of rank 2 r.
    enabled = sum(settings.pop("enable_lora", [1]))
    settings["r"], settings["lora_alpha"] = (
        settings["r"] * enabled,
        settings["lora_alpha"] * enabled,
    )
    settings["fan_in_fan_out"] = spec["config"]["model_type"] == "gpt2"
    device = spec.get("device", "cpu")
    started = time.perf_counter()
    base = base_model(spec)
    said = {
        "load_seconds": time.perf_counter() - started,
        "loaded_mb": psutil.Process().memory_info().rss / 2**20,
        "load_peak_mb": peak_mb(),
    }
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).train().to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    called = torch.compile(model) if spec.get("compile") else model
    arrays = np.load(spec["batches"])
    done = 0

    def batch(i: int):
        ids = torch.from_numpy(arrays[f"ids{i}"]).long()
        targets = torch.from_numpy(arrays[f"targets{i}"]).long()
        mask = torch.from_numpy(arrays[f"mask{i}"]) > 0
        real = torch.arange(ids.shape[1])[None] < torch.from_numpy(arrays[f"lengths{i}"])[:, None]
        return [x.to(device) for x in (ids, torch.where(mask, targets, -100), real.long())]

    def work():
        nonlocal done
        ids, targets, mask = batch(done % int(arrays["count"]))
        done += 1
        logits = called(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1),
            label_smoothing=spec["label_smoothing"],
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result = {**said, "loss": float(loss)}
        if device == "cuda" and done % 50 == 5:
            result["gpu_mb"] = gpu_megabytes()
        return result

    return work


def base_model(spec: dict):
    """The model in float32, bf16 or bitsandbytes' NF4.

    With random weights by ``spec["config"]``, except that NF4 and activation checkpoints read the
    checkpoint ``spec["model"]``.
    """
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if spec["precision"] == "fp32" else torch.bfloat16
    checkpoints = spec.get("checkpoint_activations", False)
    if spec["precision"] != "nf4":
        if not checkpoints:
            config = AutoConfig.for_model(**spec["config"])
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        return model
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        spec["model"], quantization_config=four_bits, dtype=dtype
    )
    # Its default would add activation checkpoints.
    return prepare_model_for_kbit_training(
        model, checkpoints, {"use_reentrant": False} if checkpoints else None
    )
