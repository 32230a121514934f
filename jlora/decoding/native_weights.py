"""What the native decoder reads of a model: the addresses of its weights, as they are now."""

from __future__ import annotations

import numpy as np

from jlora.adapters import TunedModel
from jlora.engine.blocks import BLOCKS, part
from jlora.engine.parts import current, is_known
from jlora.engine.products import LORA, PackedEmbedding, PackedHead
from jlora.kernels import native
from jlora.kernels.block import ACTIVATIONS
from jlora.kernels.decoder import BLOCK, COLUMNS_FIRST, LINEAR, MODEL, NORM, PACKED, ROWS_FIRST
from jlora.layers.base import Conv1D
from jlora.models.families import Parts
from jlora.system.runtime import jt, nn


class _Unsupported(Exception):
    """The model has a part that the native decoder does not compute; the message says which."""


class NativeModel:
    """A GPT-2 or a model of the Llama family, prepared by the engine, its adapter active or not.

    Attributes:
        model, blocks: MODEL (1,) and BLOCK (layers,), see `jlora.kernels.decoder`.
        width: floats that one token's keys take in one layer.
        head: address of the head's packed weight; None where it is not packed.

    Raises:
        _Unsupported: the model has parts of another kind.
    """

    def __init__(self, model):
        model = model.get_base_model() if isinstance(model, TunedModel) else model
        self._held: list = []  # what the addresses point to
        self.model = np.zeros(1, MODEL)
        family = getattr(model, "family", None)
        if family is None or family.parts is None or type(model) is not family.model:
            raise _Unsupported(f"models of type {type(model).__name__}")
        if family.parts.block not in BLOCKS:
            raise _Unsupported("blocks that the operators do not compute")
        body = getattr(model, family.parts.body)
        if not is_known(body, copies=True):
            raise _Unsupported("parts that the operators do not read")
        self._read(model.config, body, family.parts)
        self.model["layers"] = len(self.blocks)
        own_head = type(model.head) is PackedHead and is_known(model.head)
        packed = model.head._packed if own_head else None
        fits = packed is not None and packed.fits(model.output_embedding)
        self.head = self._packed_address(packed) if fits else None
        self.width = int(self.model["G"][0] * self.model["D"][0])

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def _read(self, config, body: nn.Module, parts: Parts) -> None:
        self._eps = config.norm_eps
        numbers = {
            "H": config.heads, "G": config.kv_heads, "D": config.head_dim,
            "C": config.hidden_size, "inner": config.inner, "eps": config.norm_eps,
        }  # fmt: skip
        for name, number in numbers.items():
            self.model[name] = number
        self._read_tokens(current(getattr(body, parts.tokens)))
        if parts.positions is None:
            self.model["frequencies"] = self._address(body._frequencies)
        else:
            self.model["positions"] = self._address(current(getattr(body, parts.positions)).weight)
        self.model["activation"] = ACTIVATIONS[parts.activation]
        self.model["gated"], self._centred = parts.gated, parts.norm == "layer"
        self.model["last"] = self._norm(current(getattr(body, parts.last_norm)))
        sources = getattr(body, parts.blocks)
        self.blocks = np.zeros(len(sources), BLOCK)
        for block, source in zip(self.blocks, sources):
            attention = part(source, parts.attention)
            self._check_heads(attention.heads, attention.kv_heads, attention.head_dim)
            for name, path in zip(("before_attention", "before_mlp"), parts.norms):
                block[name] = self._norm(current(part(source, path)))
            for name, paths in (("qkv", parts.qkv), ("in", parts.up)):
                for i, path in enumerate(paths):
                    block[name][i] = self._linear(current(part(source, path)))
            block["out"] = self._linear(current(part(source, parts.output)))
            block["down"] = self._linear(current(part(source, parts.down)))

    def _check_heads(self, *numbers: int) -> None:
        """A block may not differ from the config, which the decoder reads once for all blocks."""
        if numbers != tuple(int(self.model[name][0]) for name in "HGD"):
            raise _Unsupported("blocks with heads of their own")

    def _read_tokens(self, module: nn.Module) -> None:
        # A copy of it, which has other rows, is of the class too.
        if type(module) is PackedEmbedding and module._packed.fits(module.weight):
            self.model["packed_tokens"] = self._packed_address(module._packed)
        else:
            self.model["tokens"] = self._address(module.weight)

    def _norm(self, module: nn.Module) -> np.ndarray:
        if module.eps != self._eps:
            raise _Unsupported("norms with an eps of their own")
        result = np.zeros((), NORM)
        result["weight"] = self._address(module.weight)
        result["centred"] = self._centred
        if hasattr(module, "bias"):
            result["bias"] = self._address(module.bias)
        return result

    def _linear(self, module: nn.Module) -> np.ndarray:
        adapted = type(module) in LORA
        if adapted:
            product = None if module.merged else module._engine
        else:
            product = getattr(module, "_packed", None)
            product = product if product is not None and product.fits(module.weight) else None
        adds = adapted and module._adds_lora
        folded = product.folded(module) if adds and product is not None else None
        product = folded or product
        turned = module.fan_in_fan_out if adapted else isinstance(module, Conv1D)
        result = self._weight(module.weight, turned, product)
        if module.bias is not None:
            result["bias"] = self._address(module.bias)
        if adds and folded is None:
            self._read_branch(module, result)
        return result

    def _weight(self, weight: jt.Var, turned: bool, product) -> np.ndarray:
        result = np.zeros((), LINEAR)
        n, k = weight.shape[::-1] if turned else weight.shape
        result["n"], result["k"] = n, k
        if product is None:
            result["kind"] = COLUMNS_FIRST if turned else ROWS_FIRST
            result["weight"] = self._address(weight)
        else:
            result["kind"], result["weight"] = PACKED, self._packed_address(product)
        return result

    def _read_branch(self, layer, result: np.ndarray) -> None:
        if not layer.variant.is_plain:
            raise _Unsupported("a variant of LoRA")
        drop = layer.lora_dropout
        if isinstance(drop, nn.Module) and drop.is_train:
            raise _Unsupported("dropout")
        enabled = getattr(layer, "enable_lora", (True,))
        result["A"], result["B"] = self._address(layer.lora_A), self._address(layer.lora_B)
        result["r"], result["blocks"] = layer.lora_B.shape[1], len(enabled)
        result["flags"] = sum(1 << block for block, flag in enumerate(enabled) if flag)
        result["scale"] = layer.scaling

    def _packed_address(self, product) -> int:
        weight = product.packed.settled()
        self._held.append(weight)
        return weight.address

    def _address(self, var: jt.Var) -> int:
        if not isinstance(var, jt.Var) or var.dtype != "float32":
            raise _Unsupported("weights that are not float32")
        array = var.data  # shares the Var's memory
        self._held += [var, array]
        return array.ctypes.data


def native_model(model) -> NativeModel | None:
    """The model for the native decoder; None where only the model's own layers can run it."""
    if jt.flags.use_cuda or native.problem() is not None or not native.has("run_prompts_op"):
        return None
    try:
        return NativeModel(model)
    except _Unsupported:
        return None
