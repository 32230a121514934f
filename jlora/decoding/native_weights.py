"""What the native decoder reads of a model: the addresses of its weights, as they are now."""

from __future__ import annotations

import numpy as np

from jlora.adapters import TunedModel
from jlora.engine.parts import is_known
from jlora.engine.products import LORA, PackedEmbedding, PackedHead
from jlora.kernels import native, packed_linear
from jlora.kernels.decoder import BLOCK, COLUMNS_FIRST, LINEAR, MODEL, NORM, PACKED, ROWS_FIRST
from jlora.layers.base import Conv1D
from jlora.models import gpt2, llama
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
        if type(model) is llama.LlamaForCausalLM:
            body, read = model.model, self._read_llama
        elif type(model) is gpt2.GPT2LMHeadModel:
            body, read = model.transformer, self._read_gpt2
        else:
            raise _Unsupported(f"models of type {type(model).__name__}")
        if not is_known(body):
            raise _Unsupported("parts that the operators do not read")
        read(model)
        self.model["layers"] = len(self.blocks)
        own_head = type(model.head) is PackedHead and is_known(model.head)
        packed = model.head._packed if own_head else None
        fits = packed is not None and packed.fits(model.output_embedding)
        self.head = self._packed_address(packed) if fits else None
        self.width = int(self.model["G"][0] * self.model["D"][0])

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def _read_llama(self, model: llama.LlamaForCausalLM) -> None:
        config, body = model.config, model.model
        self._read_shape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.hidden_size, config.intermediate_size, config.rms_norm_eps,
        )  # fmt: skip
        self._read_tokens(body.embed_tokens)
        self.model["frequencies"] = self._address(body._frequencies)
        self.model["last"] = self._norm(body.norm)
        self.blocks = np.zeros(len(body.layers), BLOCK)
        for block, source in zip(self.blocks, body.layers):
            attention, mlp = source.self_attn, source.mlp
            block["before_attention"] = self._norm(source.input_layernorm)
            block["before_mlp"] = self._norm(source.post_attention_layernorm)
            self._check_heads(attention.heads, attention.kv_heads, attention.head_dim)
            for i, part in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
                block["qkv"][i] = self._linear(part)
            block["out"] = self._linear(attention.o_proj)
            for i, part in enumerate((mlp.gate_proj, mlp.up_proj)):
                block["in"][i] = self._linear(part)
            block["down"] = self._linear(mlp.down_proj)

    def _read_gpt2(self, model: gpt2.GPT2LMHeadModel) -> None:
        config, body = model.config, model.transformer
        width, heads = config.n_embd, config.n_head
        self._read_shape(
            heads, heads, width // heads, width, config.n_inner or 4 * width,
            config.layer_norm_epsilon,
        )  # fmt: skip
        self._read_tokens(body.wte)
        self.model["positions"] = self._address(body.wpe.weight)
        self.model["last"] = self._norm(body.ln_f)
        self.blocks = np.zeros(len(body.h), BLOCK)
        for block, source in zip(self.blocks, body.h):
            block["before_attention"] = self._norm(source.ln_1)
            block["before_mlp"] = self._norm(source.ln_2)
            self._check_heads(source.attn.heads, source.attn.heads, width // heads)
            block["qkv"][0] = self._linear(source.attn.c_attn)
            block["out"] = self._linear(source.attn.c_proj)
            block["in"][0] = self._linear(source.mlp.c_fc)
            block["down"] = self._linear(source.mlp.c_proj)

    def _read_shape(self, heads, key_heads, head_dim, width, inner, eps) -> None:
        self._eps = eps
        numbers = {
            "H": heads, "G": key_heads, "D": head_dim, "C": width, "inner": inner, "eps": eps,
        }  # fmt: skip
        for name, number in numbers.items():
            self.model[name] = number

    def _check_heads(self, *numbers: int) -> None:
        """A block may not differ from the config, which the decoder reads once for all blocks."""
        if numbers != tuple(int(self.model[name][0]) for name in "HGD"):
            raise _Unsupported("blocks with heads of their own")

    def _read_tokens(self, module: nn.Module) -> None:
        if type(module) is PackedEmbedding:
            self.model["packed_tokens"] = self._packed_address(module._packed)
        else:
            self.model["tokens"] = self._address(module.weight)

    def _norm(self, module: nn.Module) -> np.ndarray:
        if module.eps != self._eps:
            raise _Unsupported("norms with an eps of their own")
        result = np.zeros((), NORM)
        result["weight"] = self._address(module.weight)
        if isinstance(module, gpt2.LayerNorm):
            result["bias"] = self._address(module.bias)
        return result

    def _linear(self, module: nn.Module) -> np.ndarray:
        adapted = type(module) in LORA
        if adapted:
            product = None if module.merged else module._engine
        else:
            product = getattr(module, "_packed", None)
            product = product if product is not None and product.fits(module.weight) else None
        turned = module.fan_in_fan_out if adapted else isinstance(module, Conv1D)
        result = self._weight(module.weight, turned, product)
        if module.bias is not None:
            result["bias"] = self._address(module.bias)
        if adapted and module._adds_lora:
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
    if jt.flags.use_cuda or native.problem() is not None or not packed_linear.available("bf16"):
        return None
    try:
        return NativeModel(model)
    except _Unsupported:
        return None
