"""LoRA layers with loralib's names and signatures, and GPT-2's base layer `Conv1D`.

A layer keeps the pretrained weight W0 frozen and learns a low-rank change of it
(arXiv 2106.09685, equation 3):

    h = W0 x + b + (alpha / r) B A dropout(x)

``lora_A`` is ``(r, in)`` and starts random, ``lora_B`` is ``(out, r)`` and starts at zero, so an
untrained layer computes what its base layer computes.

With ``merge_weights=True`` the change is added to the weight by ``eval()`` and taken away again by
``train()``, of the layer or of any model that holds it, as loralib does. `merge` and `unmerge` do
the same on request. What loralib gets wrong is put right here: `MergedLinear` with
``fan_in_fan_out=False`` (microsoft/LoRA#103), `Conv1d` and `Conv3d` with kernels longer than 1,
and merging, whose undoing gives the old weight back bit for bit.
"""

from __future__ import annotations

from jlora.layers.base import Conv1D, LoRALayer, assign
from jlora.layers.conv import Conv1d, Conv2d, Conv3d
from jlora.layers.embedding import Embedding
from jlora.layers.linear import Linear, MergedLinear
from jlora.layers.trainable import (
    bias_names,
    lora_state_dict,
    mark_only_lora_as_trainable,
    set_trainable,
)
from jlora.layers.variant import LoraVariant
from jlora.layers.variants import VARIANTS, find_variant

__all__ = [
    "VARIANTS",
    "Conv1D",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "LoRALayer",
    "LoraVariant",
    "MergedLinear",
    "assign",
    "bias_names",
    "find_variant",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "set_trainable",
]
