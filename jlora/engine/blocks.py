"""Transformer blocks that run as one operator while all they hold but LoRA is frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jlora.engine.products import FrozenProduct, PackedConv1D, PackedLinear
from jlora.kernels.block import BlockPlan, Layer, Shape, run_block
from jlora.kernels.packed_linear import Branch
from jlora.layers import Linear, MergedLinear
from jlora.models import gpt2, llama
from jlora.models.attention import Stream
from jlora.runtime import jt


@dataclass(frozen=True)
class _Layer:
    """A linear layer as it is at this call."""

    module: object
    product: FrozenProduct
    branch: Branch | None

    @classmethod
    def of(cls, module) -> _Layer | None:
        """None where the layer does more than a frozen product and a low-rank branch."""
        branch = None
        if isinstance(module, (PackedLinear, PackedConv1D)):
            product = module._packed
            if not product.fits(module.weight):
                return None
        elif isinstance(module, (Linear, MergedLinear)) and module._engine is not None:
            product = module._engine
            if module.merged:
                return None
            if module._adds_lora:
                branch = product.branch(module)
                if branch is None:
                    return None
        else:
            return None
        return None if product.trains_bias else cls(module, product, branch)

    @property
    def key(self) -> tuple:
        return self.product.packed.address, self.branch and self.branch.numbers

    def planned(self) -> Layer:
        bias = self.product.bias
        return Layer(self.product.packed, None if bias is None else bias.numpy(), self.branch)


class _FusedBlock:
    """What the fused blocks share; a subclass names its family's layers and norms.

    Decoding with a cache, padding on the left, and layers that are merged, trained or replaced go
    the way of the plain block, layer by layer.
    """

    _checkpoint = False  # compute the forward pass again in the backward pass, and keep nothing

    def _run(self, x, keys, cache, rotation, plain: Callable[[], jt.Var]) -> jt.Var:
        """The block's result by one operator, or ``plain()`` where that cannot be."""
        if cache is not None or not (keys is None or isinstance(keys, Stream)):
            return plain()
        layers = [[_Layer.of(module) for module in joint] for joint in self._joints()]
        flat = [layer for joint in layers for layer in joint]
        norms = [p for norm in self._norms() for p in (norm.weight, getattr(norm, "bias", None))]
        if None in flat or not all(p is None or p.is_stop_grad() for p in norms):
            return plain()
        plan = self._plan(layers, flat, norms)
        if plan is None:
            return plain()
        B, T = x.shape[:2]
        starts = np.arange(0, B * T + 1, T, dtype=np.int32) if keys is None else keys.starts
        branches = [layer.branch for layer in flat if layer.branch is not None]
        adapters = [array for branch in branches for array in (branch.A, branch.B)]
        seed = int(np.random.randint(2**31)) if any(branch.p for branch in branches) else 0
        keep = not (self._checkpoint or jt.flags.no_grad)
        return run_block(plan, x, jt.array(starts), rotation, adapters, keep, seed)

    def _plan(self, layers, flat, norms) -> BlockPlan | None:
        plans = self.__dict__.setdefault("_plans", {})
        key = tuple(layer.key for layer in flat)
        if key not in plans:
            shape = self._shape()
            fits = shape.fits(flat[0].product.packed.k, flat[-1].product.packed.k)
            arrays = [None if p is None else p.numpy() for p in norms]
            joints = [[layer.planned() for layer in joint] for joint in layers]
            plans[key] = BlockPlan(shape, arrays, joints) if fits else None
        return plans[key]


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
