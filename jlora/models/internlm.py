"""InternLM2 and 2.5 (arXiv 2403.17297), and InternLM3: what Llama computes, under other names.

InternLM2 has queries, keys and values in one layer: of each key head its queries, its key and its
value. Its code is not part of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama
from jlora.system.runtime import nn


@dataclass
class InternLM2Config(llama.LlamaConfig):
    model_type: str = "internlm2"
    bias: bool = True
    architectures: ClassVar = {"internlm2": "InternLM2ForCausalLM"}
    defaults: ClassVar = {"internlm2": {"vocab_size": 103168}}
    unread: ClassVar = {"internlm2": ("attention_bias", "mlp_bias")}

    @property
    def qkv_bias(self) -> bool:
        return self.bias

    @property
    def output_bias(self) -> bool:
        return self.bias


class Attention(llama.Attention):
    layer_names = "wqkv", "wo"
    grouped = True

    def make_layers(self, config: InternLM2Config) -> None:
        C, D = config.hidden_size, config.head_dim
        self.wqkv = nn.Linear(C, (self.heads + 2 * self.kv_heads) * D, bias=config.qkv_bias)
        self.wo = nn.Linear(self.heads * D, C, bias=config.output_bias)

    def project(self, x):
        B, T, _ = x.shape
        G, D, per = self.kv_heads, self.head_dim, self.heads // self.kv_heads
        qkv = self.wqkv(x).reshape(B, T, G, per + 2, D)
        q = qkv[:, :, :, :per].reshape(B, T, self.heads, D)
        return q, qkv[:, :, :, per], qkv[:, :, :, per + 1]

    def execute(self, x, cos, sin, keys, cache):
        return self.wo(self.attend(x, cos, sin, keys, cache))


class MLP(llama.MLP):
    layer_names = "w1", "w3", "w2"

    def make_layers(self, config: llama.LlamaConfig) -> None:
        C, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(C, inner, bias=False)
        self.w3 = nn.Linear(C, inner, bias=False)
        self.w2 = nn.Linear(inner, C, bias=False)

    def execute(self, x):
        return self.w2(self.act(self.w1(x), self.w3(x)))


class Block(llama.Block):
    attention = Attention
    mlp_type = MLP
    names = "attention", "feed_forward"
    norms = "attention_norm", None, "ffn_norm", None


class InternLM2Model(llama.LlamaModel):
    block = Block
    tokens = "tok_embeddings"


class InternLM2ForCausalLM(llama.LlamaForCausalLM):
    backbone = InternLM2Model
    head_name = "output"


@dataclass
class InternLM3Config(llama.LlamaConfig):
    model_type: str = "internlm3"
    architectures: ClassVar = {"internlm3": "InternLM3ForCausalLM"}
    defaults: ClassVar = {
        "internlm3": {
            "vocab_size": 128512, "intermediate_size": 10240, "num_hidden_layers": 48,
            "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        }
    }  # fmt: skip

    @classmethod
    def from_dict(cls, config: dict) -> InternLM3Config:
        """``qkv_bias`` and ``bias`` are its names of ``attention_bias`` and ``mlp_bias``."""
        config = dict(config)
        for name, own in (("qkv_bias", "attention_bias"), ("bias", "mlp_bias")):
            config[own] = config.get(own, config.get(name, False))
        if config["attention_bias"] != config["mlp_bias"]:
            raise ValueError("qkv_bias that is not bias is not supported")
        return super().from_dict(config)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "qkv_bias": self.attention_bias, "bias": self.mlp_bias}


class InternLM3ForCausalLM(llama.LlamaForCausalLM):
    pass
