"""`get_peft_model` and `PeftModel`: a base model with LoRA layers in it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import default_targets, is_target, name_fits, no_match, pattern_value
from jlora.errors import UserError
from jlora.layers import Conv1D, Embedding, Linear, LoRALayer, MergedLinear, set_trainable
from jlora.runtime import jt

from jittor import nn  # isort: skip  (after jlora.runtime, which prepares Jittor's import)

log = logging.getLogger("jlora.adapters")


@dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights.

    Attributes:
        layers: number of layers merged.
        largest_change: largest absolute change of a single weight, in the layer ``layer``.
        rounding_error: largest part of a change that was lost because weights are stored in a
            narrower type than float32; 0 for float32.
    """

    layers: int
    largest_change: float
    layer: str
    rounding_error: float

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers in float32; "
            f"largest change of a weight {self.largest_change:.4g} in {self.layer}"
        )
        if self.rounding_error:
            text += f"; up to {self.rounding_error:.2g} lost by rounding to the stored type"
        return text


def get_peft_model(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put LoRA layers into ``model`` (in place) and freeze everything else.

    Raises:
        UserError: ``target_modules`` fits no module, or one that cannot take LoRA.
    """
    return PeftModel(model, config)


class PeftModel(nn.Module):
    """A base model whose target layers are LoRA layers; called like the base model.

    Everything the base model has (``config``, ``tokenizer``, ``hidden_states``, ``new_cache``, ...)
    is there under the same name. Parameter names are the base model's, without a prefix.
    """

    def __init__(self, model: nn.Module, config: LoraConfig):
        if any(isinstance(m, LoRALayer) for m in model.modules()):
            raise UserError(
                "the model has LoRA layers already; merge_and_unload() or unload() them first"
            )
        if config.target_modules is None:
            model_type = getattr(getattr(model, "config", None), "model_type", None)
            config = replace(config, target_modules=default_targets(model_type))
        if config.base_model_name_or_path is None:
            config = replace(config, base_model_name_or_path=getattr(model, "name_or_path", None))
        targets = _find_targets(model, config)
        self.base_model = model
        self.peft_config = config
        for name, layer in targets.items():
            _set_module(model, name, _lora_layer(name, layer, config))
        self._adapter_names = {n for n, _ in model.named_parameters() if ".lora_" in f".{n}"}
        self._trainable_names = self._adapter_names
        set_trainable(model, self._trainable_names)

    def execute(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str):
        # Only reached when the wrapper lacks the name. Underscored names and Jittor's own notes
        # belong to one module and must not be found on another.
        if name.startswith("_") or name in ("base_model", "is_train", "backup_grad_state"):
            raise AttributeError(f"PeftModel has no attribute {name!r}")
        return getattr(self.base_model, name)

    def train(self) -> PeftModel:
        """Training mode. Jittor's own would also un-freeze a base that was in eval() before."""
        super().train()
        set_trainable(self.base_model, self._trainable_names)
        return self

    def lora_layers(self) -> dict[str, LoRALayer]:
        """The LoRA layers by module name."""
        modules = self.base_model.named_modules()
        return {name: module for name, module in modules if isinstance(module, LoRALayer)}

    def trainable_parameters(self) -> list[tuple[str, jt.Var]]:
        """Names and Vars of what the optimiser shall change, in the model's order."""
        named = self.base_model.named_parameters()
        return [(name, var) for name, var in named if name in self._trainable_names]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, the adapter's among the latter."""
        named = self.base_model.named_parameters()
        sizes = {name: int(np.prod(var.shape)) for name, var in named}
        return sum(sizes[name] for name in self._trainable_names), sum(sizes.values())

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def adapter_tensors(self) -> dict[str, np.ndarray]:
        """All that belongs to the adapter, by parameter name, as float32 arrays."""
        named = self.base_model.named_parameters()
        return {n: v.float32().numpy() for n, v in named if n in self._adapter_names}

    def set_adapter_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace the adapter's parameters by `adapter_tensors` of another time or place.

        Raises:
            UserError: names are missing or unknown or shapes differ; nothing is changed then.
        """
        parameters = {
            n: v for n, v in self.base_model.named_parameters() if n in self._adapter_names
        }
        shapes = {name: tuple(var.shape) for name, var in parameters.items()}
        check_tensors("the adapter", shapes, tensors)
        merged = [layer for layer in self.lora_layers().values() if layer.merged]
        for layer in merged:
            layer.unmerge()
        for name, var in parameters.items():
            var.update(jt.array(np.ascontiguousarray(tensors[name])).cast(var.dtype))
        for layer in merged:
            layer.merge()


def check_tensors(
    what: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]
) -> None:
    """Raises: UserError: lists what is missing, unexpected or of another shape."""
    wrong = [
        f"{name} is {tensors[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "misshapen": wrong,
    }
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{what} does not fit the model: {'; '.join(found)}")


def _listed(names: list[str], limit: int = 4) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules to replace, by name."""
    modules = dict(model.named_modules())
    if config.target_modules == "all-linear":
        head = getattr(model, "output_embedding", None)
        targets = {
            name: module
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
            and module.weight is not head
            and not name_fits(name, ["lm_head"])
            and not (config.exclude_modules and name_fits(name, config.exclude_modules))
        }
    else:
        targets = {n: m for n, m in modules.items() if n and is_target(n, config)}
    for name, module in targets.items():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            raise UserError(
                f"target_modules fits {name}, which is a {type(module).__name__} module; "
                "LoRA goes on Linear, Conv1D and Embedding layers only"
            )
    if not targets:
        possible = [
            n for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))
        ]
        raise no_match("target_modules", config.target_modules, possible)
    if config.enable_lora is not None and not any(map(config_fuses(config), targets.values())):
        raise UserError(
            f"enable_lora has {len(config.enable_lora)} entries, but no target layer has "
            f"{len(config.enable_lora)} times as many outputs as inputs"
        )
    return targets


def config_fuses(config: LoraConfig):
    """A test for the layers that ``enable_lora`` is about: n equal blocks as wide as the input."""

    def fused(module: nn.Module) -> bool:
        if config.enable_lora is None or isinstance(module, nn.Embedding):
            return False
        blocks = len(config.enable_lora)
        if isinstance(module, Conv1D):
            return module.nf == blocks * module.nx
        return module.out_features == blocks * module.in_features

    return fused


def _lora_layer(name: str, module: nn.Module, config: LoraConfig) -> LoRALayer:
    r = pattern_value(name, config.rank_pattern, config.r)
    alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
    # Merging is an explicit call on a PeftModel, as in PEFT: merge_weights stays False.
    if isinstance(module, nn.Embedding):
        layer = Embedding.from_base(module, r, alpha)
    elif config_fuses(config)(module):
        layer = MergedLinear.from_base(module, r, alpha, config.lora_dropout, config.enable_lora)
    else:
        layer = Linear.from_base(module, r, alpha, config.lora_dropout)
    layer.scaling = config.scaling(r, alpha)
    return layer


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    path, _, last = name.rpartition(".")
    parent = dict(model.named_modules())[path]
    if isinstance(parent, nn.Sequential):
        parent.layers[last] = module
    else:
        setattr(parent, last, module)
