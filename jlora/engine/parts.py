"""What the fast paths know of a module: its exact type, and the parts that they read of it.

The block operator and the native decoder have a block's arithmetic built in and read parameters by
name. A parameter, a submodule, a subclass or a hook that they do not know would be ignored without
a word; `is_known` finds it, and the module's own layers compute then.
"""

from __future__ import annotations

from jlora import layers
from jlora.engine.leaves import (
    FusedAttention,
    FusedGELU,
    FusedLayerNorm,
    FusedRMSNorm,
    FusedRotary,
    FusedSwiGLU,
    TrainedEmbedding,
)
from jlora.engine.products import (
    PackedConv1D,
    PackedEmbedding,
    PackedHead,
    PackedLinear,
    is_overridden,
)
from jlora.kernels.elementwise import FusedDropout
from jlora.models import gpt2, llama
from jlora.system.runtime import jt, nn

VAR = (jt.Var,)
LINEARS = (
    nn.Linear, layers.Conv1D, PackedLinear, PackedConv1D, layers.Linear, layers.MergedLinear,
)  # fmt: skip
EMBEDDINGS = (nn.Embedding, TrainedEmbedding, PackedEmbedding)
_PLAIN = {"weight": VAR, "bias": VAR}
_LORA = {**_PLAIN, "lora_A": VAR, "lora_B": VAR, "lora_dropout": (FusedDropout,)}

#: Type -> the parameters and submodules that the fast paths read, each with the types it may have.
PARTS: dict[type, dict[str, tuple[type, ...]]] = {
    nn.Linear: _PLAIN,
    layers.Conv1D: _PLAIN,
    PackedLinear: _PLAIN,
    PackedConv1D: _PLAIN,
    layers.Linear: _LORA,
    layers.MergedLinear: _LORA,
    FusedDropout: {},
    **dict.fromkeys(EMBEDDINGS, {"weight": VAR}),
    PackedHead: {},
    FusedLayerNorm: {"weight": VAR, "bias": VAR},
    FusedRMSNorm: {"weight": VAR},
    FusedGELU: {},
    FusedSwiGLU: {},
    FusedRotary: {},
    FusedAttention: {},
    gpt2.Attention: {"c_attn": LINEARS, "c_proj": LINEARS, "attention": (FusedAttention,)},
    gpt2.MLP: {"c_fc": LINEARS, "c_proj": LINEARS, "act": (FusedGELU,)},
    gpt2.Block: {
        "ln_1": (FusedLayerNorm,), "attn": (gpt2.Attention,),
        "ln_2": (FusedLayerNorm,), "mlp": (gpt2.MLP,),
    },
    gpt2.GPT2Model: {
        "wte": EMBEDDINGS, "wpe": EMBEDDINGS, "h": (nn.ModuleList,), "ln_f": (FusedLayerNorm,),
    },
    llama.Attention: {
        "q_proj": LINEARS, "k_proj": LINEARS, "v_proj": LINEARS, "o_proj": LINEARS,
        "rotary": (FusedRotary,), "attention": (FusedAttention,),
    },
    llama.MLP: {
        "gate_proj": LINEARS, "up_proj": LINEARS, "down_proj": LINEARS, "act": (FusedSwiGLU,),
    },
    llama.Block: {
        "input_layernorm": (FusedRMSNorm,), "self_attn": (llama.Attention,),
        "post_attention_layernorm": (FusedRMSNorm,), "mlp": (llama.MLP,),
    },
    llama.LlamaModel: {
        "embed_tokens": EMBEDDINGS, "layers": (nn.ModuleList,), "norm": (FusedRMSNorm,),
    },
}  # fmt: skip


def is_known(module: nn.Module) -> bool:
    """Whether a module and everything in it is what `PARTS` says, and holds nothing else."""
    if type(module) is nn.ModuleList:
        return all(is_known(child) for child in module.layers.values())
    known = PARTS.get(type(module))
    if known is None or is_overridden(module):
        return False
    for name, value in vars(module).items():
        # An underscore keeps a Var from being a parameter: what a module computes for itself.
        if name.startswith("_") or not isinstance(value, (jt.Var, nn.Module)):
            continue
        if type(value) not in known.get(name, ()):
            return False
        if isinstance(value, nn.Module) and not is_known(value):
            return False
    return True
