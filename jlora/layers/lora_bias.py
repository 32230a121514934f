"""PEFT's ``lora_bias``: B has a bias of its own."""

from __future__ import annotations

from jlora.layers.base import cast
from jlora.layers.variant import LoraVariant
from jlora.system.errors import UserError
from jlora.system.runtime import jt


class LoraBias(LoraVariant):
    """``W0 x + b + s (B A x + c)`` with a trained c, (out,), that starts at zero."""

    parameters = ("lora_bias",)
    peft_fields = ("lora_bias",)

    def init(self, layer):
        if not hasattr(layer, "out_features"):
            raise UserError("lora_bias goes on linear layers only")
        layer.lora_bias = jt.zeros((layer.out_features,))

    def forward(self, layer, x, y):
        return y + cast(layer.low_rank(x) + layer.lora_bias * layer.scaling, y.dtype)

    def merged_bias(self, layer, bias):
        change = layer.lora_bias * layer.scaling
        return change if bias is None else bias + change
