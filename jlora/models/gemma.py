"""Gemma 2 (arXiv 2408.00118) and the text models of Gemma 3 (arXiv 2503.19786).

Llama with scaled embeddings, norms of weight 1 + w before and after attention and MLP, a gated
GELU and another scale of the scores; every second or sixth layer sees all tokens, the others a
window. Gemma 2 caps scores and logits; Gemma 3 has norms of queries and keys, and in the layers
with a window another base of the rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jlora.models import llama
from jlora.models.config_fields import number
from jlora.models.gpt2 import GELU
from jlora.models.rope import Rope, make_rope
from jlora.models.windows import FULL, SLIDING, read_windows
from jlora.system.runtime import jt, nn

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
SIZES = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "eos_token_id": 1,
    "bos_token_id": 2, "tie_word_embeddings": True, "sliding_window": 4096,
}  # fmt: skip


@dataclass
class Gemma2Config(llama.LlamaConfig):
    model_type: str = "gemma2"
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    architectures: ClassVar = {"gemma2": "Gemma2ForCausalLM"}
    defaults: ClassVar = {
        "gemma2": {
            **SIZES, "vocab_size": 256000, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        }
    }  # fmt: skip
    unread: ClassVar = {"gemma2": ("mlp_bias",)}
    activation: ClassVar = ("hidden_activation", TANH_GELU)
    computed: ClassVar = (
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    )  # fmt: skip

    @classmethod
    def from_dict(cls, config: dict) -> Gemma2Config:
        result = super().from_dict(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(result, name) is not None:
                number(name, getattr(result, name))
        return result

    @classmethod
    def read_layers(cls, config, result):
        layers = result.num_hidden_layers
        return read_windows(config, layers, cls.own_layers(config, layers), listed=True)

    @classmethod
    def own_layers(cls, config: dict, layers: int) -> list[str]:
        return [FULL if i % 2 else SLIDING for i in range(layers)]

    def to_dict(self) -> dict:
        """With nulls where a missing field would mean a number to transformers."""
        names = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
        nulls = {name: None for name in names if getattr(self, name) is None}
        values = super().to_dict()
        values.pop("use_sliding_window", None)
        types = self.layer_types or [FULL] * self.num_hidden_layers
        return {**values, **nulls, "layer_types": types}

    @property
    def score_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def score_cap(self) -> float | None:
        return self.attn_logit_softcapping

    @property
    def logit_cap(self) -> float | None:
        return self.final_logit_softcapping

    @property
    def norm_offset(self) -> float:
        return 1.0

    @property
    def embedding_scale(self) -> float:
        return float(np.float32(self.hidden_size**0.5))


@dataclass
class Gemma3Config(Gemma2Config):
    model_type: str = "gemma3_text"
    rope_local_base_freq: float = 10000.0
    architectures: ClassVar = {"gemma3_text": "Gemma3ForCausalLM"}
    defaults: ClassVar = {
        "gemma3_text": {
            **SIZES, "vocab_size": 262208, "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
        }
    }  # fmt: skip
    unread: ClassVar = {"gemma3_text": ("mlp_bias",)}
    #: Its class in transformers does not read the cap of the scores.
    computed: ClassVar = ("query_pre_attn_scalar", "final_logit_softcapping")

    @classmethod
    def read_rope(cls, config: dict) -> dict:
        """transformers 5 writes the settings of both kinds of layers as ``rope_parameters``."""
        settings = config.get("rope_parameters")
        if isinstance(settings, dict) and {FULL, SLIDING} & set(settings):
            unknown = set(settings) - {FULL, SLIDING}
            if unknown or not all(isinstance(s, dict) for s in settings.values()):
                raise ValueError(f"rope_parameters {settings!r}: not one object for each kind")
            local = settings.get(SLIDING, {})
            if local.get("rope_type", "default") != "default":
                raise ValueError(
                    f"rope_parameters.{SLIDING} of type {local['rope_type']!r} is not supported"
                )
            base = local.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
            config = {**config, "rope_local_base_freq": base}
            config["rope_parameters"] = settings.get(FULL)
        return super().read_rope(config)

    @classmethod
    def own_layers(cls, config: dict, layers: int) -> list[str]:
        every = config.get("sliding_window_pattern", 6)
        if type(every) is not int or every < 1:
            raise ValueError(f"sliding_window_pattern is {every!r}, no whole number above 0")
        return [SLIDING if (i + 1) % every else FULL for i in range(layers)]

    def ropes(self) -> list[Rope]:
        return [*super().ropes(), make_rope(self.rope_local_base_freq, self.head_dim, None, 0)]

    @property
    def layer_ropes(self):
        return [int(kind == SLIDING) for kind in self.layer_types or [FULL] * self.layers]


class GEGLU(nn.Module):
    """gelu(gate) * up, by the tanh approximation."""

    kind: ClassVar = "gelu_tanh"

    def execute(self, gate: jt.Var, up: jt.Var) -> jt.Var:
        return GELU.execute(self, gate) * up


class MLP(llama.MLP):
    act_type = GEGLU


class Block2(llama.Block):
    mlp_type = MLP
    norms = (
        "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )  # fmt: skip


class Gemma2Model(llama.LlamaModel):
    block = Block2


class Gemma2ForCausalLM(llama.LlamaForCausalLM):
    backbone = Gemma2Model


class Attention3(llama.Attention):
    qk_norm = "head"


class Block3(Block2):
    attention = Attention3


class Gemma3Model(llama.LlamaModel):
    block = Block3


class Gemma3ForCausalLM(llama.LlamaForCausalLM):
    backbone = Gemma3Model
