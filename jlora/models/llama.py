"""The Llama family: Llama 2 and 3, SmolLM2, Qwen2 and Qwen2.5, Mistral without sliding window.

Touvron et al. 2023 (arXiv 2302.13971); parameter names are those of the Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from jlora.models.attention import (
    CausalAttention,
    KeyRange,
    KVCache,
    Stream,
    positions,
    step_keys,
)
from jlora.models.config_fields import check_not_computed, known_fields, number, shown
from jlora.models.head import CausalLM, LanguageHead
from jlora.system.runtime import jt, nn

ROPE_SETTINGS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass
class LlamaConfig:
    """The fields of a Llama-family ``config.json`` that change what is computed."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    model_type: str = "llama"
    gated: ClassVar[bool] = True
    #: model_type -> transformers' class.
    architectures: ClassVar[dict[str, str]] = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }
    #: model_type -> what transformers takes for fields that a file lacks, where it is not Llama's.
    defaults: ClassVar[dict[str, dict]] = {
        "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8},
        "qwen2": {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    }

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict) -> LlamaConfig:
        """Take what this class knows out of a ``config.json``.

        Raises:
            ValueError: the file asks for something that is not built here.
        """
        model_type = config.get("model_type", cls.model_type)
        if model_type not in cls.architectures:
            types = ", ".join(cls.architectures)
            raise ValueError(f"model_type {model_type!r} is not one of {types}")
        config = {**cls.defaults.get(model_type, {}), **config}
        if model_type in ("mistral", "qwen2"):  # their classes in transformers do not read these
            config.update(attention_bias=False, mlp_bias=False)
        theta, scaling = rope_settings(config)
        config.update(rope_theta=theta, rope_scaling=scaling)
        result = cls(**known_fields(cls, config))
        check_not_computed(config)
        check_window(config, result.num_hidden_layers)
        if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported")
        heads, kv_heads = result.num_attention_heads, result.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if config.get("head_dim") is None and result.hidden_size % heads:
            raise ValueError(
                f"hidden_size {result.hidden_size} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        if result.head_dim % 2:
            raise ValueError(f"head_dim {result.head_dim} is odd, and rotary embedding takes pairs")
        return result

    def to_dict(self) -> dict:
        """What ``config.json`` holds, transformers' architecture name included."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.model_type == "mistral":
            values["sliding_window"] = None  # absent means a window to transformers
        architecture = self.architectures[self.model_type]
        return {"architectures": [architecture], "hidden_act": "silu", **values}

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size

    @property
    def norm_eps(self) -> float:
        return self.rms_norm_eps

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has biases on q, k and v alone; ``attention_bias`` puts them on o as well."""
        return self.attention_bias or self.model_type == "qwen2"


def rope_settings(config: dict) -> tuple[float, dict | None]:
    """Base and scaling of the rotary embedding that a config.json asks for.

    Older files have ``rope_theta`` and ``rope_scaling``; transformers 5 writes both as one dict,
    ``rope_parameters``.

    Returns:
        theta, and ``{"rope_type": ..., number by number of ROPE_SETTINGS}`` or None for no scaling.

    Raises:
        ValueError: another kind of scaling, a number that is missing or none, or two settings that
            contradict each other.
    """
    found = [
        one_rope_setting(config, key)
        for key in ("rope_scaling", "rope_parameters")
        if config.get(key) not in (None, {})
    ] or [one_rope_setting({**config, "rope_scaling": {}}, "rope_scaling")]
    if found[0] != found[-1]:
        raise ValueError("rope_scaling and rope_parameters contradict each other; leave one out")
    return found[0]


def one_rope_setting(config: dict, key: str) -> tuple[float, dict | None]:
    """What one of the two fields says, see `rope_settings`."""
    settings = config[key]
    if not isinstance(settings, dict):
        raise ValueError(f"{key} is {settings!r}, not an object with rope_type")
    layers = [name for name, value in settings.items() if isinstance(value, dict)]
    if layers:
        raise ValueError(f"{key} by layer type ({', '.join(layers)}) is not supported")
    factor = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor not in (None, 1):
        raise ValueError(f"partial_rotary_factor {factor!r} is not supported")
    where = f"{key}.rope_theta" if "rope_theta" in settings else "rope_theta"
    theta = number(where, settings.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = settings.get("rope_type") or settings.get("type")
    if kind is None:
        others = [name for name in settings if name in sum(ROPE_SETTINGS.values(), ())]
        if others:
            raise ValueError(
                f"{key} has {', '.join(others)} but no rope_type; write one of default, "
                f"{', '.join(ROPE_SETTINGS)}"
            )
    if kind in (None, "default"):
        return theta, None
    if kind not in ROPE_SETTINGS:
        raise ValueError(f"{key} of type {kind!r} is not supported")
    if kind == "llama3":  # where transformers looks for it
        context = "original_max_position_embeddings"
        given = {context: config.get("max_position_embeddings", 2048), **settings}
        settings = {**given, context: config.get(context, given[context])}
    missing = [name for name in ROPE_SETTINGS[kind] if name not in settings]
    if missing:
        raise ValueError(f"{key} of type {kind!r} lacks {', '.join(missing)}")
    values = {name: number(f"{key}.{name}", settings[name]) for name in ROPE_SETTINGS[kind]}
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(f"{key}.high_freq_factor must be above low_freq_factor")
    return theta, {"rope_type": kind, **values}


def check_window(config: dict, layers: int) -> None:
    """Refuse a config.json by which some token would not see all before it.

    Raises:
        ValueError: a sliding window shorter than the context.
    """
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if config.get("model_type") == "mistral":
        field, used = "sliding_window", True
        if "sliding_window" not in config and context is not None:
            window = 4096  # what transformers takes; null means none
        context = context or 131072
    else:  # `layer_types` overrides, and has been checked
        field = "use_sliding_window"
        used = config.get("use_sliding_window") and config.get("layer_types") is None
        first = config.get("max_window_layers")
        used = used and (first is None or number("max_window_layers", first, above=-1) < layers)
        window = config.get("sliding_window", 4096)
    if used and window is not None and number("sliding_window", window) < (context or math.inf):
        raise ValueError(
            f"{field} {shown(config.get(field, window))}: sliding-window attention is not "
            "supported; a model without it has null or false there"
        )


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each pair of dimensions, (D / 2,) float32.

    Rotary embedding (Su et al., arXiv 2104.09864), with Llama 3.1's scaling or plain linear
    scaling where the config asks for it, as transformers computes them.
    """
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is None:
        pass
    elif scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    else:
        old_context = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # How far each wave lies between "longer than the old context" (0) and "short" (1).
        turns = old_context * frequencies / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies.astype(np.float32)


class Rotary(nn.Module):
    """Turns each pair (x[i], x[i + D/2]) of a head by the angle of its position."""

    def execute(self, x: jt.Var, cos: jt.Var, sin: jt.Var) -> jt.Var:
        """x (B, T, H, D), cos and sin (B, T, D / 2) -> (B, T, H, D)."""
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return jt.concat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, size: int, eps: float):
        self.weight = jt.ones((size,))
        self.eps = eps

    def execute(self, x: jt.Var) -> jt.Var:
        return x / jt.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    def execute(self, gate: jt.Var, up: jt.Var) -> jt.Var:
        return gate * jt.sigmoid(gate) * up


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        C, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, self.heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, C, bias=config.attention_bias)
        self.rotary = Rotary()
        self.attention = CausalAttention()

    def project(self, x: jt.Var) -> tuple[jt.Var, jt.Var, jt.Var]:
        """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, H_kv, D), not yet turned."""
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.heads, self.head_dim)
        k = self.k_proj(x).reshape(B, T, self.kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, T, self.kv_heads, self.head_dim)
        return q, k, v

    def execute(self, x, cos, sin, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        if cache is None:
            y = self.attention(q, k, v, keys)
        else:
            y = cache.attend(self.layer, self.attention, q, k, v, keys)
        return self.o_proj(y.reshape(B, T, self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)
        self.act = SwiGLU()

    def execute(self, x: jt.Var) -> jt.Var:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    attention: type = Attention  # a family with another one says so in a subclass

    def __init__(self, config: LlamaConfig, layer: int):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def execute(self, x, cos, sin, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, keys, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    block: type = Block

    def __init__(self, config: LlamaConfig):
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.block(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies = jt.array(rope_frequencies(config))  # underscore: no parameter

    def execute(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        B, T = input_ids.shape
        past, keys = step_keys(cache, attention_mask, B, T)
        angle = positions(B, T, past, keys).float32().unsqueeze(-1) * self._frequencies
        cos, sin = jt.cos(angle), jt.sin(angle)  # (B, T, D / 2)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        for block in self.layers:
            x = block(x, cos, sin, keys, cache)
        return self.norm(x)


class LlamaForCausalLM(CausalLM):
    """A Llama-family model with its language-model head, tied to the embedding or not."""

    backbone: type = LlamaModel

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.model = self.backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head = LanguageHead()

    def hidden_states(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        """Token ids (B, T) int32 -> states after the final norm (B, T, C) float32."""
        return self.model(input_ids, attention_mask, cache)

    @property
    def output_embedding(self) -> jt.Var:
        """The weight of the language-model head, (V, C)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def first_attention(self) -> CausalAttention:
        return self.model.layers[0].self_attn.attention
