"""Qwen3, dense: Llama with norms of queries and keys, head by head (arXiv 2505.09388)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama


@dataclass
class Qwen3Config(llama.LlamaConfig):
    model_type: str = "qwen3"
    architectures: ClassVar = {"qwen3": "Qwen3ForCausalLM"}
    defaults: ClassVar = {
        "qwen3": {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
        }
    }
    unread: ClassVar = {"qwen3": ("mlp_bias",)}
    lists_layers: ClassVar = ("qwen3",)


class Attention(llama.Attention):
    qk_norm = "head"


class Block(llama.Block):
    attention = Attention


class Qwen3Model(llama.LlamaModel):
    block = Block


class Qwen3ForCausalLM(llama.LlamaForCausalLM):
    backbone = Qwen3Model
