"""Where the fast paths find what they compute, said by each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Parts:
    """Where the block operator and the native decoder find what they compute.

    They have this block built in, with norms where a family has them:
    ``x + norm(output(attention(norm(x))))``, then ``x + norm(down(activation(up(norm(x)))))``.
    Paths are relative to the block, or to the backbone. What differs from layer to layer (rotary
    positions or none, window) and from config to config stands in the attention's own attributes.

    Attributes:
        block: class of a block; ``block(x, *rotation, keys, cache)``.
        norms: before and after attention, before and after the MLP; None: there is none.
        attention: the module that has ``heads``, ``kv_heads`` and ``head_dim``.
        qkv: one layer for queries, keys and values together, or three.
        output, up, down: ``up`` is gate and up where gated: two layers, or one for both.
        body: the backbone's name in the model; in it stand tokens, blocks and last_norm.
        positions: the embedding of learned positions in the backbone; None: rotary positions, whose
            frequencies the backbone keeps as ``ropes``; the attention has ``rotary`` (None in a
            layer without) and ``rotary_size``.
        norm: "layer" or "rms".
        qk_norms: of queries and of keys, None: there are none. The size of their weights says
            whether they norm each head or all heads together.
        grouped: whether the one layer of queries, keys and values has, of each key head, its
            queries, itself and its values; else all queries come first.
        activation: "gelu_tanh" or "silu".
        gated: whether the activation of one layer multiplies another's result.
        modules: class -> its submodules by name and class, and nothing else, for every class of
            block, attention, MLP and backbone.
    """

    block: type
    norms: tuple[str | None, str | None, str | None, str | None]
    attention: str
    qkv: tuple[str, ...]
    output: str
    up: tuple[str, ...]
    down: str
    body: str
    tokens: str
    blocks: str
    last_norm: str
    positions: str | None
    norm: str
    activation: str
    gated: bool
    modules: Mapping[type, Mapping[str, type]] = field(repr=False)
    qk_norms: tuple[str | None, str | None] = (None, None)
    grouped: bool = False
