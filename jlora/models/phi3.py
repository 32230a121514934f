"""Phi-3 (arXiv 2404.14219) and Phi-4-mini: Llama with fused projections and LongRoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama
from jlora.models.config_fields import number
from jlora.models.rope import CONTEXT, rope_settings
from jlora.models.windows import FULL, SLIDING, read_windows
from jlora.system.runtime import jt, nn


@dataclass
class Phi3Config(llama.LlamaConfig):
    model_type: str = "phi3"
    partial_rotary_factor: float = 1.0
    original_max_position_embeddings: int = 4096
    architectures: ClassVar = {"phi3": "Phi3ForCausalLM"}
    defaults: ClassVar = {
        "phi3": {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000,
            "bos_token_id": 1, CONTEXT: 4096,
        }
    }  # fmt: skip
    unread: ClassVar = {"phi3": ("attention_bias", "mlp_bias")}

    @classmethod
    def read_rope(cls, config: dict) -> dict:
        share, config = read_share(config, 1.0)
        for key in ("rope_scaling", "rope_parameters"):
            settings = config.get(key)
            if isinstance(settings, dict):
                kind = settings.get("rope_type", settings.get("type"))
                if kind in ("su", "yarn"):  # what LongRoPE was called first
                    config[key] = {**settings, "rope_type": "longrope"}
                elif kind not in (None, "default", "longrope"):
                    raise ValueError(f"{key} of type {kind!r} is not supported")
        theta, scaling = rope_settings(config, share)
        return {**config, "rope_theta": theta, "rope_scaling": scaling}

    @classmethod
    def read_layers(cls, config, result):
        own = FULL if config.get("sliding_window") is None else SLIDING
        layers = result.num_hidden_layers
        return read_windows(config, layers, [own] * layers, listed=False)

    def to_dict(self) -> dict:
        values = super().to_dict()
        for name in ("layer_types", "use_sliding_window"):  # all layers have the window
            values.pop(name, None)
        return values

    @property
    def rotary_size(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)


def read_share(config: dict, usual: float) -> tuple[float, dict]:
    """The share of a head that rotary positions turn; the config with it in its own field.

    Raises:
        ValueError: it is no number up to 1, or two fields say different things.
    """
    places = (config, config.get("rope_scaling"), config.get("rope_parameters"))
    shares = [p.get("partial_rotary_factor") for p in places if isinstance(p, dict)]
    found = {number("partial_rotary_factor", share) for share in shares if share is not None}
    share = min(found, default=usual)
    if len(found) > 1 or share > 1:
        raise ValueError(f"partial_rotary_factor {max(found)!r} is not supported")
    return share, {**config, "partial_rotary_factor": share}


class Attention(llama.Attention):
    layer_names = "qkv_proj", "o_proj"

    def make_layers(self, config: Phi3Config) -> None:
        C, D = config.hidden_size, config.head_dim
        self.qkv_proj = nn.Linear(C, (self.heads + 2 * self.kv_heads) * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, C, bias=config.output_bias)

    def project(self, x):
        qkv, H, G = self.split(self.qkv_proj(x)), self.heads, self.kv_heads
        return qkv[:, :, :H], qkv[:, :, H : H + G], qkv[:, :, H + G :]


class MLP(llama.MLP):
    layer_names = "gate_up_proj", "down_proj"

    def make_layers(self, config: llama.LlamaConfig) -> None:
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(C, 2 * inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)

    def execute(self, x: jt.Var) -> jt.Var:
        both = self.gate_up_proj(x)
        inner = both.shape[-1] // 2
        return self.down_proj(self.act(both[..., :inner], both[..., inner:]))


class Block(llama.Block):
    attention = Attention
    mlp_type = MLP


class Phi3Model(llama.LlamaModel):
    block = Block


class Phi3ForCausalLM(llama.LlamaForCausalLM):
    backbone = Phi3Model
