"""The Llama family in plain numpy float64: a second opinion for tests, one sequence at a time."""

from __future__ import annotations

import math

import numpy as np


def logits(weights: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """Token ids -> (T, V); ``config`` is a config.json, ``weights`` have Hugging Face's names."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, eps, T = config["head_dim"], config["rms_norm_eps"], len(ids)

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        return w[f"{name}.weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)

    turn = np.exp(1j * np.outer(np.arange(T), frequencies(config)))[:, None]  # (T, 1, D / 2)

    def rotary(x):
        turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            linear(h, f"{name}.self_attn.{p}_proj").reshape(T, -1, size) for p in ("q", "k", "v")
        )
        q, k = rotary(q), rotary(k)
        out = np.zeros((T, heads, size))
        for head in range(heads):
            group = head * kv_heads // heads
            for t in range(T):
                scores = k[: t + 1, group] @ q[t, head] / math.sqrt(size)
                share = np.exp(scores - scores.max())
                out[t, head] = share / share.sum() @ v[: t + 1, group]
        x = x + linear(out.reshape(T, -1), f"{name}.self_attn.o_proj")
        h = norm(x, f"{name}.post_attention_layernorm")
        gate = linear(h, f"{name}.mlp.gate_proj")
        h = gate / (1 + np.exp(-gate)) * linear(h, f"{name}.mlp.up_proj")
        x = x + linear(h, f"{name}.mlp.down_proj")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm") @ w[head].T


def frequencies(config: dict) -> np.ndarray:
    """As Meta's llama3 reference code scales them, wave by wave."""
    size, scaling = config["head_dim"], config.get("rope_scaling") or {}
    plain = [config["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "linear":
        return np.array([f / scaling["factor"] for f in plain])
    if kind != "llama3":
        return np.array(plain)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context, result = scaling["original_max_position_embeddings"], []
    for f in plain:
        wave = 2 * math.pi / f
        if wave < context / high:
            result.append(f)
        elif wave > context / low:
            result.append(f / scaling["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            result.append((1 - smooth) * f / scaling["factor"] + smooth * f)
    return np.array(result)
