"""The weights that a model has once its adapter is merged, as arrays; the model stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlora.adapters.merging import MergeReport
from jlora.adapters.model import PeftModel
from jlora.adapters.tuned import TunedModel
from jlora.formats.lazy import LazyArray
from jlora.formats.names import is_lora_name
from jlora.formats.rounding import norm
from jlora.layers import LoRALayer, bias_names
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn
from jlora.system.unread import values


@dataclass
class MergeNotes:
    """What merging did.

    Attributes:
        changes: the norm (`formats.rounding.norm`) of the adapter's change of each tensor that it
            changes; empty for a model without an adapter.
        report: None for a model without an adapter.
    """

    changes: dict[str, float] = field(default_factory=dict)
    report: MergeReport | None = None


@dataclass
class MergedWeights:
    """What goes into a file.

    Attributes:
        tensors: float32 arrays by the plain model's parameter names; a tied head is not among
            them.
        notes: what it was made by.
    """

    tensors: Mapping[str, np.ndarray | LazyArray] = field(repr=False)
    notes: MergeNotes

    @property
    def changes(self) -> dict[str, float]:
        return self.notes.changes

    @property
    def report(self) -> MergeReport | None:
        return self.notes.report


def merged_weights(model: nn.Module) -> MergedWeights:
    """The weights of a model, an adapter that is on it merged in float32.

    Raises:
        UserError: the adapter was unloaded, a LoRA embedding is the output head as well, or an
            engine has let go of the float32 weights.
    """
    result = merged_pieces(model)
    result.tensors = {name: array.read() for name, array in result.tensors.items()}
    return result


def merged_pieces(model: nn.Module) -> MergedWeights:
    """`merged_weights` with arrays that are made when they are read, and that nobody keeps.

    The notes are complete once all of them have been read.
    """
    for name, module in model.named_modules():
        held = (vars(module).get("weight"), vars(module).get("_unmerged"))
        if any(weight is not None and not isinstance(weight, jt.Var) for weight in held):
            raise UserError(
                f"the weight of {name} is kept in packed form alone, rounded; call "
                "engine.restore(model) first to write it so"
            )
    if isinstance(model, PeftModel):
        merging = _Merging(model)
        return MergedWeights(merging.tensors(), merging.notes)
    base = model.get_base_model() if isinstance(model, TunedModel) else model
    named = base.named_parameters()
    tensors = {name: _lazy(var, functools.partial(values, var)) for name, var in named}
    return MergedWeights(tensors, MergeNotes())


def _lazy(var: Any, read: Any) -> LazyArray:
    return LazyArray(var.shape, np.float32, read)


class _Merging:
    """Reads one tensor after the other, and notes what the adapter did to it."""

    def __init__(self, model: PeftModel):
        model.check_mergeable()
        self.notes = MergeNotes(report=MergeReport(0, 0.0, "none", 0.0))
        self._model = model
        self._layers = model.lora_layers()
        for layer in self._layers.values():
            layer.merged_bias()  # what cannot be merged is refused at once
        self._before = _base_biases(model)

    def tensors(self) -> dict[str, LazyArray]:
        named = dict(self._model.base_model.named_parameters())
        found = {}
        for name, var in named.items():
            if is_lora_name(name) or ".original_module." in name:
                continue
            owner, _, last = name.rpartition(".")
            layer = self._layers.get(owner)
            if layer is not None and layer.has_adapter and last == "weight":
                read = functools.partial(self._layer, owner, layer)
            elif layer is not None and last == "bias":
                read = functools.partial(self._bias, name, layer)
            elif ".modules_to_save." in name:
                original = named[name.replace(".modules_to_save.", ".original_module.")]
                read = functools.partial(self._copy, plain_name(name), var, original)
            else:
                read = functools.partial(self._other, name, var)
            found[plain_name(name)] = _lazy(var, read)
        return found

    def _layer(self, name: str, layer: LoRALayer) -> np.ndarray:
        plain = layer.plain_weight()
        before = values(plain)
        with jt.no_grad():
            whole = layer.variant.merged_weight(layer, jt.array(before))
            array = whole.numpy()
            largest, lost = float(np.abs(array - before).max()), 0.0
            if plain.dtype != "float32":  # which the model holds, and so the file
                change = array - before
                array = whole.cast(plain.dtype).float32().numpy()
                lost = float(np.abs(array - before - change).max())
        self.notes.changes[f"{name}.weight"] = norm(array - before)
        self.notes.report = self.notes.report.with_layer(name, largest, lost)
        return array

    def _bias(self, name: str, layer: LoRALayer) -> np.ndarray:
        return self._other(name, layer.bias if layer.merged else layer.merged_bias())

    def _copy(self, name: str, var: jt.Var, original: jt.Var) -> np.ndarray:
        """Of a module that is trained in full."""
        array = values(var)
        self.notes.changes[name] = norm(array - values(original))
        return array

    def _other(self, name: str, var: jt.Var) -> np.ndarray:
        array = values(var)
        if name in self._before:
            self.notes.changes[name] = norm(array - self._before[name])
        return array


def _base_biases(model: PeftModel) -> dict[str, np.ndarray]:
    """The biases of the base that the adapter may change, by their names."""
    names = {f"{name}.bias" for name in model.lora_layers()}
    if model.peft_config is not None:
        names |= bias_names(model.base_model, model.peft_config.bias)
    named = dict(model.base_model.named_parameters())
    if not names & set(named):
        return {}
    with model.disable_adapter():
        named = dict(model.base_model.named_parameters())
        return {name: values(named[name]) for name in names & set(named)}


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper of a module that is trained in full."""
    return name.replace(".original_module.", ".").replace(".modules_to_save.", ".")
