"""The Llama family: Llama 2 and 3, SmolLM2 and 3, Qwen2 and 2.5, Mistral, InternLM3.

Touvron et al. 2023 (arXiv 2302.13971); parameter names are those of the Hugging Face checkpoints.
Other families are this model with another choice of a few parts: which norms a block has and where,
norms of queries and keys, the activation, and layer by layer window and rotary positions. They say
so in class attributes of their blocks and in properties of their configs.
"""

from __future__ import annotations

from typing import ClassVar

from jlora.models.attention import (
    CausalAttention,
    KeyRange,
    KVCache,
    Stream,
    lengths,
    positions,
    step_keys,
)
from jlora.models.head import CausalLM, LanguageHead
from jlora.models.llama_config import LlamaConfig
from jlora.models.parts import Parts
from jlora.models.rope import Rotary
from jlora.system.runtime import jt, nn


class RMSNorm(nn.Module):
    """y = (weight + offset) * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        self.weight = jt.ones((size,)) - offset
        self.eps, self.offset = eps, offset

    def execute(self, x: jt.Var) -> jt.Var:
        gain = self.weight + self.offset if self.offset else self.weight
        return x / jt.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * gain


def norm_of(config: LlamaConfig, size: int) -> RMSNorm:
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    kind: ClassVar[str] = "silu"  # its name for the operators

    def execute(self, gate: jt.Var, up: jt.Var) -> jt.Var:
        return gate * jt.sigmoid(gate) * up


class Attention(nn.Module):
    qk_norm: ClassVar[str | None] = None  # norms of queries and keys: of each "head", or of "all"
    rotary_type: ClassVar[type] = Rotary
    layer_names: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    grouped: ClassVar[bool] = False  # see `Parts`

    def __init__(self, config: LlamaConfig, layer: int):
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim
        self.make_layers(config)
        if self.qk_norm is not None:
            for name, heads in (("q_norm", self.heads), ("k_norm", self.kv_heads)):
                size = self.head_dim * (1 if self.qk_norm == "head" else heads)
                setattr(self, name, norm_of(config, size))
        self.rotary = None if config.layer_ropes[layer] is None else self.rotary_type()
        self.rotary_size = config.rotary_size
        window = config.windows[layer]
        self.attention = CausalAttention(config.score_scale, window, config.score_cap)

    def make_layers(self, config: LlamaConfig) -> None:
        C, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, self.heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * D, C, bias=config.output_bias)

    def project(self, x: jt.Var) -> tuple[jt.Var, jt.Var, jt.Var]:
        """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, H_kv, D)."""
        return tuple(self.split(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))

    def split(self, x: jt.Var) -> jt.Var:
        """(B, T, heads D) -> (B, T, heads, D)."""
        B, T, width = x.shape
        return x.reshape(B, T, width // self.head_dim, self.head_dim)

    def normalise(self, norm: RMSNorm, x: jt.Var) -> jt.Var:
        """Of queries or keys, (B, T, heads, D): head by head, or all heads together."""
        return norm(x) if self.qk_norm == "head" else self.split(norm(x.flatten(2)))

    def attend(self, x, cos, sin, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        """x (B, T, C) -> what the heads have read, (B, T, H D)."""
        q, k, v = self.project(x)
        if self.qk_norm is not None:
            q, k = self.normalise(self.q_norm, q), self.normalise(self.k_norm, k)
        if self.rotary is not None:
            q, k = self.rotary(q, cos, sin), self.rotary(k, cos, sin)
        if cache is None:
            y = self.attention(q, k, v, keys)
        else:
            y = cache.attend(self.layer, self.attention, q, k, v, keys)
        return y.flatten(2)

    def execute(self, x, cos, sin, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        return self.o_proj(self.attend(x, cos, sin, keys, cache))


class MLP(nn.Module):
    act_type: ClassVar[type] = SwiGLU
    layer_names: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, config: LlamaConfig):
        self.make_layers(config)
        self.act = self.act_type()

    def make_layers(self, config: LlamaConfig) -> None:
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, bias=config.mlp_bias)

    def execute(self, x: jt.Var) -> jt.Var:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    attention: ClassVar[type] = Attention  # a family with another one says so in a subclass
    mlp_type: ClassVar[type] = MLP
    names: ClassVar[tuple[str, str]] = ("self_attn", "mlp")
    #: Norms before and after attention, before and after the MLP; None: there is none.
    norms: ClassVar[tuple[str | None, ...]] = (
        "input_layernorm", None, "post_attention_layernorm", None,
    )  # fmt: skip

    def __init__(self, config: LlamaConfig, layer: int):
        first, after_attention, second, after_mlp = self.norms
        self.add_norm(config, first)
        setattr(self, self.names[0], self.attention(config, layer))
        self.add_norm(config, after_attention)
        self.add_norm(config, second)
        setattr(self, self.names[1], self.mlp_type(config))
        self.add_norm(config, after_mlp)

    def add_norm(self, config: LlamaConfig, name: str | None) -> None:
        if name is not None:
            setattr(self, name, norm_of(config, config.hidden_size))

    def norm(self, place: int, x: jt.Var) -> jt.Var:
        name = self.norms[place]
        return x if name is None else getattr(self, name)(x)

    def execute(self, x, cos, sin, keys: KeyRange | Stream | None, cache: KVCache | None) -> jt.Var:
        attention, mlp = (getattr(self, name) for name in self.names)
        x = x + self.norm(1, attention(self.norm(0, x), cos, sin, keys, cache))
        return x + self.norm(3, mlp(self.norm(2, x)))


class LlamaModel(nn.Module):
    block: ClassVar[type] = Block
    tokens: ClassVar[str] = "embed_tokens"

    def __init__(self, config: LlamaConfig):
        setattr(self, self.tokens, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(
            [self.block(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = norm_of(config, config.hidden_size)
        self.embedding_scale = config.embedding_scale
        self.ropes, self.layer_ropes = config.ropes(), config.layer_ropes

    def execute(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        B, T = input_ids.shape
        past, keys = step_keys(cache, attention_mask, B, T)
        position = positions(B, T, past, keys)
        turns = [
            rope.turns(position, lambda: lengths(B, T, past, keys)) for rope in self.ropes
        ]  # cosines and sines, (B, T, R / 2)
        x = getattr(self, self.tokens)(input_ids)  # (B, T, C)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        for block, rope in zip(self.layers, self.layer_ropes):
            x = block(x, *turns[rope or 0], keys, cache)
        return self.norm(x)


class LlamaForCausalLM(CausalLM):
    """A Llama-family model with its language-model head, tied to the embedding or not."""

    backbone: ClassVar[type] = LlamaModel

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.model = self.backbone(config)
        if not config.tie_word_embeddings:
            head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            setattr(self, self.head_name, head)
        self.head = LanguageHead(config.logit_cap)

    def hidden_states(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        """Token ids (B, T) int32 -> states after the final norm (B, T, C) float32."""
        return self.model(input_ids, attention_mask, cache)

    @property
    def output_embedding(self) -> jt.Var:
        """The weight of the language-model head, (V, C)."""
        if self.config.tie_word_embeddings:
            return getattr(self.model, self.model.tokens).weight
        return getattr(self, self.head_name).weight

    @property
    def first_attention(self) -> CausalAttention:
        first = self.model.layers[0]
        return getattr(first, first.names[0]).attention


def parts_of(body: type) -> Parts:
    """What the fast paths need to know of a backbone that is made of this file's parts."""
    block = body.block
    attention, mlp = block.attention, block.mlp_type
    *qkv, output = (f"{block.names[0]}.{name}" for name in attention.layer_names)
    *up, down = (f"{block.names[1]}.{name}" for name in mlp.layer_names)
    qk_norms = ("q_norm", "k_norm") if attention.qk_norm else ()
    return Parts(
        block=block,
        norms=block.norms,
        attention=block.names[0],
        qkv=tuple(qkv),
        output=output,
        up=tuple(up),
        down=down,
        body="model",
        tokens=body.tokens,
        blocks="layers",
        last_norm="norm",
        positions=None,
        norm="rms",
        activation=mlp.act_type.kind,
        gated=True,
        modules={
            attention: {
                **dict.fromkeys(attention.layer_names, nn.Linear),
                **dict.fromkeys(qk_norms, RMSNorm),
                "rotary": attention.rotary_type,
                "attention": CausalAttention,
            },
            mlp: {**dict.fromkeys(mlp.layer_names, nn.Linear), "act": mlp.act_type},
            block: {
                **dict.fromkeys(filter(None, block.norms), RMSNorm),
                block.names[0]: attention,
                block.names[1]: mlp,
            },
            body: {body.tokens: nn.Embedding, "layers": nn.ModuleList, "norm": RMSNorm},
        },
        qk_norms=tuple(f"{block.names[0]}.{n}" for n in qk_norms) or (None, None),
        grouped=attention.grouped,
    )
