"""config.json of Llama's architecture, and of those near it, <-> the metadata of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.gguf_architecture import Architecture, shortest
from jlora.formats.gguf_rope import CONTEXT, old_context, read_scaling, rope_scaling, write_scaling

FULL, SLIDING = "full_attention", "sliding_attention"
#: config.json's switch -> a module that has a bias then. (Qwen2's q, k and v always do.)
BIASES = {"attention_bias": "attn_output", "mlp_bias": "ffn_gate"}
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def read_llama_config(
    own: Architecture,
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """config.json of a model of Llama's family."""

    def get(key: str) -> Any:
        return metadata[f"{own.name}.{key}"]

    heads = get("attention.head_count")
    embedding = own.names["token_embd"] + ".weight"
    if embedding not in tensors:
        raise KeyError("token_embd.weight")
    hidden = get("embedding_length")
    head_dim = metadata.get(f"{own.name}.attention.key_length") or hidden // heads
    config = {
        "model_type": own.model_type or own.name,
        "architectures": [own.transformers],
        "vocab_size": tensors[embedding].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{own.name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(metadata.get(f"{own.name}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": own.names.get("output", "none") + ".weight" not in tensors,
    }
    for switch, module in BIASES.items():
        if has_bias(own, tensors, module):
            config[switch] = True
    size = head_dim
    if own.part_turned:
        size = metadata.get(f"{own.name}.rope.dimension_count") or head_dim
        config["partial_rotary_factor"] = size / head_dim
    scaling = read_scaling(path, own.name, metadata, factors, config, size)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def write_llama_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_llama_config` reads; some scalings are tensors, see `gguf_rope.rope_tensors`."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    turned = int(config["head_dim"] * config.get("partial_rotary_factor", 1))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    write_scaling(writer, config)


def has_bias(own: Architecture, tensors: Mapping[str, np.ndarray], module: str) -> bool:
    """Whether a module of the first block, by its name in the file, has a bias."""
    return f"{own.blocks}.0.{own.names.get(module)}.bias" in tensors


# Windows ---------------------------------------------------------------------------------------


def window_types(period: int, layers: int) -> list[str]:
    """The kinds of layers where every ``period``-th sees all tokens; 0: none does."""
    return [FULL if period and i % period == period - 1 else SLIDING for i in range(layers)]


def period_of(types: Sequence[str]) -> int | None:
    """The inverse of `window_types`; None: there is none."""
    layers = len(types)
    periods = (p for p in range(layers + 1) if window_types(p, layers) == list(types))
    return next(periods, None)


def read_windows(
    own: Architecture, metadata: Mapping[str, Any], layers: int, usual: int = 0
) -> tuple[int | None, list[str]]:
    """The window, and the kinds of layers.

    Args:
        usual: the period where the file names none.
    """
    window = metadata.get(f"{own.name}.{WINDOW}")
    pattern = metadata.get(f"{own.name}.{PATTERN}", usual)
    if isinstance(pattern, list):
        return window, [SLIDING if slides else FULL for slides in pattern]
    return window, window_types(int(pattern), layers)


def write_windows(writer: Any, config: Mapping[str, Any], usual: int = 0) -> None:
    """What `read_windows` reads; nothing where no window is shorter than the context."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    layers = config["num_hidden_layers"]
    types = types or window_types(0, layers)
    if window is None or SLIDING not in types or window >= config["max_position_embeddings"]:
        return
    writer.add_sliding_window(window)
    period = period_of(types)
    if period is None:
        writer.add_sliding_window_pattern([kind == SLIDING for kind in types])
    elif period != usual:
        writer.add_sliding_window_pattern(period)


def read_mistral_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """`read_llama_config`, a model with a window being Mistral."""
    config = read_llama_config(own, path, metadata, tensors, factors)
    config = {**dict.fromkeys(BIASES, False), **config}
    window, _ = read_windows(own, metadata, config["num_hidden_layers"])
    if window and window < config["max_position_embeddings"]:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        config["sliding_window"] = window
    return config


def read_qwen_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """`read_llama_config` with windows in some layers, as Qwen and SmolLM3 have them."""
    config = read_llama_config(own, path, metadata, tensors, factors)
    window, types = read_windows(own, metadata, config["num_hidden_layers"])
    if window and window < config["max_position_embeddings"]:
        config |= {"use_sliding_window": True, "sliding_window": window, "layer_types": types}
    return config


def write_windowed_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What the two above read."""
    write_llama_metadata(writer, config)
    write_windows(writer, config)


# Gemma -----------------------------------------------------------------------------------------

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read_gemma_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """config.json of Gemma 2 and 3.

    The scale of the scores is in no file: llama.cpp takes it from the sizes.
    """
    config = read_llama_config(own, path, metadata, tensors, factors)
    del config["hidden_act"]
    layers = config["num_hidden_layers"]
    window, types = read_windows(own, metadata, layers, GEMMA_PERIODS[own.name])
    config |= {"layer_types": types, "query_pre_attn_scalar": gemma_scale(own.name, config)}
    if window:
        config["sliding_window"] = window
    caps = {cap: metadata.get(f"{own.name}.{cap}") for cap in CAPS}
    config |= {cap: shortest(value) for cap, value in caps.items() if value}
    if own.name == "gemma3":
        base = metadata.get(f"{own.name}.rope.freq_base_swa", 10000.0)
        config["rope_local_base_freq"] = shortest(base)
    return config


def write_gemma_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_gemma_config` reads."""
    write_llama_metadata(writer, config)
    name = writer.arch
    if SLIDING in config["layer_types"]:
        writer.add_sliding_window(config["sliding_window"])
    period = period_of(config["layer_types"])
    if period != GEMMA_PERIODS[name]:
        writer.add_sliding_window_pattern(period)
    if config.get(CAPS[0]):
        writer.add_attn_logit_softcapping(config[CAPS[0]])
    if config.get(CAPS[1]):
        writer.add_final_logit_softcapping(config[CAPS[1]])
    if name == "gemma3":
        writer.add_rope_freq_base_swa(config["rope_local_base_freq"])


#: Every which layer sees all tokens, where the file does not say; and the number of layers of the
#: model whose scores are scaled by the width, not by the head.
GEMMA_PERIODS = {"gemma2": 2, "gemma3": 6}
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def gemma_scale(name: str, config: Mapping[str, Any]) -> float:
    """query_pre_attn_scalar as llama.cpp takes it."""
    if config["num_hidden_layers"] == GEMMA_27B[name]:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def check_gemma(name: str, config: Mapping[str, Any]) -> str | None:
    """See `Architecture.check`."""
    scale = config["query_pre_attn_scalar"]
    if scale != gemma_scale(name, config):
        return f"query_pre_attn_scalar is {scale}, and GGUF's is {gemma_scale(name, config)}"
    if period_of(config["layer_types"]) is None:
        return "its layer_types have no period"
    if name == "gemma2" and SLIDING not in config["layer_types"]:
        return "no layer of this Gemma 2 has a window"
    if name == "gemma2" and not all(config.get(cap) for cap in CAPS):
        return "GGUF has no form for Gemma 2 without both soft caps"
    return None


def check_gemma2(config: Mapping[str, Any]) -> str | None:
    return check_gemma("gemma2", config)


def check_gemma3(config: Mapping[str, Any]) -> str | None:
    return check_gemma("gemma3", config)


# Others ----------------------------------------------------------------------------------------


def check_smollm3(config: Mapping[str, Any]) -> str | None:
    """See `Architecture.check`."""
    turned = config["no_rope_layers"]
    usual = [int((layer + 1) % 4 != 0) for layer in range(len(turned))]
    return None if turned == usual else "no_rope_layers are not every fourth, as GGUF's are"


def read_phi3_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """config.json of Phi-3 and Phi-4-mini, whose layers all have the window."""
    config = read_llama_config(own, path, metadata, tensors, factors)
    context = metadata.get(f"{own.name}.rope.scaling.original_context_length")
    config[CONTEXT] = context or config["max_position_embeddings"]
    window, _ = read_windows(own, metadata, config["num_hidden_layers"])
    config["sliding_window"] = window or None
    return config


def write_phi3_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_phi3_config` reads; a window of 0 tells Phi-4 from its elders."""
    write_llama_metadata(writer, config)
    if rope_scaling(config)[0] != "longrope":
        writer.add_rope_scaling_orig_ctx_len(old_context(config))
    writer.add_sliding_window(config.get("sliding_window") or 0)


def read_glm_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """config.json of GLM-4, whose switch for biases is for queries, keys and values alone."""
    config = read_llama_config(own, path, metadata, tensors, factors)
    return {**config, "attention_bias": has_bias(own, tensors, "attn_q")}


def read_internlm2_config(own, path, metadata, tensors, factors) -> dict[str, Any]:
    """config.json of InternLM2, whose switch for biases is called so."""
    config = read_llama_config(own, path, metadata, tensors, factors)
    return {**config, "bias": has_bias(own, tensors, "attn_output")}
