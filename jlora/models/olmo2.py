"""OLMo 2: Llama with norms after attention and MLP instead of before, and of all queries and keys.

OLMo team 2025 (arXiv 2501.00656).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama


@dataclass
class Olmo2Config(llama.LlamaConfig):
    model_type: str = "olmo2"
    architectures: ClassVar = {"olmo2": "Olmo2ForCausalLM"}
    defaults: ClassVar = {"olmo2": {"vocab_size": 50304, "rms_norm_eps": 1e-5}}
    unread: ClassVar = {"olmo2": ("mlp_bias",)}


class Attention(llama.Attention):
    qk_norm = "all"


class Block(llama.Block):
    attention = Attention
    norms = None, "post_attention_layernorm", None, "post_feedforward_layernorm"


class Olmo2Model(llama.LlamaModel):
    block = Block


class Olmo2ForCausalLM(llama.LlamaForCausalLM):
    backbone = Olmo2Model
