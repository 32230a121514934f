"""What the fast paths know of a module: its exact type, and the parts that they read of it.

The block operator and the native decoder have a block's arithmetic built in and read parameters by
name. A parameter, a submodule, a subclass or a hook that they do not know would be ignored without
a word; `is_known` finds it, and the module's own layers compute then.
"""

from __future__ import annotations

from collections.abc import Mapping

from jlora import layers
from jlora.adapters.attach import ModulesToSave
from jlora.engine.leaves import (
    FUSED,
    FUSED_ON_GPU,
    FusedAttention,
    FusedGEGLU,
    FusedGELU,
    FusedInterleavedRotary,
    FusedLayerNorm,
    FusedRMSNorm,
    FusedRotary,
    FusedSwiGLU,
    StreamAttention,
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
from jlora.models import gpt2, llama, rope
from jlora.models.attention import CausalAttention
from jlora.system.runtime import jt, nn

VAR = (jt.Var,)
LINEARS = (
    nn.Linear, layers.Conv1D, PackedLinear, PackedConv1D, layers.Linear, layers.MergedLinear,
)  # fmt: skip
EMBEDDINGS = (nn.Embedding, TrainedEmbedding, PackedEmbedding)
#: Plain layer -> what the engine and adapters put in its place, of which the fast paths know all.
SWAPPED = {nn.Linear: LINEARS, layers.Conv1D: LINEARS, nn.Embedding: EMBEDDINGS}
_PLAIN = {"weight": VAR, "bias": VAR}
_LORA = {**_PLAIN, "lora_A": VAR, "lora_B": VAR, "lora_dropout": (FusedDropout, nn.Dropout)}

#: Type -> the parameters and submodules that the fast paths read, each with the types it may have.
PARTS: dict[type, dict[str, tuple[type, ...]]] = {
    nn.Linear: _PLAIN,
    layers.Conv1D: _PLAIN,
    PackedLinear: _PLAIN,
    PackedConv1D: _PLAIN,
    layers.Linear: _LORA,
    layers.MergedLinear: _LORA,
    FusedDropout: {},
    nn.Dropout: {},  # which they leave to the layer while it drops
    **dict.fromkeys(EMBEDDINGS, {"weight": VAR}),
    PackedHead: {},
    FusedLayerNorm: {"weight": VAR, "bias": VAR},
    FusedRMSNorm: {"weight": VAR},
    FusedGEGLU: {},
    FusedGELU: {},
    FusedSwiGLU: {},
    FusedInterleavedRotary: {},
    FusedRotary: {},
    FusedAttention: {},
    StreamAttention: {},
    gpt2.LayerNorm: {"weight": VAR, "bias": VAR},
    llama.RMSNorm: {"weight": VAR},
    gpt2.GELU: {},
    llama.SwiGLU: {},
    rope.Rotary: {},
}


def learn_modules(modules: Mapping[type, Mapping[str, type]]) -> None:
    """Add a family's modules, by the classes that they have in the plain model."""
    for module, parts in modules.items():
        PARTS[module] = {
            # Leaves are swapped or, on a GPU, not; both compute the same.
            name: SWAPPED.get(kind)
            or tuple(
                {kind, FUSED.get(kind, kind), FUSED_ON_GPU.get(kind, kind)} - {CausalAttention}
            )
            for name, kind in parts.items()
        }


def current(module: nn.Module) -> nn.Module:
    """What stands in a module's place now: of one that is trained in full, the copy."""
    return module.current if isinstance(module, ModulesToSave) else module


def is_known(module: nn.Module, copies: bool = False) -> bool:
    """Whether a module and everything in it is what `PARTS` says, and holds nothing else.

    Args:
        copies: the reader takes `current` of the modules.
    """
    if type(module) is nn.ModuleList:
        return all(is_known(child, copies) for child in module.layers.values())
    known = PARTS.get(type(module))
    if known is None or is_overridden(module):
        return False
    # Of a variant of LoRA they read a weight with its change in it, see `FrozenProduct.folded`.
    folds = isinstance(module, layers.LoRALayer) and module.is_frozen and module._engine is not None
    folded_in = module.variant.parameters if folds else ()
    for name, value in vars(module).items():
        # An underscore keeps a Var from being a parameter: what a module computes for itself.
        if name.startswith("_") or not isinstance(value, (jt.Var, nn.Module)):
            continue
        if name in folded_in:
            continue
        value = current(value) if copies else value
        if type(value) not in known.get(name, ()):
            return False
        if isinstance(value, nn.Module) and not is_known(value, copies):
            return False
    return True
