"""Logits compared with transformers: GPT-2's real shapes, variants of Llama, real weights.

The reference makes a model with random weights and writes it with ``save_pretrained``; jlora loads
that folder as a user would. Weights are drawn such that attention and norms affect the result: with
the usual small initial values every head would attend to all tokens alike, which would hide errors.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from parity.case import Case
from parity.downloads import smollm2_gguf

SMOLLM2 = "smollm2-135m"
VOCAB = 211
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 64}
LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
REAL_GPT2 = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20)}
SMALL_GPT2 = {
    "usual": {"n_embd": 48, "n_layer": 3, "n_head": 4},
    "odd-heads": {"n_embd": 45, "n_layer": 2, "n_head": 9, "n_inner": 70},
}
FAMILY = {
    "grouped-query": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "no-groups": {"num_key_value_heads": 6},
    "tied": {"tie_word_embeddings": True},
    "odd-heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36},
    "head-dim": {"head_dim": 14},
    "attention-bias": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": {"rope_theta": 500.0, **LLAMA3_ROPE}, "head_dim": 16},
    "linear-rope": {"rope_parameters": {"rope_theta": 100.0, "rope_type": "linear", "factor": 2.5}},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "num_attention_heads": 4, "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
}


def cases(seed: int) -> list[Case]:
    found = []
    for name, (width, layers, heads) in REAL_GPT2.items():
        config = {**GPT2, "vocab_size": 50257, "n_positions": 1024}
        config.update(n_embd=width, n_layer=layers, n_head=heads)
        settings = {"config": config, "batch": 2, "tokens": 24}
        found.append(Case(f"GPT-2 {name}, real shape", f"gpt2-{name}", settings, 1e-4))
    for name, changes in SMALL_GPT2.items():
        settings = {"config": {**GPT2, **changes}, "batch": 4, "tokens": 40}
        found.append(Case("GPT-2 variants", f"gpt2-{name}", settings, 1e-4))
    for name, changes in FAMILY.items():
        settings = {"config": {**LLAMA, **changes}, "batch": 4, "tokens": 40}
        golden = name in ("grouped-query", "llama3-rope", "qwen2")
        if golden:  # small enough for a fixture
            settings["config"].update(hidden_size=24, intermediate_size=32, num_hidden_layers=2)
            settings["config"].update(vocab_size=61)
            settings.update(batch=2, tokens=24)
        found.append(Case("Llama family variants", f"llama-{name}", settings, 1e-4, golden=golden))
    settings = {"batch": 2, "tokens": 48, "config": {"vocab_size": 49152}}
    found.append(Case("SmolLM2-135M, its own weights (GGUF)", SMOLLM2, settings, 1e-4))
    return found


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Token ids (B, T), the real length of each row, and a seed for the weights."""
    settings = case.settings
    B, T = settings["batch"], settings["tokens"]
    if case.name == SMOLLM2:
        smollm2_gguf()  # downloaded once, here
    lengths = rng.integers(T // 3, T, B)
    lengths[0] = T
    return {
        "ids": rng.integers(0, settings["config"]["vocab_size"], (B, T)).astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "seed": rng.integers(0, 2**31, 1),
    }


# The reference -----------------------------------------------------------------------------------


def make_model(config: dict, seed: int):
    """A transformers model with weights for which every part affects the result."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.dim() == 2:
                # Scores and activations of order one, whatever the width.
                embedding = any(part in name for part in ("wte", "wpe", "embed_tokens"))
                parameter.copy_(values * (0.5 if embedding else 1.2 / parameter.shape[-1] ** 0.5))
            else:
                norm = name.endswith("weight")
                parameter.copy_(1 + 0.3 * values if norm else 0.2 * values)
    model.tie_weights()
    return model


def reference(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    settings = case.settings
    if case.name == SMOLLM2:
        path = smollm2_gguf()
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    else:
        model = make_model(settings["config"], int(arrays["seed"][0]))
        model.save_pretrained(folder / "model")
    with torch.no_grad():
        return reference_logits(model, arrays)


def reference_logits(model, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the whole rows, and of rows padded on each side."""
    import torch

    ids, lengths = arrays["ids"], arrays["lengths"]
    found = {}
    whole = model(torch.from_numpy(ids).long()).logits.numpy()
    # jlora must give the same in other ways: token by token, and with its fused operators.
    found.update({"logits": whole, "logits with the cache": whole, "logits, fused": whole})
    for side in ("left", "right"):
        padded, mask = pad(ids, lengths, side)
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        logits = model(
            torch.from_numpy(padded).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()
        found[f"logits, padded on the {side}"] = logits[mask.astype(bool)]
    return found


def pad(ids: np.ndarray, lengths: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows shortened to ``lengths`` and padded with zeros again, and their masks."""
    padded, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        padded[row, place] = ids[row, :length]
        mask[row, place] = 1
    return padded, mask


# jlora -------------------------------------------------------------------------------------------


def ours(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    from jlora import load
    from jlora.system.runtime import jt

    jt.gc()
    model = load(smollm2_gguf() if case.name == SMOLLM2 else folder / "model")
    found = our_logits(model, arrays)
    if case.name.removeprefix("gpt2-") in REAL_GPT2:  # gigabytes
        shutil.rmtree(folder / "model")
    return found


def our_logits(model, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `reference_logits`, with a cache, and at last with the fused operators, which stay."""
    from jlora import engine
    from jlora.system.runtime import jt

    ids, lengths = arrays["ids"], arrays["lengths"]
    found = {}
    with jt.no_grad():
        found["logits"] = model(jt.array(ids)).numpy()
        found["logits with the cache"] = step_by_step(model, ids)
        for side in ("left", "right"):
            padded, mask = pad(ids, lengths, side)
            logits = model(jt.array(padded), mask).numpy()
            found[f"logits, padded on the {side}"] = logits[mask.astype(bool)]
        engine.prepare(model, "fp32")
        found["logits, fused"] = model(jt.array(ids)).numpy()
    return found


def step_by_step(model, ids: np.ndarray) -> np.ndarray:
    """A few tokens at once, then one by one, then two: (B, T, V)."""
    from jlora.system.runtime import jt

    cache, parts, at = model.new_cache(), [], 0
    for width in [5, *[1] * (ids.shape[1] - 7), 2]:
        parts.append(model(jt.array(ids[:, at : at + width]), cache=cache).numpy())
        at += width
    return np.concatenate(parts, axis=1)


STAGES = [("reference", reference), ("jlora", ours)]
