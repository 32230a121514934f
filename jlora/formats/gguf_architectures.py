"""How the model families stand in GGUF files: names, layouts and metadata, both ways.

The names and layouts are those of llama.cpp's ``convert_hf_to_gguf.py``:

* Llama: the rows of q_proj and k_proj are stored in the order of interleaved rotary pairs
  (0, d/2, 1, d/2+1, ...) of each head; Hugging Face keeps the two halves one after the other.
* GPT-2: Conv1D weights are stored as (out, in); Hugging Face has them as (in, out).
* Qwen2: stored as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.safetensors_file import one_line
from jlora.system.errors import UserError

#: The tensor in which GGUF keeps Llama 3's rotary scaling, one divisor a frequency.
ROPE_FACTORS = "rope_freqs.weight"
#: jlora's own key: that scaling as config.json has it, JSON.
ROPE_SCALING = "jlora.rope_scaling"


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files, in Hugging Face's terms.

    Attributes:
        name: ``general.architecture``.
        transformers: the class in config.json.
        names: module in the file -> Hugging Face's, inside a block relative to it.
        blocks: Hugging Face's name of the list of blocks.
        read_config: (this, path, metadata, tensors or their `placeholder`, rotary factors or None)
            -> config.json; KeyError: the file lacks that key.
        write_metadata: (gguf's writer, config.json) -> None: what llama.cpp needs to know.
        transposed: modules whose weights are (in, out) in Hugging Face's layout.
        permuted: module with interleaved rows in the file -> field with its number of heads.
        pre: how the tokenizer of every model of it splits texts, `tokenizer.ggml.pre`; None: they
            differ.
    """

    name: str
    transformers: str
    names: Mapping[str, str] = field(repr=False)
    blocks: str
    read_config: Callable[..., dict[str, Any]] = field(repr=False)
    write_metadata: Callable[[Any, Mapping[str, Any]], None] = field(repr=False)
    transposed: tuple[str, ...] = ()
    permuted: Mapping[str, str] = field(default_factory=dict)
    pre: str | None = None

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor, by Hugging Face's name, is stored the other way round."""
        module, _, last = name.rpartition(".")
        return last == "weight" and module.endswith(self.transposed)

    def heads(self, name: str, config: Mapping[str, Any]) -> int | None:
        """The number of heads among which a tensor's rows are interleaved in the file, or None."""
        module = name.rpartition(".")[0]
        fields = [key for end, key in self.permuted.items() if module.endswith(end)]
        return config[fields[0]] if fields else None


def shortest(value: float) -> float:
    """A float32 of the metadata as the number someone wrote: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


# Llama -----------------------------------------------------------------------------------------


def read_llama_config(
    own: Architecture,
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """config.json of a model of Llama's family."""

    def get(key: str) -> Any:
        return metadata[f"{own.name}.{key}"]

    heads = get("attention.head_count")
    if "model.embed_tokens.weight" not in tensors:
        raise KeyError("token_embd.weight")
    hidden = get("embedding_length")
    head_dim = metadata.get(f"{own.name}.attention.key_length") or hidden // heads
    config = {
        "model_type": own.name,
        "architectures": [own.transformers],
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
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
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if own.name == "llama":  # Qwen2's biases are part of its architecture
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    factor = metadata.get(f"{own.name}.rope.scaling.factor")
    factor = factor or metadata.get(f"{own.name}.rope.scale_linear")  # in files of 2023
    # llama.cpp takes a factor without a type for linear scaling.
    kind = metadata.get(f"{own.name}.rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear"):
        raise UserError(
            f"{path}: rotary scaling {kind!r} is not supported; take the model from Hugging Face"
        )
    if kind == "linear":
        factor = shortest(factor or get("rope.scaling.factor"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if factors is not None:
        known = metadata.get(ROPE_SCALING)
        config["rope_scaling"] = llama3_scaling(
            path, factors, config["rope_theta"], head_dim, known
        )
    return config


def write_llama_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_llama_config` reads; Llama 3's scaling is a tensor, see `rope_factors`."""
    from gguf import RopeScalingType

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


def llama3_scaling(
    path: Path,
    factors: np.ndarray,
    theta: float,
    head_dim: int,
    known: str | None = None,
) -> dict[str, Any]:
    """Llama 3's rope_scaling entry from the per-frequency divisors that GGUF keeps instead.

    Every Llama 3.x has low 1, high 4 and 8192 original positions, only the factor differs (8 or
    32). The divisors are computed again from that, or from what jlora wrote beside them
    (``known``, JSON), and must agree: otherwise nothing is guessed.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    try:
        scaling = scaling if known is None else json.loads(known)
        expected = llama3_factors(scaling, theta, head_dim)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: its {ROPE_SCALING} is damaged ({one_line(error)}); export the model again"
        ) from error
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UserError(
            f"{path}: its rope_freqs are not those of Llama 3; take the model from Hugging Face"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisor of each rotary frequency that a llama3 rope_scaling means, (head_dim / 2,)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


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


# GPT-2 -----------------------------------------------------------------------------------------


def read_gpt2_config(
    own: Architecture,
    path: Path,
    metadata: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """config.json of a GPT-2 model; a repeated embedding under ``output`` is dropped."""
    for name, key in (
        ("transformer.wte.weight", "token_embd"),
        ("transformer.wpe.weight", "position_embd"),
    ):
        if name not in tensors:
            raise KeyError(f"{key}.weight")
    embedding = tensors["transformer.wte.weight"]
    head = tensors.get("lm_head.weight")
    # Quantizers may store the two copies with different precision; GPT-2 has only one.
    if head is not None and head.shape == embedding.shape:
        del tensors["lm_head.weight"]
    return {
        "model_type": own.name,
        "architectures": [own.transformers],
        "vocab_size": embedding.shape[0],
        "n_positions": tensors["transformer.wpe.weight"].shape[0],
        "n_embd": metadata[f"{own.name}.embedding_length"],
        "n_layer": metadata[f"{own.name}.block_count"],
        "n_head": metadata[f"{own.name}.attention.head_count"],
        "n_inner": metadata[f"{own.name}.feed_forward_length"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shortest(metadata[f"{own.name}.attention.layer_norm_epsilon"]),
        "tie_word_embeddings": True,
    }


def write_gpt2_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_gpt2_config` reads."""
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}

LLAMA = Architecture(
    name="llama",
    transformers="LlamaForCausalLM",
    names=LLAMA_NAMES,
    blocks="model.layers",
    read_config=read_llama_config,
    write_metadata=write_llama_metadata,
    permuted={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
    },
)
QWEN2 = replace(LLAMA, name="qwen2", transformers="Qwen2ForCausalLM", permuted={}, pre="qwen2")
GPT2 = Architecture(
    name="gpt2",
    transformers="GPT2LMHeadModel",
    names=GPT2_NAMES,
    blocks="transformer.h",
    read_config=read_gpt2_config,
    write_metadata=write_gpt2_metadata,
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    pre="gpt-2",
)
ARCHITECTURES = {each.name: each for each in (LLAMA, QWEN2, GPT2)}
