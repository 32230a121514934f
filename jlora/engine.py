"""The speed pass: swap the leaf layers of a loaded model for fused C++ ones, and back.

A fused layer is a subclass of the plain layer with another ``execute``; the pass changes the class
of the modules in place, so parameters, names and everything that points to a module stay. The
plain layers in ``jlora.models`` remain the definition of what is computed.
"""

from __future__ import annotations

import functools

from jlora import layers, machine, runtime
from jlora.errors import UserError
from jlora.kernels import attention, elementwise, target_loss
from jlora.kernels.packed_linear import PackedWeight
from jlora.models import gpt2, llama
from jlora.models import attention as models_attention
from jlora.models.head import LanguageHead
from jlora.runtime import jt

from jittor import nn  # isort: skip  (after jlora.runtime, which prepares Jittor's import)

PRECISIONS = ("plain", "fp32", "bf16")


class FusedAttention(models_attention.CausalAttention):
    def execute(self, q, k, v, keys=None):
        return attention.causal_attention(q, k, v, keys)


class FusedRMSNorm(llama.RMSNorm):
    def execute(self, x):
        return elementwise.rms_norm(x, self.weight, self.eps)


class FusedLayerNorm(gpt2.LayerNorm):
    def execute(self, x):
        return elementwise.layer_norm(x, self.weight, self.bias, self.eps)


class FusedSwiGLU(llama.SwiGLU):
    def execute(self, gate, up):
        return elementwise.swiglu(gate, up)


class FusedGELU(gpt2.GELU):
    def execute(self, x):
        return elementwise.gelu(x)


class FusedRotary(llama.Rotary):
    def execute(self, x, cos, sin):
        return elementwise.rotary(x, cos, sin)


class PackedLinear(nn.Linear):
    def execute(self, x):
        return self._packed_product(x)


class PackedConv1D(layers.Conv1D):
    def execute(self, x):
        return self._packed_product(x)


class PackedHead(LanguageHead):
    def execute(self, hidden, weight):
        return self._packed(hidden)

    def losses(self, hidden, weight, targets, smoothing):
        return target_loss.target_loss(hidden, self._packed, targets, smoothing)


FUSED = {
    models_attention.CausalAttention: FusedAttention,
    llama.SwiGLU: FusedSwiGLU,
    gpt2.GELU: FusedGELU,
    llama.Rotary: FusedRotary,
    nn.Dropout: elementwise.FusedDropout,
}
# These have weights, and their fused backward pass gives none of them a gradient.
FUSED_FROZEN = {llama.RMSNorm: FusedRMSNorm, gpt2.LayerNorm: FusedLayerNorm}
PACKED = {nn.Linear: PackedLinear, layers.Conv1D: PackedConv1D}
PLAIN = {fused: plain for table in (FUSED, FUSED_FROZEN, PACKED) for plain, fused in table.items()}
PLAIN[PackedHead] = LanguageHead


def choose_precision() -> tuple[str, str]:
    """The fastest precision that this machine does well, and why."""
    if jt.flags.use_cuda:
        return "plain", "the fused operators are for CPUs; on a GPU Jittor's own are used"
    if runtime.onednn_paths() is None:
        return "plain", "oneDNN was not found, so the plain layers run"
    if any("BF16" in name for name in machine.cpu_features()):
        return "bf16", "the processor multiplies bf16"
    return "fp32", "the processor has no bf16 instructions"


def prepare(model, precision: str = "auto") -> str:
    """Make a model fast for training its adapter and for generation.

    Args:
        model: a model or PeftModel, its base frozen.
        precision: "bf16" packs frozen linear weights in bf16 (sums, residual stream, adapter and
            optimiser stay float32); "fp32" fuses what stands between the products and keeps every
            number float32; "plain" changes nothing; "auto" is `choose_precision`.

    Returns:
        The precision used.

    Raises:
        UserError: no such precision, or the machine lacks what it needs.
    """
    if precision == "auto":
        precision = choose_precision()[0]
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not one of auto, {', '.join(PRECISIONS)}")
    restore(model)
    if precision == "plain":
        return precision
    if runtime.onednn_paths() is None:
        raise UserError(
            f"precision {precision} needs oneDNN, which was not found; `jlora doctor` says how to "
            "get it, and precision plain runs without"
        )
    for module in model.modules():
        kind = type(module)
        if kind in FUSED:
            module.__class__ = FUSED[kind]
        elif kind in FUSED_FROZEN and _frozen(module):
            module.__class__ = FUSED_FROZEN[kind]
        elif precision == "bf16":
            _pack(module, model)
    return precision


def restore(model) -> None:
    """Undo `prepare`: the plain layers are back, with the weights they had."""
    for module in model.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
        for name in ("_packed", "_packed_product", "_engine"):
            module.__dict__.pop(name, None)


def _pack(module, model) -> None:
    if isinstance(module, LanguageHead):
        if model.output_embedding.is_stop_grad():
            module._packed = PackedWeight(model.output_embedding, transposed=False, bf16=True)
            module.__class__ = PackedHead
        return
    is_lora = isinstance(module, (layers.Linear, layers.MergedLinear))
    if not (is_lora or type(module) in PACKED) or not _frozen(module):
        return
    transposed = module.fan_in_fan_out if is_lora else isinstance(module, layers.Conv1D)
    weight = PackedWeight(module.weight, transposed, bf16=True)
    product = functools.partial(_product, weight, module.bias)
    if is_lora:
        module._engine = product
    else:
        module._packed_product = product
        module.__class__ = PACKED[type(module)]


def _product(weight: PackedWeight, bias: jt.Var | None, x: jt.Var) -> jt.Var:
    y = weight(x)
    return y if bias is None else y + bias


def _frozen(module) -> bool:
    bias = getattr(module, "bias", None)
    return module.weight.is_stop_grad() and (bias is None or bias.is_stop_grad())
