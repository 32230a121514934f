"""The weights that a model has once its adapter is merged, as arrays; the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jlora.adapters.merging import MergeReport
from jlora.adapters.model import PeftModel
from jlora.adapters.tuned import TunedModel
from jlora.formats.names import is_lora_name
from jlora.formats.rounding import norm
from jlora.layers import bias_names
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


@dataclass
class MergedWeights:
    """What goes into a file.

    Attributes:
        tensors: float32 arrays by the plain model's parameter names; a tied head is not among
            them.
        changes: the norm (`formats.rounding.norm`) of the adapter's change of each tensor that it
            changes; empty for a model without an adapter.
        report: None for a model without an adapter.
    """

    tensors: dict[str, np.ndarray] = field(repr=False)
    changes: dict[str, float] = field(default_factory=dict)
    report: MergeReport | None = None


def merged_weights(model: nn.Module) -> MergedWeights:
    """The weights of a model, an adapter that is on it merged in float32.

    Raises:
        UserError: the adapter was unloaded, a LoRA embedding is the output head as well, or an
            engine has let go of the float32 weights.
    """
    for name, module in model.named_modules():
        weight = vars(module).get("weight")
        if weight is not None and not isinstance(weight, jt.Var):
            raise UserError(
                f"the weight of {name} is kept in packed form alone, rounded; call "
                "engine.restore(model) first to write it so"
            )
    if not isinstance(model, PeftModel):
        base = model.get_base_model() if isinstance(model, TunedModel) else model
        return MergedWeights({n: p.float32().numpy() for n, p in base.named_parameters()})
    before = base_tensors(model)
    with model.merged() as report:
        tensors = {
            plain_name(name): parameter.float32().numpy()
            for name, parameter in model.base_model.named_parameters()
            if not is_lora_name(name) and ".original_module." not in name
        }
    changes = {name: norm(tensors[name] - array) for name, array in before.items()}
    return MergedWeights(tensors, changes, report)


def base_tensors(model: PeftModel) -> dict[str, np.ndarray]:
    """What the base model has where the adapter changes something, by its plain names."""
    changed = {f"{name}.{part}" for name in model.lora_layers() for part in ("weight", "bias")}
    if model.peft_config is not None:
        changed |= bias_names(model.base_model, model.peft_config.bias)
    with model.disable_adapter():
        return {
            plain_name(name): parameter.float32().numpy()
            for name, parameter in model.base_model.named_parameters()
            if name in changed or ".original_module." in name
        }


def plain_name(name: str) -> str:
    """A parameter's name without the wrapper of a module that is trained in full."""
    return name.replace(".original_module.", ".").replace(".modules_to_save.", ".")
