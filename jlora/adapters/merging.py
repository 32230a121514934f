"""Adding an adapter's change to the weights, and what that did to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jlora.adapters.attach import ModulesToSave
from jlora.layers import Embedding, LoRALayer
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


@dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights.

    Attributes:
        layers: number of layers merged.
        largest_change: largest absolute change of a single weight, in the layer ``layer``.
        rounding_error: largest part of a change that was lost because weights are stored in a
            narrower type than float32; 0 for float32.
        kept_as: what an engine had rounded the weights to that were merged into, their own numbers
            being gone, such as "int4"; "": nothing.
    """

    layers: int
    largest_change: float
    layer: str
    rounding_error: float
    kept_as: str = ""

    def with_layer(self, name: str, largest: float, lost: float, kept_as: str = "") -> MergeReport:
        """One more: its largest change, and what rounding lost of it."""
        best = largest > self.largest_change
        return MergeReport(
            self.layers + 1,
            largest if best else self.largest_change,
            name if best else self.layer,
            max(self.rounding_error, lost),
            kept_as or self.kept_as,
        )

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers in float32; "
            f"largest change of a weight {self.largest_change:.4g} in {self.layer}"
        )
        if self.rounding_error:
            text += f"; up to {self.rounding_error:.2g} lost by rounding to the stored type"
        if self.kept_as:
            text += (
                f"; merged into the {self.kept_as} rounding of the weights, their own numbers not "
                "being in memory any more"
            )
        return text


def merge_layers(layers: Mapping[str, LoRALayer]) -> MergeReport:
    """Merge the layers that are not merged yet.

    Raises:
        UserError: one cannot be merged; all are as they were then, whatever the error was.
    """
    report, merged = MergeReport(0, 0.0, "none", 0.0), []
    try:
        for name, layer in layers.items():
            if layer.merged or not layer.has_adapter:
                continue
            before, kept_as = layer.float_weight(), ""
            if not isinstance(layer.weight, jt.Var):
                kept_as = layer._engine.kind
            change = layer.variant.merged_weight(layer, before) - before
            largest = float(change.abs().max().item())
            layer.merge()
            merged.append(layer)
            lost = 0.0
            if layer.weight.dtype != "float32":
                lost = (layer.weight.float32() - before - change).abs().max().item()
            report = report.with_layer(name, largest, lost, kept_as)
    except BaseException:
        for layer in merged:
            layer.unmerge()
        raise
    return report


def unmerge_layers(layers: Iterable[LoRALayer]) -> None:
    """Unmerge all of the layers that are merged.

    Raises:
        UserError: one cannot be unmerged; all stay merged then.
    """
    plain = [(layer, layer.plain_weight()) for layer in layers if layer.merged]
    for layer, weight in plain:
        layer.give_back(weight)


def check_untied(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse to merge what is the output head as well.

    Args:
        modules: of an adapter on ``model``.

    Raises:
        UserError: an embedding that the adapter changes is the head, which it leaves alone.
    """
    head = getattr(model, "output_embedding", None)
    for name, module in modules.items():
        if isinstance(module, ModulesToSave):
            tied = module.tied
        else:
            tied = isinstance(module, Embedding) and module.has_adapter and module.weight is head
        if tied:
            raise UserError(
                f"{name} is the output head as well, which the adapter leaves alone and merging "
                "would change; keep the adapter unmerged"
            )
