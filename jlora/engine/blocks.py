"""Transformer blocks that run as one operator, whatever of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.engine.parts import PARTS, is_known, learn_modules
from jlora.engine.products import FrozenProduct, PackedConv1D, PackedLinear, TrainedProduct
from jlora.kernels import elementwise
from jlora.kernels.block import ACTIVATIONS, NORMS, BlockPlan, Layer, Shape, run_block
from jlora.kernels.gpu_library import on_gpu
from jlora.kernels.native import value_number
from jlora.kernels.packed_linear import Branch
from jlora.layers import Linear, MergedLinear
from jlora.models.attention import Stream
from jlora.models.families import FAMILIES
from jlora.models.parts import Parts
from jlora.models.rope import InterleavedRotary
from jlora.system.runtime import jt


@dataclass(frozen=True)
class _Layer:
    """A linear layer as it is at this call."""

    module: object
    product: FrozenProduct | TrainedProduct
    branch: Branch | None

    @classmethod
    def of(cls, module) -> _Layer | None:
        """None where the layer does more than a packed product and a low-rank branch."""
        branch = None
        if type(module) in (PackedLinear, PackedConv1D):
            product = module._packed
            if not product.fits(module.weight):
                return None
        elif type(module) in (Linear, MergedLinear) and module._engine is not None:
            product = module._engine
            if module.merged:
                return None
            if module._adds_lora:
                folded = product.folded(module)
                branch = product.branch(module)
                if folded is None and branch is None:
                    return None
                product = folded or product
        else:
            return None
        return cls(module, product, branch)

    @property
    def key(self) -> tuple:
        return self.product.packed.address, self.branch and self.branch.numbers

    def planned(self) -> Layer:
        bias = self.product.bias
        return Layer(self.product.packed, None if bias is None else bias.numpy(), self.branch)


class _FusedBlock:
    """A block as one operator; `learn` makes the subclass of each family.

    Decoding with a cache, padding on the left, layers that are merged or replaced, and blocks with
    parts that the operator does not read (see `is_known`) go the way of the plain block, layer by
    layer.
    """

    _checkpoint = False  # compute the forward pass again in the backward pass, and keep nothing
    _given = False  # its norms and biases may be trained: they go with each call, not into the plan
    _bottom = False  # nothing below it is trained
    _parts: Parts  # where its layers and norms stand
    _plain: type  # the block's own class

    def execute(self, x, *others):
        *rotation, keys, cache = others

        def plain() -> jt.Var:
            return self._plain.execute(self, x, *others)

        if cache is not None or not (keys is None or isinstance(keys, Stream)):
            return plain()
        if not is_known(self):
            return plain()
        parts = self._parts
        found = [path and part(self, path) for path in (*parts.norms, *parts.qk_norms)]
        if len({(norm.eps, getattr(norm, "offset", 0)) for norm in found if norm}) > 1:
            return plain()  # the operator has one for all
        joints = parts.qkv, (parts.output,), parts.up, (parts.down,)
        layers = [[_Layer.of(part(self, path)) for path in joint] for joint in joints]
        flat = [layer for joint in layers for layer in joint]
        if None in flat:
            return plain()
        if any(len({layer.product.kind for layer in joint}) > 1 for joint in layers):
            return plain()  # one product is of one kind; a trained layer is in bf16
        norms = [
            getattr(norm, name, None) if norm else None
            for norm in found
            for name in ("weight", "bias")
        ]
        biases = [[layer.product.bias for layer in joint] for joint in layers]
        fixed = [p for p in (*norms, *(b for joint in biases for b in joint)) if p is not None]
        if not self._given and not all(p.is_stop_grad() for p in fixed):
            return plain()
        plan = self._plan(layers, flat, norms)
        if plan is None:
            return plain()
        if getattr(part(self, parts.attention), "rotary", None) is None:
            rotation = []  # positions are learned, or this layer has none
        B, T = x.shape[:2]
        starts = np.arange(0, B * T + 1, T, dtype=np.int32) if keys is None else keys.starts
        branches = [layer.branch for layer in flat if layer.branch is not None]
        adapters = [array for branch in branches for array in (branch.A, branch.B)]
        parameters = []
        if self._given:
            parameters = [p for p in norms if p is not None]
            parameters += [
                _joined(joint, linears)
                for joint, linears in zip(biases, layers)
                if any(bias is not None for bias in joint)
            ]
        drops = any(branch.p for branch in branches)
        seed = elementwise.dropout_seed() if drops else (0, 0)
        learns = [*adapters, *fixed, *(layer.product.weight for layer in flat)]
        # Neither in nor below this block is anything trained: no way back leads through it.
        idle = (self._bottom or x.is_stop_grad()) and all(p.is_stop_grad() for p in learns)
        keep = not (self._checkpoint or jt.flags.no_grad or idle)
        y = run_block(plan, x, jt.array(starts), rotation, adapters, keep, seed, parameters)
        return y.stop_grad() if idle else y

    def _plan(self, layers, flat, norms) -> BlockPlan | None:
        plans = self.__dict__.setdefault("_plans", {})
        shape = self._shape(norms)
        key = (shape, *(layer.key for layer in flat))
        if not self._given:
            # The plan holds copies, and an adapter may have other biases than its base.
            fixed = (*norms, *(layer.product.bias for layer in flat))
            key += tuple(value_number(p) for p in fixed if p is not None)
        if key not in plans:
            if len(plans) >= MOST_PLANS:
                plans.clear()
            fits = shape.fits(flat[0].product.packed.k, flat[-1].product.packed.k)
            if on_gpu():  # cuda/block.h has the first two norms alone
                fits = (
                    fits and [p is not None for p in norms[::2]] == [True, False] * 2 + [False] * 2
                )
                fits = fits and len(layers[2]) == (2 if shape.gated else 1)
            arrays = [None if p is None else p.numpy() for p in norms]
            joints = [[layer.planned() for layer in joint] for joint in layers]
            plans[key] = BlockPlan(shape, arrays, joints, self._given) if fits else None
        return plans[key]

    def _shape(self, norms) -> Shape:
        """What the block is besides its weights; norms: weights and biases of all places."""
        parts, attention = self._parts, part(self, self._parts.attention)
        first = part(self, next(filter(None, parts.norms)))
        rotary, scores = getattr(attention, "rotary", None), attention.attention
        query_norm = norms[-4]
        return Shape(
            attention.heads, attention.kv_heads, attention.head_dim, first.eps, parts.norm,
            parts.activation, parts.gated, getattr(first, "offset", 0.0),
            0 if rotary is None else attention.rotary_size, is_interleaved(rotary),
            scores.scale_of(attention.head_dim), scores.window, scores.cap, parts.grouped,
            query_norm is not None and is_whole(attention, query_norm),
        )  # fmt: skip


def part(module, path: str):
    """The submodule of a path such as ``mlp.c_fc``."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def is_interleaved(rotary) -> bool:
    return isinstance(rotary, InterleavedRotary)


def is_whole(attention, query_norm) -> bool:
    """Whether a norm's weight is for all heads of queries together, and not for each alike."""
    return query_norm.shape[0] > attention.head_dim


def _joined(biases: Sequence[jt.Var | None], layers: Sequence[_Layer]) -> jt.Var:
    """Biases of layers that read the same rows as one."""
    parts = [
        jt.zeros((layer.product.packed.n,)) if bias is None else bias
        for bias, layer in zip(biases, layers)
    ]
    return parts[0] if len(parts) == 1 else jt.concat(parts)


#: Plans of a block that are kept: one for each adapter that takes its turn, and its base.
MOST_PLANS = 16
#: Plain block -> the class that a fused one has instead.
BLOCKS: dict[type, type] = {}


def learn(parts: Parts) -> None:
    """Make the fused class of a family's blocks, where the operator computes them."""
    plain = parts.block
    computed = parts.norm in NORMS and parts.activation in ACTIVATIONS
    if parts.grouped and parts.qk_norms[0] is not None:
        computed = False  # they are normed where queries stand first
    if plain in BLOCKS or not computed:
        return
    learn_modules(parts.modules)
    name = f"Fused{plain.__module__.rpartition('.')[2]}{plain.__name__}"
    BLOCKS[plain] = type(name, (_FusedBlock, plain), {"_parts": parts, "_plain": plain})
    PARTS[BLOCKS[plain]] = PARTS[plain]


for family in FAMILIES.values():
    if family.parts is not None:
        learn(family.parts)
