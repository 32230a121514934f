"""The low-rank branches of many adapters over one prepared base model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.adapters.adapter import Adapter
from jlora.decoding.native_weights import NativeModel, packed_branch
from jlora.engine.products import LORA
from jlora.kernels.branches import SLOT_BRANCH, PackedBranch
from jlora.kernels.decoder import PACKED
from jlora.kernels.gpu_library import on_gpu
from jlora.system.errors import UserError

INSTEAD = "merge it into a model of its own: `jlora merge`"


class AdapterBank:
    """Slots of adapters; a row of tokens says whose branches it takes.

    An adapter's A and B are laid out once, when it is added: bf16 beside packed base weights,
    float32 beside float32 ones.

    Args:
        native: the base model, no adapter on it.

    Attributes:
        blocks: the base's blocks, with a table of branches by slot on each layer.

    Raises:
        UserError: an adapter is on the base, or it is on a GPU.
    """

    def __init__(self, native: NativeModel):
        if on_gpu():
            raise UserError("serving runs on the processor; set JLORA_DEVICE=cpu")
        if native.is_adapted:
            raise UserError("an adapter is on the base model; take it off: set_adapter(None)")
        self._native = native
        self._slots: list[Mapping[str, PackedBranch] | None] = []  # None: free
        self.blocks = native.blocks.copy()
        self._grow(8)

    def _grow(self, capacity: int) -> None:
        """Room for so many slots."""
        tables = np.zeros((len(self._native.linears), capacity), SLOT_BRANCH)
        for number, branches in enumerate(self._slots):
            _write(tables, self._native, number, branches or {})
        self._tables = tables
        for table, (field, index) in zip(tables, self._native.linears.values()):
            self.blocks[field]["branches"][index] = table.ctypes.data

    def add(self, adapter: Adapter) -> int:
        """Take up an adapter, on the model or put aside; returns its slot.

        Raises:
            UserError: it is more than low-rank branches on layers of the blocks.
        """
        branches = self._packed(adapter)
        free = (n for n, taken in enumerate(self._slots) if taken is None)
        slot = next(free, len(self._slots))
        if slot == len(self._slots):
            self._slots.append(None)
            if slot == self._tables.shape[1]:
                self._grow(2 * slot)
        self._slots[slot] = branches
        _write(self._tables, self._native, slot, branches)
        return slot

    def remove(self, slot: int) -> None:
        """Forget an adapter, which no row takes any more; its slot may be given to another."""
        self.check(slot)
        if slot >= 0:
            self._tables[:, slot] = 0
            self._slots[slot] = None

    def bytes_of(self, slot: int) -> int:
        """Memory that the branches of a slot take."""
        return sum(branch.bytes for branch in (self._slots[slot] or {}).values())

    def check(self, slot: int) -> None:
        """Raises: ValueError: there is no adapter in the slot; -1, the base, is always there."""
        if slot != -1 and not (0 <= slot < len(self._slots) and self._slots[slot] is not None):
            raise ValueError(f"no adapter in slot {slot}")

    def _packed(self, adapter: Adapter) -> dict[str, PackedBranch]:
        if adapter.bias_names:
            raise UserError(f"the adapter trains biases of the base; {INSTEAD}")
        found = {}
        for name, layer in adapter.modules.items():
            if type(layer) not in LORA:
                raise UserError(f"the adapter has {type(layer).__name__} at {name}; {INSTEAD}")
            if not layer.variant.is_plain:
                variant = type(layer.variant).__name__
                raise UserError(f"the adapter has {variant} at {name}, not plain LoRA; {INSTEAD}")
            if layer.merged:
                raise UserError(f"the adapter is merged at {name}; unmerge it first")
            if name not in self._native.linears:
                raise UserError(f"the adapter changes {name}, outside the blocks; {INSTEAD}")
            if layer.has_adapter:
                field, index = self._native.linears[name]
                found[name] = packed_branch(layer, self.blocks[field]["kind"][index] == PACKED)
        return found


def _write(
    tables: np.ndarray, native: NativeModel, slot: int, branches: Mapping[str, PackedBranch]
) -> None:
    for row, name in zip(tables, native.linears):
        row[slot] = branches[name].record if name in branches else np.zeros((), SLOT_BRANCH)
