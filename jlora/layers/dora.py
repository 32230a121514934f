"""DoRA: a change of the direction of each output's weights, and a length trained apart from it."""

from __future__ import annotations

from jlora.layers.base import LoRALayer, assign, cast
from jlora.layers.conv import ConvLoRA
from jlora.layers.variant import LoraVariant
from jlora.system.errors import UserError
from jlora.system.runtime import jt


class Dora(LoraVariant):
    """DoRA (arXiv 2402.09353), as PEFT computes it, on linear layers and embeddings.

        y = m V x / |V| + b,    V = W + s B A

    |V| and m have a number for each output: the norm is over the inputs, of an embedding over its
    words. No gradient goes through the norm (the paper's section 4.3). A dropout drops x for both
    parts of V, so that training with one multiplies by W twice.
    """

    parameters = ("lora_magnitude_vector",)
    peft_fields = ("use_dora",)

    def init(self, layer):
        if isinstance(layer, ConvLoRA):
            raise UserError("DoRA goes on linear layers and embeddings only")
        start = norm(layer, layer.float_weight() + layer.delta_weight())
        layer.lora_magnitude_vector = jt.zeros(start.shape)
        assign(layer.lora_magnitude_vector, start)

    def forward(self, layer, x, y):
        factor = self.factor(layer)
        base = y
        if layer.drops:
            x = layer.lora_dropout(x)
            base = layer.base_output(x)
        if getattr(layer, "bias", None) is not None:
            base = base - layer.bias
        change = (factor - 1) * base + factor * layer.low_rank(x, dropout=False)
        return y + cast(change, y.dtype)

    def merged_weight(self, layer, weight):
        changed = weight + layer.delta_weight()
        factor = layer.lora_magnitude_vector / norm(layer, changed)
        return changed * (factor if outputs_last(layer) else factor.unsqueeze(1))

    def factor(self, layer):
        """m / |V|, of one number for each output; kept while nothing of it is trained."""
        parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.weight)
        # Jittor gives a Var another number whenever it gets another value.
        key = tuple(getattr(part, "id", None) for part in parts)
        kept = vars(layer).get("_factor")
        if kept is not None and kept[0] == key:
            return kept[1]
        with jt.no_grad():
            length = norm(layer, layer.float_weight() + layer.delta_weight()).stop_grad()
        factor = layer.lora_magnitude_vector / length
        if layer.is_frozen:
            layer._factor = key, factor.stop_grad()
        return factor


def outputs_last(layer: LoRALayer) -> bool:
    """Whether the last dimension of the weight is that of the outputs: (in, out), (words, dim)."""
    return getattr(layer, "fan_in_fan_out", True)


def norm(layer: LoRALayer, weight: jt.Var) -> jt.Var:
    """Of the weights of each output, (out,) or, of an embedding, (dim,)."""
    return jt.sqrt((weight * weight).sum(0 if outputs_last(layer) else 1))
