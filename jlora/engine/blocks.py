"""Transformer blocks that run as one operator, whatever of them is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jlora.engine.parts import PARTS, is_known
from jlora.engine.products import FrozenProduct, PackedConv1D, PackedLinear, TrainedProduct
from jlora.kernels import elementwise
from jlora.kernels.block import BlockPlan, Layer, Shape, run_block
from jlora.kernels.packed_linear import Branch
from jlora.layers import Linear, MergedLinear
from jlora.models import gpt2, llama
from jlora.models.attention import Stream
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
                branch = product.branch(module)
                if branch is None:
                    return None
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
    """What the fused blocks share; a subclass names its family's layers and norms.

    Decoding with a cache, padding on the left, layers that are merged or replaced, and blocks with
    parts that the operator does not read (see `is_known`) go the way of the plain block, layer by
    layer.
    """

    _checkpoint = False  # compute the forward pass again in the backward pass, and keep nothing
    _given = False  # its norms and biases may be trained: they go with each call, not into the plan
    _bottom = False  # nothing below it is trained

    def _run(self, x, keys, cache, rotation, plain: Callable[[], jt.Var]) -> jt.Var:
        """The block's result by one operator, or ``plain()`` where that cannot be."""
        if cache is not None or not (keys is None or isinstance(keys, Stream)):
            return plain()
        if not is_known(self):
            return plain()
        norm_1, norm_2 = self._norms()
        if norm_1.eps != norm_2.eps:  # the operator has one for both
            return plain()
        layers = [[_Layer.of(module) for module in joint] for joint in self._joints()]
        flat = [layer for joint in layers for layer in joint]
        if None in flat:
            return plain()
        norms = [p for norm in (norm_1, norm_2) for p in (norm.weight, getattr(norm, "bias", None))]
        biases = [[layer.product.bias for layer in joint] for joint in layers]
        fixed = [p for p in (*norms, *(b for joint in biases for b in joint)) if p is not None]
        if not self._given and not all(p.is_stop_grad() for p in fixed):
            return plain()
        plan = self._plan(layers, flat, norms)
        if plan is None:
            return plain()
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
        key = tuple(layer.key for layer in flat)
        if key not in plans:
            shape = self._shape()
            fits = shape.fits(flat[0].product.packed.k, flat[-1].product.packed.k)
            arrays = [None if p is None else p.numpy() for p in norms]
            joints = [[layer.planned() for layer in joint] for joint in layers]
            plans[key] = BlockPlan(shape, arrays, joints, self._given) if fits else None
        return plans[key]


def _joined(biases: Sequence[jt.Var | None], layers: Sequence[_Layer]) -> jt.Var:
    """Biases of layers that read the same rows as one."""
    parts = [
        jt.zeros((layer.product.packed.n,)) if bias is None else bias
        for bias, layer in zip(biases, layers)
    ]
    return parts[0] if len(parts) == 1 else jt.concat(parts)


class FusedGPT2Block(_FusedBlock, gpt2.Block):
    def execute(self, x, keys, cache):
        def plain():
            return gpt2.Block.execute(self, x, keys, cache)

        return self._run(x, keys, cache, (), plain)

    def _joints(self):
        return (self.attn.c_attn,), (self.attn.c_proj,), (self.mlp.c_fc,), (self.mlp.c_proj,)

    def _norms(self):
        return self.ln_1, self.ln_2

    def _shape(self) -> Shape:
        heads = self.attn.heads
        return Shape(heads, heads, self.ln_1.weight.shape[0] // heads, False, self.ln_1.eps)


class FusedLlamaBlock(_FusedBlock, llama.Block):
    def execute(self, x, cos, sin, keys, cache):
        def plain():
            return llama.Block.execute(self, x, cos, sin, keys, cache)

        return self._run(x, keys, cache, (cos, sin), plain)

    def _joints(self):
        attn, mlp = self.self_attn, self.mlp
        qkv = attn.q_proj, attn.k_proj, attn.v_proj
        return qkv, (attn.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)

    def _norms(self):
        return self.input_layernorm, self.post_attention_layernorm

    def _shape(self) -> Shape:
        attn, eps = self.self_attn, self.input_layernorm.eps
        return Shape(attn.heads, attn.kv_heads, attn.head_dim, True, eps)


BLOCKS = {gpt2.Block: FusedGPT2Block, llama.Block: FusedLlamaBlock}
PARTS.update((fused, PARTS[plain]) for plain, fused in BLOCKS.items())
