"""Adapter files -> the low-rank change of every layer, as arrays; no model is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapters.config import LoraConfig
from jlora.adapters.loralib import is_loralib, read_loralib
from jlora.adapters.storage import find_blocks, from_block_matrix, from_peft_keys
from jlora.adapters.targets import pattern_value
from jlora.formats.peft_file import CONFIG, read_peft
from jlora.system.errors import UserError

#: The blocks of a layer that computes query, key and value in one product.
ATTENTION = ("query", "key", "value")


@dataclass(frozen=True)
class Update:
    """The change ``dW = scaling B A`` (out, in) of a layer, or of one block of a fused layer.

    Attributes:
        layer: the module's name.
        block: the part of a fused layer's outputs; None for a layer that is not fused.
        A: (r, in) float64. B: (out, r) float64.
        rows: the positions of B's outputs among the ``outputs`` of the layer.
    """

    layer: str
    block: str | None
    A: np.ndarray
    B: np.ndarray
    scaling: float
    rows: slice
    outputs: int

    @property
    def key(self) -> str:
        """``transformer.h.3.attn.c_attn[query]``"""
        return self.layer + (f"[{self.block}]" if self.block else "")

    @property
    def kind(self) -> str:
        """The key after the layer's number: ``attn.c_attn[query]``"""
        return re.sub(r"^.*?\.\d+\.", "", self.key)

    @property
    def depth(self) -> int:
        """The number of the layer, from 0; 0 if the name has none."""
        number = re.search(r"\.(\d+)\.", self.layer)
        return int(number[1]) if number else 0


@dataclass(frozen=True)
class AdapterUpdates:
    """All changes of an adapter.

    Attributes:
        path: as the user gave it.
        base_record: jlora's notes about the base model, see `adapters.base_model.check_base`.
    """

    path: Path
    updates: list[Update]
    base_record: dict[str, Any] | None = None


def read_updates(
    path: Path,
    folder: Path,
    lora_alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
) -> AdapterUpdates:
    """The LoRA matrices of a PEFT folder or of loralib's .pt file; other tensors are ignored.

    Args:
        path: the adapter's name in messages.
        folder: the adapter folder (of a run, see `runs.adapter_file.run_of`) or the .pt file.
        lora_alpha, enable_lora: settings of a .pt file, which does not contain them.

    Raises:
        UserError: files are missing or damaged, a setting is not supported, matrices do not fit
            each other or are not finite, or a .pt file with a fused layer needs ``enable_lora``.
    """
    if is_loralib(folder):
        tensors, record = read_loralib(folder), None
        config = LoraConfig(lora_alpha=lora_alpha)
    else:
        files = read_peft(folder)
        tensors = from_peft_keys(files.tensors, str(folder))
        config = LoraConfig.from_dict(files.config, source=str(folder / CONFIG))
        if not config.lora_variant.is_plain:
            raise UserError(
                f"{folder}: variant {config.variant_name!r} changes the weights by more than B A, "
                "and nothing else can be analysed"
            )
        enable_lora, record = files.notes.get("enable_lora"), files.notes.get("base_model")
    names = [name[: -len(".lora_A")] for name in tensors if name.endswith(".lora_A")]
    if not names:
        raise UserError(f"{folder}: holds no LoRA matrices; give the folder of an adapter")
    updates = []
    for name in names:
        A, B = tensors[f"{name}.lora_A"], tensors.get(f"{name}.lora_B")
        check_factors(A, B, f"{folder}: {name}")
        A, B = A.astype(np.float64), B.astype(np.float64)
        alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
        if is_loralib(folder):
            flags = loralib_flags(A, B, enable_lora, f"{folder}: {name}")
            scaling = alpha / B.shape[1]
        else:
            flags, B = peft_blocks(A, B, enable_lora)
            scaling = config.scaling(A.shape[0], alpha)
        updates += split(name, A, B, scaling, flags)
    return AdapterUpdates(path, sorted(updates, key=lambda update: update.depth), record)


def check_factors(A: np.ndarray, B: np.ndarray | None, where: str) -> None:
    """Raises: UserError: it is not a pair of matrices, or has NaN or infinity."""
    if B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] % max(B.shape[1], 1):
        shape = None if B is None else B.shape
        raise UserError(
            f"{where}: lora_A {A.shape} and lora_B {shape} are no pair of matrices; only LoRA on "
            "linear layers and embeddings can be analysed"
        )
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise UserError(f"{where}: its LoRA matrices hold NaN or infinity; train it anew")


def peft_blocks(
    A: np.ndarray, B: np.ndarray, enable_lora: Sequence[bool] | None
) -> tuple[list[bool] | None, np.ndarray]:
    """(flags of the blocks, B as `MergedLinear` has it); (None, B) for a layer that is not fused.

    Args:
        enable_lora: from the adapter's notes, used if the structure of B agrees.
    """
    inputs, outputs = A.shape[1], B.shape[0]
    if outputs % inputs or outputs == inputs:
        return None, B
    flags = list(enable_lora) if enable_lora else find_blocks(B, outputs // inputs)
    if not flags or outputs != len(flags) * inputs:
        return None, B
    part = from_block_matrix(B, flags)
    return (None, B) if part is None else (flags, part)


def loralib_flags(
    A: np.ndarray, B: np.ndarray, enable_lora: Sequence[bool] | None, where: str
) -> list[bool] | None:
    """The blocks to which the matrices of a .pt file belong; None for a layer that is not fused.

    Raises:
        UserError: the file alone does not say.
    """
    enabled = A.shape[0] // B.shape[1]
    if enable_lora is not None and sum(enable_lora) == 1:
        raise UserError(
            f"{where}: with LoRA on one block, a fused layer looks like a plain one; make a folder "
            "of the file with `jlora convert` first"
        )
    if enabled == 1:
        return None
    if enable_lora is None:
        raise UserError(
            f"{where}: a fused layer with LoRA on {enabled} of its blocks; say which, such as "
            "--enable-lora 1,0,1 for query and value of GPT-2"
        )
    if sum(enable_lora) != enabled or B.shape[0] % enabled:
        raise UserError(
            f"{where}: has LoRA on {enabled} blocks, but enable_lora has {sum(enable_lora)}"
        )
    return list(enable_lora)


def split(
    layer: str, A: np.ndarray, B: np.ndarray, scaling: float, flags: Sequence[bool] | None
) -> list[Update]:
    """The updates of one layer.

    Args:
        A: (r, in), with ``flags`` (enabled * r, in).
        B: (out, r), with ``flags`` (enabled * size of a block, r).
        flags: which blocks of the outputs have LoRA; None: not fused.
    """
    if flags is None:
        return [Update(layer, None, A, B, scaling, slice(0, B.shape[0]), B.shape[0])]
    names = ATTENTION if len(flags) == 3 else [f"block {i + 1}" for i in range(len(flags))]
    r, size = B.shape[1], B.shape[0] // sum(flags)
    updates = []
    for place, block in enumerate(i for i, flag in enumerate(flags) if flag):
        part_A = A[place * r : (place + 1) * r]
        part_B = B[place * size : (place + 1) * size]
        rows = slice(block * size, (block + 1) * size)
        updates.append(
            Update(layer, names[block], part_A, part_B, scaling, rows, size * len(flags))
        )
    return updates
