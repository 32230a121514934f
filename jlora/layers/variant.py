"""`LoraVariant`: all that a variant of LoRA may do otherwise than plain LoRA, in one class.

A layer holds its parameters and asks its variant for everything that may differ: the scaling,
further parameters, the forward pass, merging. Variants have no state of their own: one object
serves all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jlora.system.errors import UserError
from jlora.system.runtime import jt

if TYPE_CHECKING:
    from jlora.layers.base import LoRALayer


class LoraVariant:
    """Plain LoRA: ``W0 x + b + (alpha / r) B A dropout(x)``. A variant overrides what it changes.

    Attributes:
        parameters: names of a layer's parameters besides ``lora_A`` and ``lora_B``, which `init`
            makes. Each begins with ``lora_`` and is trained and saved under its name.
        peft_fields: the fields that together switch the variant on in PEFT's
            ``adapter_config.json``; none where PEFT does not have the variant, which then refuses
            the file.
    """

    parameters: tuple[str, ...] = ()
    peft_fields: tuple[str, ...] = ()

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of ``B A`` for rank ``r``; proportional to ``alpha``."""
        return alpha / r

    def init(self, layer: LoRALayer) -> None:
        """Add ``parameters`` to a layer whose ``lora_A`` and ``lora_B`` have their first values.

        Raises:
            UserError: the variant cannot go on this layer.
        """

    def forward(self, layer: LoRALayer, x: jt.Var, y: jt.Var) -> jt.Var:
        """The layer's result.

        Args:
            x: the input: (..., in) float, or token ids of an embedding.
            y: what the base layer makes of it, (..., out), its bias added.
        """
        change = layer.low_rank(x)
        return y + (change if change.dtype == y.dtype else change.cast(y.dtype))

    def merged_weight(self, layer: LoRALayer, weight: jt.Var) -> jt.Var:
        """The plain weight, float32, with which a base layer computes what this layer does.

        Args:
            weight: the base's, float32, in its own layout.
        """
        return weight + layer.delta_weight()

    def merged_bias(self, layer: LoRALayer, bias: jt.Var | None) -> jt.Var | None:
        """The plain bias with which a base layer computes what this layer does."""
        return bias

    def unmerged_weight(self, layer: LoRALayer, weight: jt.Var) -> jt.Var:
        """`merged_weight` undone, for weights that were loaded into a merged layer.

        A weight that was merged here is never computed back: the layer keeps a copy of the old one.

        Raises:
            UserError: that cannot be computed.
        """
        if not self.is_plain:
            raise UserError(
                f"{type(self).__name__}: other weights were loaded into a merged layer, from which "
                "the change cannot be taken away; unmerge before loading"
            )
        return weight - layer.delta_weight()

    @property
    def is_plain(self) -> bool:
        """Whether it computes plain LoRA with some scaling, by what the class overrides.

        The fused operators, loralib's files and the analysis know nothing else; other variants run
        by `forward`.
        """
        own = type(self)
        return (
            not self.parameters
            and own.forward is LoraVariant.forward
            and own.merged_weight is LoraVariant.merged_weight
            and own.merged_bias is LoraVariant.merged_bias
        )


PLAIN = LoraVariant()
