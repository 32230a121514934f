"""The model families with random weights of reduced real shape, compared with transformers.

Of each: logits in one piece, token by token with the cache, padded on both sides, and with fused
operators; gradients of a LoRA adapter on every linear layer, which PEFT has made; greedy decoding.
Windows are shorter than the texts, and caps small enough to bend what they cap. `bf16` cases run
the fused blocks, whose products read bf16, with a tolerance to match.

InternLM2's code is not part of transformers. Its reference is transformers' Llama with the weights
of the fused layer given to q_proj, k_proj and v_proj as InternLM2's own code would split them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from parity import models
from parity.case import Case

VOCAB = 97
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
NO_HEAD_DIM = {"head_dim": None, "hidden_size": 128}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GLM = [*LLAMA[:4], "gate_up_proj", "down_proj"]
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
TYPES = ["sliding_attention", "full_attention"]
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 2.0] * 4, "long_factor": [1.5, 2.0, 4.0, 7.0] * 4}
PHI3 = {"model_type": "phi3", "rope_theta": 100.0, **NO_HEAD_DIM}
LLAMA32_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOW = {"sliding_window": 7}
USED = {**WINDOW, "use_sliding_window": True}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
#: name -> config.json's fields beside `BASE`, LoRA's targets.
FAMILIES: dict[str, tuple[dict, list[str]]] = {
    "llama-3.2": ({"model_type": "llama", "tie_word_embeddings": True,
                   "rope_scaling": LLAMA32_ROPE, "rope_theta": 500000.0}, LLAMA),
    "r1-distill-qwen": ({"model_type": "qwen2", **NO_HEAD_DIM, "use_mrope": False, **WINDOW,
                         "use_sliding_window": False, "max_window_layers": 2}, LLAMA),
    "qwen3": ({"model_type": "qwen3", "rope_theta": 1000.0}, LLAMA),
    "qwen3-window": ({"model_type": "qwen3", **USED, "max_window_layers": 2}, LLAMA),
    "mistral-window": ({"model_type": "mistral", **WINDOW}, LLAMA),
    "qwen2-window": ({"model_type": "qwen2", **NO_HEAD_DIM, **USED, "max_window_layers": 1}, LLAMA),
    "qwen2-layer-types": ({"model_type": "qwen2", **NO_HEAD_DIM, **USED, "layer_types": TYPES * 2},
                          LLAMA),
    "smollm3": ({"model_type": "smollm3", **NO_HEAD_DIM, "no_rope_layer_interval": 2}, LLAMA),
    "smollm3-window": ({"model_type": "smollm3", **NO_HEAD_DIM, **USED,
                        "no_rope_layers": [1, 0, 0, 1]}, LLAMA),
    "olmo2": ({"model_type": "olmo2", **NO_HEAD_DIM}, LLAMA),
    "gemma2": ({"model_type": "gemma2", "query_pre_attn_scalar": 24, "tie_word_embeddings": True,
                **WINDOW, **CAPS}, LLAMA),
    "gemma3": ({"model_type": "gemma3_text", "query_pre_attn_scalar": 20, "rope_theta": 1000000.0,
                "rope_local_base_freq": 100.0, "sliding_window_pattern": 2,
                "tie_word_embeddings": True, **WINDOW}, LLAMA),
    "phi3": ({**PHI3, **WINDOW, "num_key_value_heads": 4}, PHI),
    "phi3-longrope-short": ({**PHI3, "original_max_position_embeddings": 64,
                             "rope_scaling": {"type": "longrope", **FACTORS}}, PHI),
    "phi3-longrope-long": ({**PHI3, "original_max_position_embeddings": 4, "rope_scaling": {
                                "type": "longrope", "attention_factor": 1.2, **FACTORS}}, PHI),
    "phi4-mini": ({**PHI3, "head_dim": None, "hidden_size": 256, "partial_rotary_factor": 0.5,
                   "rope_scaling": {"type": "longrope", **FACTORS}, "tie_word_embeddings": True,
                   "original_max_position_embeddings": 64}, PHI),
    "glm": ({"model_type": "glm", "head_dim": 64}, GLM),
    "glm4": ({"model_type": "glm4", "head_dim": 64}, GLM),
    "internlm2": ({"model_type": "internlm2", **NO_HEAD_DIM, "bias": True,
                   "rope_scaling": {"type": "dynamic", "factor": 2.0}},
                  ["wqkv", "wo", "w1", "w2", "w3"]),
    "internlm3": ({"model_type": "internlm3",
                   "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}, LLAMA),
}  # fmt: skip
#: Sizes of the fixtures of `make test`.
SMALL = {"vocab_size": 29, "intermediate_size": 12, "num_hidden_layers": 3, "hidden_size": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
GOLDEN = (
    "qwen3-window", "smollm3-window", "olmo2", "gemma2", "gemma3", "phi3-longrope-long", "glm4",
    "internlm2",
)  # fmt: skip
GREEDY = 8  # tokens
CLOSEST = 1e-3  # A decision that is closer may fall otherwise with other rounding.


def cases(seed: int) -> list[Case]:
    found = []
    for name, (changes, targets) in FAMILIES.items():
        config = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
        config.update(dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id")))
        settings = {"config": config, "targets": targets, "batch": 3, "tokens": 40}
        row = name.partition("-")[0] if not name.startswith(("r1", "llama", "phi4")) else name
        found.append(Case(row, name, settings, 1e-4))
        found.append(Case(f"{row}, bf16", f"{name}-bf16", settings, 8e-2))
        if name in GOLDEN:
            found.append(golden(name, settings))
    return found


def golden(name: str, settings: dict) -> Case:
    config = {**settings["config"], **SMALL}
    if "head_dim" in config:
        config["head_dim"] = 8
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:3]
    if "no_rope_layers" in config:
        config["no_rope_layers"] = config["no_rope_layers"][:3]
    if "short_factor" in config.get("rope_scaling", {}):
        config["rope_scaling"] = {
            **config["rope_scaling"],
            **{k: v[:4] for k, v in FACTORS.items()},
        }
    settings = {**settings, "config": config, "batch": 2, "tokens": 16}
    # Rounding weighs more where sums have 16 terms.
    return Case("fixtures of make test", f"{name}-small", settings, 5e-4, golden=True)


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """As `models.inputs`, and the gradient's targets."""
    arrays = models.inputs(case, rng)
    targets = rng.integers(0, case.settings["config"]["vocab_size"], arrays["ids"].shape)
    return {**arrays, "targets": targets.astype(np.int32)}


def prompts_of(arrays: dict[str, np.ndarray]) -> list[list[int]]:
    """Of at least 5 tokens: more than LongRoPE's old context where that is 4."""
    lengths = np.maximum(5, arrays["lengths"] // 2)
    return [ids[:n].tolist() for ids, n in zip(arrays["ids"], lengths)]


# The reference -----------------------------------------------------------------------------------


def reference(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    import torch

    settings, seed = case.settings, int(arrays["seed"][0])
    internlm2 = settings["config"]["model_type"] == "internlm2"
    if internlm2:
        from parity.internlm2 import InternLM2

        model = InternLM2(settings["config"], seed)
    else:
        model = models.make_model(settings["config"], seed)
        if settings["config"]["model_type"].startswith("gemma"):
            with (
                torch.no_grad()
            ):  # embeddings are multiplied by the root of their size, norms by 1 + w
                model.model.embed_tokens.weight.mul_(settings["config"]["hidden_size"] ** -0.5)
                for name, parameter in model.named_parameters():
                    if "norm" in name:
                        parameter.sub_(1)
    if case.name.endswith("bf16"):
        calm(model)
    model.save_pretrained(folder / "model")
    found = {}
    with torch.no_grad():
        if not case.name.endswith("bf16"):
            found.update(models.reference_logits(model, arrays))
            prompts = prompts_of(arrays)
            kept = [greedy(model, prompt) for prompt in prompts]
            assert any(kept), "all decisions are too close to call"
            (folder / "kept.json").write_text(json.dumps([ids is not None for ids in kept]))
            found["greedy"] = np.array([ids for ids in kept if ids is not None])
        else:
            found["logits"] = model(torch.from_numpy(arrays["ids"]).long()).logits.numpy()
    found.update(reference_gradients(model, settings["targets"], arrays, seed, folder))
    if case.name.endswith("bf16"):
        parts = [found.pop(n).ravel() for n in sorted(found) if n.startswith("gradient")]
        found["gradient"] = np.concatenate(parts)
    return found


def calm(model) -> None:
    """Smaller weights: these models would multiply the rounding of bf16 from layer to layer."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(0.5)


def greedy(model, prompt: list[int]) -> list[int] | None:
    """The likeliest tokens one by one, without a cache; None: some decision is close."""
    import torch

    ids = list(prompt)
    for _ in range(GREEDY):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < CLOSEST:
            return None
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


def reference_gradients(model, targets, arrays, seed, folder) -> dict[str, np.ndarray]:
    """Of the mean loss, for a random adapter that is written to the folder."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    parameters = {n: p for n, p in sorted(tuned.named_parameters()) if "lora_" in n}
    with torch.no_grad():
        for parameter in parameters.values():
            scale = 0.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(folder / "adapter")
    logits = tuned(torch.from_numpy(arrays["ids"]).long()).logits
    wanted = torch.from_numpy(arrays["targets"]).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    names = [
        n.removeprefix("base_model.model.").removesuffix(".default.weight") for n in parameters
    ]
    return {f"gradient of {n}": g.numpy() for n, g in zip(names, gradients)}


# jlora -------------------------------------------------------------------------------------------


def ours(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    from jlora import engine
    from jlora.decoding.sampling import GenerateConfig, generate
    from jlora.models.hub import load
    from jlora.system.runtime import jt

    model, found = load(folder / "model"), {}
    if case.name.endswith("bf16"):
        engine.prepare(model, "bf16")
        with jt.no_grad():
            found["logits"] = model(jt.array(arrays["ids"])).numpy()
        gradients = our_gradients(load(folder / "model"), arrays, folder, "bf16")
        parts = [gradients[name].ravel() for name in sorted(gradients)]
        return {**found, "gradient": np.concatenate(parts)}
    found.update(models.our_logits(model, arrays))  # leaves the fused operators in place
    prompts = prompts_of(arrays)
    texts = generate(model, prompts, GenerateConfig(max_new_tokens=GREEDY, eos_token_ids=()))
    kept = json.loads((folder / "kept.json").read_text())
    found["greedy"] = np.array([text.ids for text, keep in zip(texts, kept) if keep])
    fused = our_gradients(load(folder / "model"), arrays, folder, "fp32")
    if case.golden:  # `tests/test_families.py` compares both
        return {**found, **fused}
    plain = our_gradients(load(folder / "model"), arrays, folder, "plain")
    for name, gradient in plain.items():
        worse = np.abs(fused[name] - gradient).max() > 1e-4 * np.abs(gradient).max()
        found[name] = fused[name] if worse else gradient  # the one that shows a fault
    return found


def our_gradients(model, arrays, folder: Path, precision: str) -> dict[str, np.ndarray]:
    from jlora import engine
    from jlora.adapters import PeftModel
    from jlora.system.runtime import jt

    tuned = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    tuned.train()
    engine.prepare(tuned, precision)
    hidden = tuned.hidden_states(jt.array(arrays["ids"]))
    hidden = hidden.reshape(-1, hidden.shape[-1])
    loss = tuned.target_losses(hidden, jt.array(arrays["targets"].ravel())).mean()
    named = dict(tuned.trainable_parameters())
    gradients = jt.grad(loss, list(named.values()))
    return {f"gradient of {name}": g.numpy() for name, g in zip(named, gradients)}


STAGES = [("reference", reference), ("jlora", ours)]
