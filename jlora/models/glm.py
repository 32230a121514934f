"""GLM-4 9B, dense: ``glm`` (arXiv 2406.12793) and, with norms after each part, ``glm4`` (0414).

Llama with biases on q, k and v, gate and up in one layer, and rotary positions that turn
neighbours in the first half of each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama
from jlora.models.phi3 import MLP, read_share
from jlora.models.rope import InterleavedRotary, rope_settings

DEFAULTS = {
    "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07, "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}  # fmt: skip


@dataclass
class GlmConfig(llama.LlamaConfig):
    model_type: str = "glm"
    partial_rotary_factor: float = 0.5
    architectures: ClassVar = {"glm": "GlmForCausalLM"}
    defaults: ClassVar = {"glm": DEFAULTS}
    unread: ClassVar = {"glm": ("mlp_bias",), "glm4": ("mlp_bias",)}

    @classmethod
    def read_rope(cls, config: dict) -> dict:
        share, config = read_share(config, 0.5)
        theta, scaling = rope_settings(config, share)
        return {**config, "rope_theta": theta, "rope_scaling": scaling}

    @property
    def rotary_size(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def output_bias(self) -> bool:
        return False


@dataclass
class Glm4Config(GlmConfig):
    model_type: str = "glm4"
    architectures: ClassVar = {"glm4": "Glm4ForCausalLM"}
    defaults: ClassVar = {"glm4": DEFAULTS}


class Attention(llama.Attention):
    rotary_type = InterleavedRotary


class Block(llama.Block):
    attention = Attention
    mlp_type = MLP


class GlmModel(llama.LlamaModel):
    block = Block


class GlmForCausalLM(llama.LlamaForCausalLM):
    backbone = GlmModel


class Block4(Block):
    norms = (
        "input_layernorm", "post_self_attn_layernorm",
        "post_attention_layernorm", "post_mlp_layernorm",
    )  # fmt: skip


class Glm4Model(llama.LlamaModel):
    block = Block4


class Glm4ForCausalLM(llama.LlamaForCausalLM):
    backbone = Glm4Model
