"""Hugging Face names, shapes and config.json -> a GGUF file: `gguf_file` the other way round.

Names, layouts, metadata and the choice of types follow llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.gguf_file import (
    GPT2_BLOCKS,
    GPT2_NAMES,
    LLAMA_BLOCKS,
    LLAMA_NAMES,
    ROPE_FACTORS,
    ROPE_SCALING,
    is_conv1d,
    llama3_factors,
)
from jlora.formats.rounding import narrow, norm, widen
from jlora.system.files import atomic_path

#: model_type -> GGUF architecture; Mistral's layers are Llama's.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}


def write_gguf(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> dict[str, float]:
    """Write a GGUF file, atomically.

    Args:
        config: config.json with every field that `GPT2Config.to_dict` or `LlamaConfig.to_dict`
            has, for one of `ARCHITECTURES`.
        tensors: float32 arrays by Hugging Face's names; a tied head is left out.
        kind: of the matrices, one of `gguf_file.QUANTIZATIONS`. Vectors, position embeddings and
            rotary factors stay F32; matrices whose rows do not divide into blocks become F16.
        tokenizer: metadata as `Tokenizer.to_gguf` gives it.
        name: ``general.name``.

    Returns:
        The norm of the rounding error (`rounding.norm`) of each tensor, by Hugging Face's name.

    Raises:
        UserError: the file cannot be written, or a weight does not fit into ``kind``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    errors = {}
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURES[config["model_type"]])
        try:
            add_metadata(writer, config, kind, name)
            for key, value in (tokenizer or {}).items():
                add_value(writer, key, value)
            factors = rope_factors(config)
            if factors is not None:
                writer.add_tensor(ROPE_FACTORS, factors)
                writer.add_string(ROPE_SCALING, json.dumps(config["rope_scaling"]))
            for old, new, array in stored_layout(config, tensors):
                own = kind_of(new, array, kind)
                stored = narrow(old, array, own)
                errors[old] = 0.0 if own == "F32" else norm(widen(stored, own) - array)
                writer.add_tensor(new, stored, raw_dtype=GGMLQuantizationType[own])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return errors


def stored_layout(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(Hugging Face's name, GGUF's name, array in GGUF's layout) of every tensor."""
    architecture = ARCHITECTURES[config["model_type"]]
    names, blocks = LLAMA_NAMES, LLAMA_BLOCKS
    if architecture == "gpt2":
        names, blocks = GPT2_NAMES, GPT2_BLOCKS
    inverse = {theirs: ours for ours, theirs in names.items()}
    for name, array in tensors.items():
        block = re.match(rf"{re.escape(blocks)}\.(\d+)\.", name)
        module, _, last = name[block.end() if block else 0 :].rpartition(".")
        prefix = f"blk.{block.group(1)}." if block else ""
        if architecture == "gpt2" and is_conv1d(name):
            array = array.T
        elif architecture == "llama" and module == "self_attn.q_proj":
            array = permute(array, config["num_attention_heads"])
        elif architecture == "llama" and module == "self_attn.k_proj":
            array = permute(array, config["num_key_value_heads"])
        yield name, f"{prefix}{inverse[module]}.{last}", np.ascontiguousarray(array)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q_proj and k_proj, the inverse of `gguf_file.unpermute`."""
    half = rows.shape[0] // heads // 2
    halves = rows.reshape(heads, 2, half, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def kind_of(name: str, array: np.ndarray, kind: str) -> str:
    """The type in which a tensor is stored where ``kind`` is asked for."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if array.ndim == 1 or name == "position_embd.weight":
        return "F32"
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return kind if array.shape[-1] % block == 0 else "F16"


def add_metadata(writer: Any, config: Mapping[str, Any], kind: str, name: str | None) -> None:
    """What llama.cpp wants to know of a model, tokenizer aside."""
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType, RopeScalingType

    writer.add_type(GGUFType.MODEL)
    if name:
        writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    kind, scaling = rope_scaling(config)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def add_value(writer: Any, key: str, value: Any) -> None:
    """One key-value pair of a plain Python value."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def rope_scaling(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(kind, settings) of a config's rope_scaling."""
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default")), scaling


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """The tensor in which GGUF keeps Llama 3's rotary scaling, float32 (head_dim / 2,)."""
    kind, scaling = rope_scaling(config)
    if kind != "llama3":
        return None
    return llama3_factors(scaling, config["rope_theta"], config["head_dim"]).astype(np.float32)
