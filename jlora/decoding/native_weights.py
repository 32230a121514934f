"""What the native decoder reads of a model: the addresses of its weights, as they are now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.adapters import TunedModel
from jlora.adapters.attach import ModulesToSave
from jlora.engine import blocks
from jlora.engine.blocks import BLOCKS, is_interleaved, is_whole
from jlora.engine.parts import current, is_known
from jlora.engine.products import LORA, PackedEmbedding, PackedHead, is_overridden
from jlora.kernels import native
from jlora.kernels.block import ACTIVATIONS
from jlora.kernels.branches import SLOT_BRANCH, PackedBranch, pack_branch, place_branches
from jlora.kernels.decoder import BLOCK, COLUMNS_FIRST, LINEAR, MODEL, NORM, PACKED, ROWS_FIRST
from jlora.kernels.gpu_library import DeviceMemory, on_gpu
from jlora.layers.base import Conv1D, LoRALayer
from jlora.models.head import LanguageHead
from jlora.models.parts import Parts
from jlora.models.rope import Rope
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn

NORMS = "before_attention", "after_attention", "before_mlp", "after_mlp", "queries", "keys"


def part(module: nn.Module, path: str) -> nn.Module:
    """The submodule that stands at a path now: of one that is trained in full, the copy."""
    return current(blocks.part(module, path))


class _Unsupported(Exception):
    """The model has a part that the native decoder does not compute; the message says which."""


def _is_adapted(module: nn.Module) -> bool:
    """Whether an adapter changes what a module computes, also where no branch shows it."""
    if isinstance(module, LoRALayer):
        return module.merged or module._adds_lora
    return isinstance(module, ModulesToSave) and module.adapter_enabled


class NativeModel:
    """A GPT-2 or a model of the Llama family, prepared by the engine, its adapter active or not.

    Attributes:
        model, blocks: MODEL (1,) and BLOCK (layers,), see `jlora.kernels.decoder`.
        width: floats that one token's keys take in one layer.
        head: address of the head's packed weight, or of its floats; None: the logits are the
            model's own business.
        head_words: size of the vocabulary of a head of floats; 0: it is packed.
        linears: module name -> field and index of its LINEAR in ``blocks``.
        head_cap: see `jlora.models.head.LanguageHead`.
        is_adapted: whether an adapter was on the model and at work.
        narrow: whether keys and values are kept in bf16, as of packed weights; else in float32.
        rope: rotary positions that are right up to some length of the text; None: of any.

    Raises:
        _Unsupported: the model has parts of another kind.
    """

    def __init__(self, model):
        model = model.get_base_model() if isinstance(model, TunedModel) else model
        self._held: list = []  # what the addresses point to
        self._common: dict[str, object] = {}
        self.rope: Rope | None = None
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
        self.narrow = any(
            (self.blocks[field]["kind"] == PACKED).any() for field in ("qkv", "out", "in", "down")
        )
        self.model["narrow"] = self.narrow
        self.head, self.head_words = self._head(model)
        self.head_cap = model.head.cap
        self.is_adapted = any(map(_is_adapted, model.modules()))
        self.width = int(self.model["G"][0] * self.model["D"][0])

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def _head(self, model) -> tuple[int | None, int]:
        if model.head_layer is not None:  # LoRA on it; the head may have been packed before
            return None, 0
        packed = getattr(model.head, "_packed", None) if type(model.head) is PackedHead else None
        if packed is not None and is_known(model.head) and packed.fits(model.output_embedding):
            return self._packed_address(packed), 0
        weight = model.output_embedding
        plain = type(model.head) in (PackedHead, LanguageHead) and not is_overridden(model.head)
        if on_gpu() or not plain:
            return None, 0
        if not isinstance(weight, jt.Var) or weight.dtype != "float32":
            return None, 0
        return self._address(weight), weight.shape[0]

    def _read(self, config, body: nn.Module, parts: Parts) -> None:
        self._eps = config.norm_eps
        numbers = {
            "H": config.heads, "G": config.kv_heads, "D": config.head_dim,
            "C": config.hidden_size, "inner": config.inner, "eps": config.norm_eps,
        }  # fmt: skip
        for name, number in numbers.items():
            self.model[name] = number
        if on_gpu() and (config.head_dim > 128 or config.head_dim % 16):
            raise _Unsupported("heads of this size")
        self._read_tokens(part(body, parts.tokens))
        if parts.positions is None:
            self._read_ropes(body.ropes)
        else:
            self.model["positions"] = self._address(part(body, parts.positions).weight)
        self.model["activation"] = ACTIVATIONS[parts.activation]
        self.model["gated"], self._centred = parts.gated, parts.norm == "layer"
        self.model["grouped"] = parts.grouped
        self.model["embedding_scale"] = getattr(body, "embedding_scale", 1.0)
        self.model["last"] = self._norm(part(body, parts.last_norm))
        sources = getattr(body, parts.blocks)
        self.blocks = np.zeros(len(sources), BLOCK)
        self.linears: dict[str, tuple[str, tuple[int, ...]]] = {}
        for number in range(len(sources)):
            name = f"{parts.body}.{parts.blocks}.{number}"
            for field, paths in (("qkv", parts.qkv), ("in", parts.up)):
                for i, path in enumerate(paths):
                    self.linears[f"{name}.{path}"] = field, (number, i)
            self.linears[f"{name}.{parts.output}"] = "out", (number,)
            self.linears[f"{name}.{parts.down}"] = "down", (number,)
        ropes = getattr(body, "layer_ropes", [None] * len(sources))
        for block, source, rope in zip(self.blocks, sources, ropes):
            block["rope"] = 0 if rope is None else rope + 1
            attention = part(source, parts.attention)
            self._check_heads(attention.heads, attention.kv_heads, attention.head_dim)
            self._read_scores(attention, block)
            for name, path in zip(NORMS, (*parts.norms, *parts.qk_norms)):
                if path is not None:
                    block[name] = self._norm(part(source, path))
            if parts.qk_norms[0] is not None:
                self._same("whole", is_whole(attention, part(source, parts.qk_norms[0]).weight))
            for name, paths in (("qkv", parts.qkv), ("in", parts.up)):
                for i, path in enumerate(paths):
                    block[name][i] = self._linear(part(source, path))
            block["out"] = self._linear(part(source, parts.output))
            block["down"] = self._linear(part(source, parts.down))
        if on_gpu():
            self._check_gpu()

    def _check_gpu(self) -> None:
        """What cuda/decoder.h computes is less than decoder.h does."""
        model = self.model[0]
        plain = ("neighbours", "long_from", "grouped")
        if any(model[name] for name in plain) or model["amplitude"] not in (0, 1):
            raise _Unsupported("rotary positions or layouts of heads that the GPU's decoder lacks")
        if model["positions"] == 0 and (model["ropes"] != 1 or model["rotary"] != model["D"]):
            raise _Unsupported("partial rotary positions, or several kinds of them")
        for block in self.blocks:
            if any(block[name]["weight"] for name in NORMS if not name.startswith("before")):
                raise _Unsupported("norms that the GPU's decoder lacks")
            if model["positions"] == 0 and block["rope"] != 1:
                raise _Unsupported("layers without positions")
            if block["before_attention"]["weight"] == 0 or block["in"][1]["kind"] == (
                0 if model["gated"] else PACKED
            ):
                raise _Unsupported("blocks without a first norm, or with joined layers")

    def _check_heads(self, *numbers: int) -> None:
        """A block may not differ from the config, which the decoder reads once for all blocks."""
        if numbers != tuple(int(self.model[name][0]) for name in "HGD"):
            raise _Unsupported("blocks with heads of their own")

    def _read_ropes(self, ropes: Sequence[Rope]) -> None:
        """One row of frequencies for each kind, and for longer texts one more."""
        first = ropes[0]
        rows = [rope.frequencies for rope in ropes]
        if first.limit is not None:
            if len(ropes) > 1:
                raise _Unsupported("rotary positions of several kinds, some with a limit")
            self.rope = first
        if first.long is not None:
            rows.append(first.long)
            self.model["long_from"] = first.limit
        if any(rope.amplitude != first.amplitude for rope in ropes):
            raise _Unsupported("rotary positions of several amplitudes")
        self.model["ropes"], self.model["rotary"] = len(rows), 2 * len(rows[0])
        self.model["amplitude"] = first.amplitude
        frequencies = np.ascontiguousarray(np.stack(rows), np.float32)
        self.model["frequencies"] = self._array(frequencies)

    def _read_scores(self, attention: nn.Module, block: np.ndarray) -> None:
        """Of a block's attention: what becomes of its scores, and how it is turned."""
        scores, rotary = attention.attention, getattr(attention, "rotary", None)
        if (rotary is None) != (block["rope"] == 0):
            raise _Unsupported("layers whose rotary positions are not the model's")
        self._same("neighbours", is_interleaved(rotary) if rotary is not None else None)
        self._same("scale", scores.scale_of(attention.head_dim))
        self._same("cap", scores.cap or 0.0)
        block["window"] = scores.window or 0

    def _same(self, name: str, value) -> None:
        """A number that all blocks must have in common; None: this one has none."""
        if value is None:
            return
        if self._common.setdefault(name, value) != value:
            raise _Unsupported(f"blocks with {name} of their own")
        self.model[name] = value

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
        result["offset"] = getattr(module, "offset", 0.0)
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
        bias = module.bias if folded is None else folded.bias
        if bias is not None:
            result["bias"] = self._address(bias)
        if adds and folded is None:
            self._read_branch(module, result)
        return result

    def _weight(self, weight: jt.Var, turned: bool, product) -> np.ndarray:
        result = np.zeros((), LINEAR)
        n, k = weight.shape[::-1] if turned else weight.shape
        result["n"], result["k"] = n, k
        if product is None and on_gpu():
            raise _Unsupported("weights that are not packed")
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
        if on_gpu():
            table = np.zeros(1, SLOT_BRANCH)
            record = table[0]
            enabled = getattr(layer, "enable_lora", (True,))
            record["A"], record["B"] = self._address(layer.lora_A), self._address(layer.lora_B)
            record["r"], record["blocks"] = layer.lora_B.shape[1], len(enabled)
            record["flags"] = sum(1 << block for block, flag in enumerate(enabled) if flag)
            record["scale"] = layer.scaling
        else:
            table, memory = place_branches([packed_branch(layer)])
            self._held.append(memory)
        self._held.append(table)  # of one slot
        result["branches"] = table.ctypes.data

    def _packed_address(self, product) -> int:
        weight = product.packed.settled()
        self._held.append(weight)
        return weight.address

    def _array(self, array: np.ndarray) -> int:
        memory = DeviceMemory.of(array) if on_gpu() else array
        self._held.append(memory)
        return memory.address if on_gpu() else array.ctypes.data

    def _address(self, var: jt.Var) -> int:
        if not isinstance(var, jt.Var) or var.dtype != "float32":
            raise _Unsupported("weights that are not float32")
        self._held.append(var)
        # On the host, .data shares the Var's memory; on a GPU it would move the Var there.
        return self._array(var.numpy() if on_gpu() else var.data)


def packed_branch(layer, narrow: bool = False) -> PackedBranch:
    """The branch of a layer of plain LoRA; ``narrow``: in bf16.

    Raises:
        _Unsupported: its numbers are not float32.
    """
    if layer.lora_A.dtype != "float32" or layer.lora_B.dtype != "float32":
        raise _Unsupported("weights that are not float32")
    A, B = layer.lora_A.numpy(), layer.lora_B.numpy()
    return pack_branch(A, B, layer.scaling, getattr(layer, "enable_lora", (True,)), narrow)


def native_model(model) -> NativeModel | None:
    """The model for the native decoder; None where only the model's own layers can run it."""
    try:
        return _native_model(model)
    except _Unsupported:
        return None


def require_native(model) -> NativeModel:
    """The model for the native decoder.

    Raises:
        UserError: only the model's own layers can run it; the message says why.
    """
    try:
        return _native_model(model)
    except _Unsupported as reason:
        raise UserError(
            f"{getattr(model, 'name_or_path', type(model).__name__)} runs on its own layers "
            f"alone: the native decoder does not take {reason}; `jlora generate` and `jlora chat` "
            "run it"
        ) from reason


def _native_model(model) -> NativeModel:
    problem = native.problem()
    if problem is None and not native.has("head_topk_op"):
        problem = "it was compiled without the decoder"
    if problem is not None:
        raise _Unsupported(f"any model here ({problem})")
    return NativeModel(model)
