"""The variants of LoRA by name. A new one is a file with its class, and an entry in `VARIANTS`."""

from __future__ import annotations

import difflib
import math

from jlora.layers.dora import Dora
from jlora.layers.lora_bias import LoraBias
from jlora.layers.variant import PLAIN, LoraVariant
from jlora.system.errors import UserError


class RsLora(LoraVariant):
    """rsLoRA (arXiv 2312.03732): the change is scaled by ``alpha / sqrt(r)``."""

    peft_fields = ("use_rslora",)

    def scaling(self, r, alpha):
        return alpha / math.sqrt(r)


class RsDora(Dora):
    """DoRA with rsLoRA's scaling."""

    peft_fields = ("use_dora", "use_rslora")
    scaling = RsLora.scaling


#: Name in ``LoraConfig.variant`` -> variant.
VARIANTS: dict[str, LoraVariant] = {
    "lora": PLAIN,
    "rslora": RsLora(),
    "dora": Dora(),
    "rsdora": RsDora(),
    "lora_bias": LoraBias(),
}


def find_variant(name: str) -> LoraVariant:
    """The variant called ``name``.

    Raises:
        UserError: there is none; the nearest name is in the message.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(str(name), VARIANTS, 1)
        known = f"nearest: {near[0]}" if near else f"there are {', '.join(VARIANTS)}"
        raise UserError(f"variant {name!r} is no variant of LoRA here; {known}")
    return VARIANTS[name]
