"""Small models with random weights of a size that makes every part count."""

from __future__ import annotations

import numpy as np

from jlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jlora.models.llama import LlamaConfig, LlamaForCausalLM
from jlora.system.runtime import jt

GPT2 = {"vocab_size": 23, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}


# Sizes that the block operator takes: everything a multiple of 32.
WIDE_GPT2 = {"n_embd": 64, "n_head": 2, "n_positions": 128}
WIDE_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def tiny_gpt2(seed: int = 0, scale: float = 0.4, **changes) -> GPT2LMHeadModel:
    return randomise(GPT2LMHeadModel(GPT2Config.from_dict({**GPT2, **changes})), seed, scale)


def tiny_llama(seed: int = 0, scale: float = 0.4, **changes) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig.from_dict({**LLAMA, **changes})), seed, scale)


def wide_gpt2(**changes) -> GPT2LMHeadModel:
    return tiny_gpt2(**{"scale": 0.15, **WIDE_GPT2, **changes})


def wide_llama(**changes) -> LlamaForCausalLM:
    return tiny_llama(**{"scale": 0.15, **WIDE_LLAMA, **changes})


def randomise(model, seed: int, scale: float):
    generator = np.random.default_rng(seed)
    for _, parameter in sorted(model.named_parameters()):
        values = scale * generator.standard_normal(parameter.shape)
        if len(parameter.shape) == 1:
            values += 1  # norms, and biases that matter
        parameter.assign(jt.array(values.astype(np.float32)))
    return model


def weights(model) -> dict[str, np.ndarray]:
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def ids_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 23, shape).astype(np.int32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest bf16 (ties to even), as float32."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def randomise_adapter(model, seed: int = 1, scale: float = 0.3):
    """Random adapter tensors: B would be zero and hide every mistake. The model, in eval mode."""
    generator = np.random.default_rng(seed)
    tensors = model.adapter_tensors()
    model.set_adapter_tensors(
        {n: scale * generator.standard_normal(a.shape).astype("f") for n, a in tensors.items()}
    )
    model.eval()
    return model
