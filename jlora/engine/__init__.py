"""The speed pass: swap the leaf layers of a loaded model for fused C++ ones, and back.

A fused layer is a subclass of the plain layer with another ``execute``; the pass changes the class
of the modules in place, so parameters, names and everything that points to a module stay. The
plain layers in ``jlora.models`` remain the definition of what is computed.
"""

from __future__ import annotations

import itertools
from collections import Counter

from jlora import layers
from jlora.adapters.base_model import remember_base
from jlora.engine.blocks import BLOCKS, learn
from jlora.engine.leaves import FUSED, FUSED_ON_GPU, TrainedEmbedding
from jlora.engine.products import (
    LORA,
    PACKED,
    FrozenProduct,
    PackedEmbedding,
    PackedHead,
    PackedOnly,
    TrainedProduct,
)
from jlora.formats.names import is_lora_name
from jlora.kernels import native, packed_linear
from jlora.kernels.gpu_library import on_gpu
from jlora.models.head import LanguageHead
from jlora.system import machine
from jlora.system.errors import UserError
from jlora.system.progress import progress
from jlora.system.runtime import jt, nn, release_memory
from jlora.system.unread import source_of

PRECISIONS = ("plain", "fp32", "bf16", "int8", "int8-both", "int4")


_SWAPS = (FUSED, FUSED_ON_GPU, PACKED, BLOCKS)
PLAIN = {fused: plain for swaps in _SWAPS for plain, fused in swaps.items()}
PLAIN[PackedEmbedding] = PLAIN[TrainedEmbedding] = nn.Embedding


def choose_precision() -> tuple[str, str]:
    """The fastest precision that this machine does well, and why."""
    problem = native.problem()
    if problem is not None:
        return "plain", problem
    if on_gpu():
        return "bf16", "the GPU multiplies bf16"
    if not packed_linear.available("bf16"):
        return "fp32", "neither vector instructions nor oneDNN multiply bf16 here"
    tiles = packed_linear.tiles()
    if tiles is not None:
        return "bf16", f"the processor multiplies bf16 by {tiles}"
    if any("BF16" in name for name in machine.cpu_features()):
        return "bf16", "the processor multiplies bf16"
    return "fp32", "the processor has no bf16 instructions"


def prepare(
    model,
    precision: str = "auto",
    keep_weights: bool = True,
    checkpoint_activations: bool = False,
) -> str:
    """Make a model fast for training and for generation.

    Weights that are trained stay float32. Where our own tiles multiply (`packed_linear.tiles`),
    their products read copies in bf16 that follow them, whatever precision the frozen ones are
    packed in; elsewhere they run plain.
    Call it again after something else is to be trained, after an adapter was merged away (the
    layers put in place then are plain), and after frozen weights were given other numbers: packed
    weights are copies. Adapters that are put on or taken off later take the packed weights over.

    Args:
        model: a model or PeftModel, in float32; what is not trained has its gradient stopped.
        precision: "bf16" packs frozen linear weights in bf16 (sums, residual stream, adapter and
            optimiser stay float32); "int8" keeps them in int8, half the memory, and multiplies
            activations in int8 and gradients in bf16, "int8-both" both in int8; "int4" keeps five
            bits a number, scales included, and multiplies as int8 does; "fp32" fuses what stands
            between the products and keeps every number float32; "plain" changes nothing; "auto" is
            `choose_precision`. A GGUF file's own blocks of 4 bits are taken over by "int4" as they
            are, see `taken_forms`. On a GPU all of these multiply in bf16, and what is kept in
            fewer bits becomes bf16 for each product.
        keep_weights: False lets go of the float32 weights that were packed, which saves two thirds
            of the memory; `restore` and merging give them back to the precision kept.
        checkpoint_activations: compute each block's forward pass again in the backward pass instead
            of keeping it: less memory, a third more time.

    Returns:
        The precision used.

    Raises:
        UserError: no such precision, or the machine or the model lacks what it needs.
    """
    if precision == "auto":
        precision = choose_precision()[0]
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not one of auto, {', '.join(PRECISIONS)}")
    if checkpoint_activations and precision in ("plain", "fp32"):
        raise UserError(
            f"checkpoint_activations works with precision bf16 or int8, not with {precision}"
        )
    if precision != "plain":
        _check(model, precision)
    family = getattr(model, "family", None)
    if family is not None and family.parts is not None:  # perhaps registered since
        learn(family.parts)
        PLAIN.update((fused, plain) for plain, fused in BLOCKS.items())
    restore(model)
    if precision == "plain":
        return precision
    trainable = _trainable(model)
    fused = FUSED_ON_GPU if on_gpu() else FUSED
    for module in model.modules():
        if type(module) in fused:
            module.__class__ = fused[type(module)]
        elif on_gpu():
            continue
        elif type(module) is nn.Embedding and id(module.weight) in trainable:
            module.__class__ = TrainedEmbedding
    if precision in packed_linear.KINDS:
        try:
            _pack(model, precision, keep_weights)
        except UserError:
            restore(model)
            raise
        _fuse_blocks(model, checkpoint_activations)
    release()
    return precision


def taken_forms(model) -> dict[str, int]:
    """How many weights were taken over in which of GGUF's forms, and how many rounded (by ``""``).

    Args:
        model: prepared.
    """
    found: Counter[str] = Counter()
    for module in model.modules():
        product = vars(module).get("_engine") or vars(module).get("_packed")
        if isinstance(product, FrozenProduct) and type(module) is not PackedEmbedding:
            found[product.packed.taken or ""] += 1
    return dict(found)


def release() -> None:
    """Give back to the system what models that are gone have left in this process."""
    native.free_retired()
    release_memory()


def restore(model) -> None:
    """Undo `prepare`: the plain layers are back, with the weights they had.

    Weights that were not kept come back rounded to the packed precision.
    """
    unpacked: dict[PackedOnly, jt.Var] = {}
    for module in model.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
        for name in ("weight", "_unmerged"):  # the second is what a merged layer gives back
            held = module.__dict__.get(name)
            if isinstance(held, PackedOnly):
                if held not in unpacked:  # tied weights stay tied
                    unpacked[held] = held.unpacked()
                setattr(module, name, unpacked[held])
        for name in ("_packed", "_engine", "_folded", "_plans", "_checkpoint", "_given", "_bottom"):
            module.__dict__.pop(name, None)
    native.free_retired()


def _check(model, precision: str) -> None:
    if on_gpu() and precision in ("fp32", "int8-both"):
        raise UserError(
            f"precision {precision} is for CPUs; on a GPU use bf16, int8, int4 or plain"
        )
    problem = native.problem()
    if problem is not None:
        raise UserError(f"precision {precision} is not to be had: {problem}")
    if precision == "bf16" and not packed_linear.available("bf16"):
        raise UserError(
            "precision bf16 needs a processor with AVX2 or NEON, or oneDNN and a processor on "
            "which it multiplies bf16; `jlora doctor` says what is there, and precisions fp32 and "
            "plain run without"
        )
    if precision in packed_linear.KINDS and not packed_linear.available(precision):
        raise UserError(
            f"precision {precision} needs a processor with AVX2, AVX512_BF16, AMX or NEON, and a "
            "compiler that knows it (g++ 11 or newer); use precision bf16, fp32 or plain"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != "float32":
            raise UserError(
                f"precision {precision} needs float32 parameters, but {name} is {parameter.dtype}; "
                "use precision plain, or convert the model with model.float32()"
            )


def _pack(model, precision: str, keep_weights: bool) -> None:
    trainable, follows = _trainable(model), packed_linear.tiles() is not None
    if not keep_weights:
        remember_base(model)
    head_layer = getattr(model, "head_layer", None)
    for module in progress(_to_pack(model), "packing weights", "layer"):
        is_lora = type(module) in LORA
        is_head = type(module) is LanguageHead or module is head_layer
        if type(module) is LanguageHead:
            weight, bias, transposed = model.output_embedding, None, False
        else:
            weight, bias = module.weight, module.bias
            transposed = module.fan_in_fan_out if is_lora else isinstance(module, layers.Conv1D)
        if id(weight) in trainable:
            if follows and not is_lora:
                TrainedProduct(weight, bias, transposed).install(module)
            continue
        # The head decides between words by small differences, and embeds them: int8 is too coarse.
        kind = "bf16" if is_head else precision
        product = FrozenProduct(weight, bias, transposed, kind)
        product.install(module)
        if keep_weights and product.packed.taken is None:
            weight.sync()  # packed from its file, and still to be read
        # Another variant than plain LoRA may read the weight in its forward pass, unless it is
        # folded into a copy now, while the weight is not rounded.
        runs_itself = (
            is_lora
            and module.has_adapter
            and not module.variant.is_plain
            and product.folded(module) is None
        )
        if not keep_weights and not runs_itself:
            release = _release_head if type(module) is PackedHead else _release
            release(model, product, module)
            del weight
            jt.gc()  # at once, so that the two copies of all weights are never there together


def _to_pack(model) -> list:
    """The modules that multiply by a weight of their own, in the order to pack them.

    The head, which is largest, comes first while it is still in its file, so that its float32
    numbers stand beside as little as can be. A head in memory comes last, when the others are gone.
    """
    head = getattr(model, "output_embedding", None)
    head_layer = getattr(model, "head_layer", None)
    heads: list[nn.Module] = []
    others: list[nn.Module] = []
    for module in model.modules():
        if type(module) is LanguageHead:
            if head_layer is None:  # else the layer is called in its place
                heads.append(module)
        elif type(module) in LORA or type(module) in PACKED:
            if module is head_layer:
                heads.append(module)
            elif module.weight is not head:  # models give it to LanguageHead, and call no layer
                others.append(module)
    return others + heads if head is None or source_of(head) is None else heads + others


def _release(model, product: FrozenProduct, module) -> None:
    product.release([module])


def _release_head(model, product: FrozenProduct, module) -> None:
    """Let go of the head's weight, unless somebody needs it who cannot read the packed copy."""
    owners = [m for m in model.modules() if m.__dict__.get("weight") is product.weight]
    reads_rows = packed_linear.tiles() is not None
    if any(
        type(m) is not nn.Linear and not (type(m) is nn.Embedding and reads_rows) for m in owners
    ):
        return
    product.release(owners)
    for owner in owners:
        if type(owner) is nn.Embedding:
            owner._packed = product
            owner.__class__ = PackedEmbedding


def _fuse_blocks(model, checkpoint_activations: bool) -> None:
    trainable = _trainable(model)
    blocks = [module for module in model.modules() if type(module) in BLOCKS]
    for block in blocks:
        block.__class__ = BLOCKS[type(block)]
        block._checkpoint = checkpoint_activations
        block._given = on_gpu() or not _trains_lora_alone(block, trainable)
    if blocks and trainable:
        own = {id(parameter) for parameter in blocks[0].parameters()}
        before = itertools.takewhile(lambda p: id(p) not in own, model.parameters())
        blocks[0]._bottom = not any(id(parameter) in trainable for parameter in before)


def _trains_lora_alone(block, trainable: set[int]) -> bool:
    """Whether a block's other numbers stay: its plan holds copies of norms and biases.

    To be known beforehand: while eval() has stopped all gradients, a trained norm looks frozen.
    """
    trained = [name for name, p in block.named_parameters() if id(p) in trainable]
    return all(is_lora_name(name) for name in trained)


def _trainable(model) -> set[int]:
    """Ids of the parameters that are trained, those included that eval() has stopped for now."""
    ids = {id(parameter) for parameter in model.parameters() if not parameter.is_stop_grad()}
    for module in model.modules():
        noted = module.__dict__.get("backup_grad_state", {})
        ids |= {key for key, trained in noted.items() if trained}
    return ids
