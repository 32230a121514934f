"""The model families: one entry for each, with all that is particular to it beside its model file.

`hub`, GGUF files, the fused blocks, the native decoder, the memory estimate, default LoRA targets
and BitFit read it here, or from a model as ``model.family``. To add a family see docs/adding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jlora.formats.gguf_architectures import GPT2, LLAMA, QWEN2, Architecture
from jlora.layers import Conv1D
from jlora.models import gpt2, llama
from jlora.models.attention import CausalAttention
from jlora.system.plugins import load_plugin
from jlora.system.runtime import nn

GROUP = "jlora.families"  # of entry points


@dataclass(frozen=True)
class Parts:
    """Where the block operator and the native decoder find what they compute.

    They have a pre-norm block built in: ``x + output(attention(norm(x)))``, then
    ``x + down(activation(up(norm(x))))``. Paths are relative to the block, or to the backbone.

    Attributes:
        block: class of a block; ``block(x, *rotation, keys, cache)``.
        norms: before attention and before the MLP.
        attention: the module that has ``heads``, ``kv_heads`` and ``head_dim``.
        qkv: one layer for queries, keys and values together, or three.
        output, up, down: ``up`` is gate and up where gated.
        body: the backbone's name in the model; in it stand tokens, blocks and last_norm.
        positions: the embedding of learned positions in the backbone; None: rotary positions, whose
            frequencies the backbone keeps as ``_frequencies``.
        norm: "layer" or "rms".
        activation: "gelu_tanh" or "silu".
        gated: whether the activation of one layer multiplies another's result.
        modules: class -> its submodules by name and class, and nothing else, for every class of
            block, attention, MLP and backbone.
    """

    block: type
    norms: tuple[str, str]
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


@dataclass(frozen=True)
class Family:
    """What there is to know of a family.

    Attributes:
        model_type: in config.json.
        config: class with ``from_dict`` and ``to_dict`` (config.json), the token ids, and for any
            family ``vocab_size, hidden_size, layers, heads, kv_heads, head_dim, inner, gated,
            norm_eps, max_positions``.
        model: `models.head.CausalLM` subclass; its parameters have Hugging Face's names.
        prefix: of the backbone's parameters, which checkpoints of the bare backbone leave out.
        embedding: name of the token embedding, which a tied head repeats.
        targets: modules that get LoRA where target_modules is not given: PEFT's choice.
        biases: switches in config.json that give linear layers biases, for BitFit on a model
            without any; empty: there are none.
        rename: name in an older checkpoint -> Hugging Face's.
        parts: for the block operator and the native decoder; None: models run layer by layer.
        gguf: how the family's models stand in GGUF files; None: they are not read or written.
    """

    model_type: str
    config: type
    model: type
    prefix: str
    embedding: str
    targets: tuple[str, ...]
    biases: tuple[str, ...] = ()
    rename: Callable[[str], str] = str
    parts: Parts | None = None
    gguf: Architecture | None = None


GPT2_PARTS = Parts(
    block=gpt2.Block,
    norms=("ln_1", "ln_2"),
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
        gpt2.Attention: {"c_attn": Conv1D, "c_proj": Conv1D, "attention": CausalAttention},
        gpt2.MLP: {"c_fc": Conv1D, "c_proj": Conv1D, "act": gpt2.GELU},
        gpt2.Block: {
            "ln_1": gpt2.LayerNorm, "attn": gpt2.Attention,
            "ln_2": gpt2.LayerNorm, "mlp": gpt2.MLP,
        },
        gpt2.GPT2Model: {
            "wte": nn.Embedding, "wpe": nn.Embedding, "h": nn.ModuleList, "ln_f": gpt2.LayerNorm,
        },
    },
)  # fmt: skip
LLAMA_PARTS = Parts(
    block=llama.Block,
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    body="model",
    tokens="embed_tokens",
    blocks="layers",
    last_norm="norm",
    positions=None,
    norm="rms",
    activation="silu",
    gated=True,
    modules={
        llama.Attention: {
            "q_proj": nn.Linear, "k_proj": nn.Linear, "v_proj": nn.Linear, "o_proj": nn.Linear,
            "rotary": llama.Rotary, "attention": CausalAttention,
        },
        llama.MLP: {
            "gate_proj": nn.Linear, "up_proj": nn.Linear, "down_proj": nn.Linear,
            "act": llama.SwiGLU,
        },
        llama.Block: {
            "input_layernorm": llama.RMSNorm, "self_attn": llama.Attention,
            "post_attention_layernorm": llama.RMSNorm, "mlp": llama.MLP,
        },
        llama.LlamaModel: {
            "embed_tokens": nn.Embedding, "layers": nn.ModuleList, "norm": llama.RMSNorm,
        },
    },
)  # fmt: skip


def _llama(model_type: str, gguf: Architecture, biases: tuple[str, ...] = ()) -> Family:
    """A family of Llama's architecture."""
    return Family(
        model_type,
        config=llama.LlamaConfig,
        model=llama.LlamaForCausalLM,
        prefix="model.",
        embedding="model.embed_tokens.weight",
        targets=("q_proj", "v_proj"),
        biases=biases,
        parts=LLAMA_PARTS,
        gguf=gguf,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            config=gpt2.GPT2Config,
            model=gpt2.GPT2LMHeadModel,
            prefix="transformer.",
            embedding="transformer.wte.weight",
            targets=("c_attn",),
            rename=gpt2.hugging_face_name,
            parts=GPT2_PARTS,
            gguf=GPT2,
        ),
        _llama("llama", LLAMA, biases=("attention_bias", "mlp_bias")),
        _llama("mistral", LLAMA),
        _llama("qwen2", QWEN2),
    )
}


def register_family(family: Family) -> None:
    """Make a family known in this process, in the place of one with its model_type."""
    FAMILIES[family.model_type] = family


def find_family(model_type: str) -> Family | None:
    """The family of a ``model_type``, of this package or of another.

    In a package of its own an entry point of the group ``jlora.families`` makes a family known to
    every process: its name is the model_type, its object the `Family`.

    Raises:
        UserError: another package's family cannot be used.
    """
    if model_type not in FAMILIES:
        found = load_plugin(GROUP, model_type, Family)
        if found is not None:
            register_family(found)
    return FAMILIES.get(model_type)


def gguf_architectures() -> dict[str, Architecture]:
    """The architectures of GGUF files that some family reads, by their names."""
    return {f.gguf.name: f.gguf for f in FAMILIES.values() if f.gguf is not None}
