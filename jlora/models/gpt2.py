"""GPT-2 (Radford et al. 2019), with the parameter names of the Hugging Face checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from jlora.layers import Conv1D
from jlora.models.attention import (
    CausalAttention,
    KeyRange,
    KVCache,
    Stream,
    positions,
    step_keys,
)
from jlora.models.config_fields import check_not_computed, known_fields
from jlora.models.head import CausalLM, LanguageHead
from jlora.models.parts import Parts
from jlora.models.windows import FULL, read_windows
from jlora.system.runtime import jt, nn

#: OpenAI's TensorFlow names for a layer's gain, weight and bias.
TENSORFLOW_ENDINGS = {".g": ".weight", ".w": ".weight", ".b": ".bias"}
#: Names that transformers takes for GPT-2's own.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
#: Names of one function, the tanh approximation of GELU.
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
#: Variants of GPT-2 that are not built here, and the values that stand for the usual one.
NEUTRAL = {
    "reorder_and_upcast_attn": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (True,),
}


@dataclass
class GPT2Config:
    """The fields of a GPT-2 ``config.json`` that change what is computed."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    model_type: str = "gpt2"
    gated: ClassVar[bool] = False  # the MLP multiplies nothing by its activation

    @classmethod
    def from_dict(cls, config: dict) -> GPT2Config:
        """Take what this class knows out of a ``config.json``.

        Raises:
            ValueError: the file asks for a variant of GPT-2 that is not built here.
        """
        config = dict(config)
        for other, name in ALIASES.items():
            if other in config and config[other] != config.setdefault(name, config[other]):
                raise ValueError(
                    f"{other} {config[other]!r} and {name} {config[name]!r} are two names of one "
                    "setting, with two values"
                )
        config.setdefault("n_positions", config.get("n_ctx", 1024))
        result = cls(**known_fields(cls, config))
        check_not_computed(config, NEUTRAL)
        read_windows(config, result.n_layer, [FULL] * result.n_layer, listed=False)
        if result.activation_function not in TANH_GELUS:
            raise ValueError(f"activation_function {result.activation_function!r} is not supported")
        if result.n_embd % result.n_head:
            raise ValueError(f"n_embd {result.n_embd} is not a multiple of n_head {result.n_head}")
        return result

    def to_dict(self) -> dict:
        """What ``config.json`` holds, transformers' architecture name included."""
        return {"architectures": ["GPT2LMHeadModel"], "n_ctx": self.n_positions, **asdict(self)}

    @property
    def max_positions(self) -> int:
        return self.n_positions

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def heads(self) -> int:
        return self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_epsilon

    @property
    def layers(self) -> int:
        return self.n_layer


def hugging_face_name(name: str) -> str:
    """The name of a parameter in OpenAI's TensorFlow checkpoints -> Hugging Face's."""
    return name[:-2] + TENSORFLOW_ENDINGS[name[-2:]] if name[-2:] in TENSORFLOW_ENDINGS else name


class GELU(nn.Module):
    """The tanh approximation of GELU that GPT-2 was trained with ("gelu_new")."""

    def execute(self, x: jt.Var) -> jt.Var:
        # 0.5 (1 + tanh z) = sigmoid(2 z); the gradient of Jittor's tanh is NaN beyond |z| of 45.
        return x * jt.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


class LayerNorm(nn.Module):
    """y = weight * (x - mean) / sqrt(var + eps) + bias over the last dimension."""

    def __init__(self, size: int, eps: float):
        self.weight = jt.ones((size,))
        self.bias = jt.zeros((size,))
        self.eps = eps

    def execute(self, x: jt.Var) -> jt.Var:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return centred / jt.sqrt(variance + self.eps) * self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attention = CausalAttention()

    def execute(self, x: jt.Var, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        B, T, C = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # each (B, T, H, D)
        if cache is None:
            y = self.attention(q, k, v, keys)
        else:
            y = cache.attend(self.layer, self.attention, q, k, v, keys)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        self.c_fc = Conv1D(config.inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.inner)
        self.act = GELU()

    def execute(self, x: jt.Var) -> jt.Var:
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def execute(self, x: jt.Var, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        x = x + self.attn(self.ln_1(x), keys, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config):
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)

    def execute(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        B, T = input_ids.shape
        past, keys = step_keys(cache, attention_mask, B, T)
        limit = self.wpe.weight.shape[0]
        longest = keys.longest if isinstance(keys, Stream) else past + T
        if longest > limit:  # Jittor would look up zeros for the positions beyond
            raise ValueError(f"{longest} tokens are more than the model's {limit} positions")
        x = self.wte(input_ids) + self.wpe(positions(B, T, past, keys))  # (B, T, C)
        for block in self.h:
            x = block(x, keys, cache)
        return self.ln_f(x)


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with its language-model head, which is the token embedding itself."""

    def __init__(self, config: GPT2Config):
        self.config = config
        self.transformer = GPT2Model(config)
        self.head = LanguageHead()

    def hidden_states(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        """Token ids (B, T) int32 -> states after the final norm (B, T, C) float32."""
        return self.transformer(input_ids, attention_mask, cache)

    @property
    def output_embedding(self) -> jt.Var:
        """The weight of the language-model head, (V, C)."""
        return self.transformer.wte.weight

    @property
    def first_attention(self) -> CausalAttention:
        return self.transformer.h[0].attn.attention


PARTS = Parts(
    block=Block,
    norms=("ln_1", None, "ln_2", None),
    attention="attn",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    body="transformer",
    tokens="wte",
    blocks="h",
    last_norm="ln_f",
    positions="wpe",
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    modules={
        Attention: {"c_attn": Conv1D, "c_proj": Conv1D, "attention": CausalAttention},
        MLP: {"c_fc": Conv1D, "c_proj": Conv1D, "act": GELU},
        Block: {
            "ln_1": LayerNorm, "attn": Attention,
            "ln_2": LayerNorm, "mlp": MLP,
        },
        GPT2Model: {
            "wte": nn.Embedding, "wpe": nn.Embedding, "h": nn.ModuleList, "ln_f": LayerNorm,
        },
    },
)  # fmt: skip
