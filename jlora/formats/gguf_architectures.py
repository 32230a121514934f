"""The architectures of GGUF files: names and layouts as llama.cpp's converter writes them.

* Llama, SmolLM3, InternLM: the rows of q_proj and k_proj are stored in the order of interleaved
  rotary pairs (0, d/2, 1, d/2+1, ...) of each head; Hugging Face keeps the two halves one after the
  other. Qwen, Gemma, Phi and OLMo 2 are stored as they are; GLM's pairs are interleaved in both.
* GPT-2: Conv1D weights are stored as (out, in); Hugging Face has them as (in, out).
* Gemma: norms multiply by 1 + w, and the sum is stored.
* InternLM2: the fused wqkv is stored as queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats import gguf_llama
from jlora.formats.gguf_architecture import Architecture, shortest
from jlora.formats.gguf_llama import read_llama_config, write_llama_metadata


def read_gpt2_config(
    own: Architecture,
    path: Path,
    metadata: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    factors: Mapping[str, np.ndarray],
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
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NAMES = {
    **LLAMA_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
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
INTERNLM2_NAMES = {
    "token_embd": "model.tok_embeddings",
    "output_norm": "model.norm",
    "output": "output",
    "attn_norm": "attention_norm",
    "attn_q": "attention.wqkv.q",
    "attn_k": "attention.wqkv.k",
    "attn_v": "attention.wqkv.v",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}


def without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {key: value for key, value in names.items() if key not in left_out}


LLAMA = Architecture(
    name="llama",
    transformers="LlamaForCausalLM",
    names=LLAMA_NAMES,
    blocks="model.layers",
    read_config=gguf_llama.read_mistral_config,
    write_metadata=gguf_llama.write_windowed_metadata,
    permuted={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
    },
    windows=(True, False),
    biases=True,
)
SMOLLM3 = replace(
    LLAMA,
    biases=False,
    name="smollm3",
    transformers="SmolLM3ForCausalLM",
    read_config=gguf_llama.read_qwen_config,
    check=gguf_llama.check_smollm3,
)
QWEN2 = replace(
    LLAMA,
    biases=False,
    name="qwen2",
    transformers="Qwen2ForCausalLM",
    read_config=gguf_llama.read_qwen_config,
    permuted={},
    pre="qwen2",
)
QWEN3 = replace(
    QWEN2, name="qwen3", transformers="Qwen3ForCausalLM", names={**LLAMA_NAMES, **QK_NORMS}
)
OLMO2 = Architecture(
    name="olmo2",
    transformers="Olmo2ForCausalLM",
    names={
        **without(GEMMA_NAMES, "attn_norm", "ffn_norm"),
        **QK_NORMS,
    },
    blocks="model.layers",
    read_config=read_llama_config,
    write_metadata=write_llama_metadata,
    own_head=True,
)
GEMMA2 = Architecture(
    name="gemma2",
    transformers="Gemma2ForCausalLM",
    names=without(GEMMA_NAMES, "output"),
    blocks="model.layers",
    read_config=gguf_llama.read_gemma_config,
    write_metadata=gguf_llama.write_gemma_metadata,
    plus_one=("norm",),
    computed=gguf_llama.CAPS,
    windows=(True, True),
    check=gguf_llama.check_gemma2,
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    transformers="Gemma3ForCausalLM",
    names={**GEMMA_NAMES, **QK_NORMS},
    model_type="gemma3_text",
    computed=("final_logit_softcapping",),
    check=gguf_llama.check_gemma3,
)
PHI3 = Architecture(
    name="phi3",
    transformers="Phi3ForCausalLM",
    names={
        **without(LLAMA_NAMES, "attn_q", "attn_k", "attn_v", "ffn_gate"),
        "attn_qkv": "self_attn.qkv_proj",
        "ffn_up": "mlp.gate_up_proj",
    },
    blocks="model.layers",
    read_config=gguf_llama.read_phi3_config,
    write_metadata=gguf_llama.write_phi3_metadata,
    computed=("rope.scaling.attn_factor",),
    part_turned=True,
    windows=(True, False),
)
GLM = Architecture(
    name="chatglm",
    transformers="GlmForCausalLM",
    names={**without(LLAMA_NAMES, "ffn_gate"), "ffn_up": "mlp.gate_up_proj"},
    blocks="model.layers",
    read_config=gguf_llama.read_glm_config,
    write_metadata=write_llama_metadata,
    model_type="glm",
    part_turned=True,
    pre="chatglm-bpe",
)
GLM4 = replace(
    GLM,
    name="glm4",
    transformers="Glm4ForCausalLM",
    names={
        **GLM.names,
        "post_attention_norm": "post_self_attn_layernorm",
        "post_ffw_norm": "post_mlp_layernorm",
    },
    model_type="glm4",
    pre="glm4",
)
INTERNLM2 = Architecture(
    name="internlm2",
    transformers="InternLM2ForCausalLM",
    names=INTERNLM2_NAMES,
    blocks="model.layers",
    read_config=gguf_llama.read_internlm2_config,
    write_metadata=write_llama_metadata,
    permuted={"wqkv.q": "num_attention_heads", "wqkv.k": "num_key_value_heads"},
    fused="attention.wqkv",
    own_head=True,
)
GPT2 = Architecture(
    name="gpt2",
    transformers="GPT2LMHeadModel",
    names=GPT2_NAMES,
    blocks="transformer.h",
    read_config=read_gpt2_config,
    write_metadata=write_gpt2_metadata,
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    biases=True,
    pre="gpt-2",
)
ARCHITECTURES = {
    each.name: each
    for each in (
        LLAMA, QWEN2, GPT2, QWEN3, SMOLLM3, OLMO2, GEMMA2, GEMMA3, PHI3, GLM, GLM4, INTERNLM2,
    )
}  # fmt: skip
