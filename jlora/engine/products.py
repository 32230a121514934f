"""Layers whose weight is multiplied from a packed copy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from jlora import layers
from jlora.kernels import elementwise, target_loss
from jlora.kernels.native import value_number
from jlora.kernels.packed_linear import Branch, PackedWeight, TrainedWeight
from jlora.layers.base import identity
from jlora.models.head import LanguageHead
from jlora.system.runtime import jt, nn

#: The LoRA layers whose branch the operators compute; a subclass may compute something else.
LORA = (layers.Linear, layers.MergedLinear)


#: What a replaced method and Jittor's hooks leave on a module.
_OVERRIDES = {"execute", "__fhook__", "__fhook2__", "__bihook__", "__bohook__"}


def is_overridden(module: nn.Module) -> bool:
    """Whether this one module computes something else than its class, or is watched by a hook."""
    return not _OVERRIDES.isdisjoint(vars(module))


#: Tells one `FrozenProduct` from another, also from one that is gone.
NUMBERS = itertools.count()


class PackedOnly:
    """Stands where a layer's frozen weight was, once only the packed copy of it is kept.

    Attributes:
        shape, dtype: of the weight.
    """

    dtype = "float32"

    def __init__(self, packed: PackedWeight, transposed: bool):
        self._packed, self._transposed = packed, transposed
        n, k = packed.n, packed.k
        self.shape = (k, n) if transposed else (n, k)

    def is_stop_grad(self) -> bool:
        return True

    def stop_grad(self) -> PackedOnly:
        return self

    def numpy(self) -> np.ndarray:
        """The weight to the precision kept, float32."""
        return self._packed.unpack(self._transposed)

    def unpacked(self) -> jt.Var:
        return jt.array(self.numpy()).stop_grad()


class FrozenProduct:
    """``W x + b`` with a packed copy of a frozen W."""

    def __init__(self, weight: jt.Var, bias: jt.Var | None, transposed: bool, kind: str):
        self.weight, self.bias = weight, bias
        self.transposed, self.kind = transposed, kind
        self.number = next(NUMBERS)
        self.packed = PackedWeight(weight, transposed, kind)

    def __call__(self, x: jt.Var) -> jt.Var:
        if self.bias is None or self.bias.is_stop_grad():
            return self.packed(x, self.bias)
        return self.packed(x) + self.bias

    def install(self, module) -> None:
        """Have ``module``, which has the same weight, multiply by this copy."""
        if type(module) in LORA:
            module._engine = self
        elif type(module) in PACKED:
            module._packed = self
            module.__class__ = PACKED[type(module)]

    @property
    def trains_bias(self) -> bool:
        return self.bias is not None and not self.bias.is_stop_grad()

    def branch(self, layer) -> Branch | None:
        """The low-rank branch of a LoRA layer, or None where the layer has more to it."""
        if type(layer) not in LORA or not layer.variant.is_plain:
            return None
        drop = layer.lora_dropout
        dropped = type(drop) is elementwise.FusedDropout
        # An adapter that came after `prepare` has a plain one.
        idle = drop is identity or not drop.is_train
        if layer.lora_A.dtype != "float32" or not (dropped or idle):
            return None
        p = 0.0 if idle else drop.p
        enabled = tuple(getattr(layer, "enable_lora", (True,)))
        return Branch(layer.lora_A, layer.lora_B, enabled, layer.scaling, p)

    def folded(self, layer) -> FrozenProduct | None:
        """A copy of the weight with the layer's change in it, where that is what computes it.

        That is for variants whose forward pass no operator knows, while nothing of the layer is
        trained; None for others.
        """
        if layer.variant.is_plain or not layer.is_frozen or type(layer) not in LORA:
            return None
        names = ("lora_A", "lora_B", *layer.variant.parameters)
        key = (self.number, *(value_number(getattr(layer, name)) for name in names))
        kept = vars(layer).get("_folded")
        if kept is None or kept[0] != key:
            with jt.no_grad():
                weight = layer.variant.merged_weight(layer, layer.float_weight())
                bias = layer.variant.merged_bias(layer, self.bias)
            product = FrozenProduct(weight, bias, self.transposed, self.kind)
            product.release(())
            layer._folded = kept = key, product
        return kept[1]

    def with_lora(self, x: jt.Var, layer) -> jt.Var | None:
        """The whole of a LoRA layer in one operator, or None where that cannot be."""
        folded = self.folded(layer)
        if folded is not None:
            return folded(x)
        branch = self.branch(layer)
        if branch is None or self.trains_bias:
            return None
        if branch.p:
            seed, first_row = elementwise.dropout_seed()
            branch = replace(branch, seed=seed, first_row=first_row)
        return self.packed.with_lora(x, self.bias, branch)

    def release(self, modules) -> None:
        """Let go of the weight, which these modules have; `PackedOnly` takes its place."""
        self.weight = PackedOnly(self.packed, self.transposed)
        for module in modules:
            module.weight = self.weight

    def fits(self, weight: jt.Var | PackedOnly) -> bool:
        """Whether the copy stands for ``weight``: the same Var, and not trained meanwhile.

        A copied module (``modules_to_save``) and a disabled one have another.
        """
        return weight is self.weight and weight.is_stop_grad()


class TrainedProduct:
    """``W x + b`` with a W that is trained: its packed copy follows it."""

    kind = "bf16"

    def __init__(self, weight: jt.Var, bias: jt.Var | None, transposed: bool):
        self.weight, self.bias = weight, bias
        self.packed = TrainedWeight(weight, transposed)

    def __call__(self, x: jt.Var) -> jt.Var:
        return self.packed(x, self.bias)

    def install(self, module) -> None:
        """As `FrozenProduct.install`. The weight of a layer with LoRA is not trained."""
        if type(module) in PACKED:
            module._packed = self
            module.__class__ = PACKED[type(module)]

    def fits(self, weight: jt.Var) -> bool:
        return weight is self.weight


class PackedLinear(nn.Linear):
    def execute(self, x):
        product = self._packed
        return product(x) if product.fits(self.weight) else super().execute(x)


class PackedConv1D(layers.Conv1D):
    def execute(self, x):
        product = self._packed
        return product(x) if product.fits(self.weight) else super().execute(x)


class PackedHead(LanguageHead):
    def execute(self, hidden, weight):
        product = self._packed
        if product.fits(weight):
            return self.capped(product(hidden))
        return super().execute(hidden, weight)

    def losses(self, hidden, weight, targets, smoothing):
        if not self._packed.fits(weight) or is_overridden(self):
            return super().losses(hidden, weight, targets, smoothing)
        if isinstance(self._packed, TrainedProduct):
            loss = target_loss.trained_target_loss
        else:
            loss = target_loss.target_loss
        return loss(hidden, self._packed.packed, targets, smoothing, self.cap)


class PackedEmbedding(nn.Embedding):
    """An embedding whose weight is the head's too, and is kept in the head's packed copy alone."""

    def execute(self, x):
        product = self._packed
        return product.packed.rows(x) if product.fits(self.weight) else super().execute(x)


PACKED = {nn.Linear: PackedLinear, layers.Conv1D: PackedConv1D, LanguageHead: PackedHead}
