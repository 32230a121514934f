"""Putting LoRA layers into a model and taking them out again."""

from __future__ import annotations

from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import is_excluded, is_inside, is_target, no_match, pattern_value
from jlora.layers import Conv1D, Embedding, Linear, LoRALayer, MergedLinear, assign
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


class ModulesToSave(nn.Module):
    """A module that is trained in full: the original and the copy that is trained and saved.

    Whatever is read of it (``weight``) is the copy's while the adapter is on. An embedding whose
    weight is also the output head is the exception: the head keeps the original, as in PEFT.
    """

    def __init__(self, original: nn.Module, tied: bool):
        self.original_module = original
        self.modules_to_save = _copy(original)
        self.tied = tied
        self.adapter_enabled = True

    @property
    def current(self) -> nn.Module:
        return self.modules_to_save if self.adapter_enabled else self.original_module

    def execute(self, *args, **kwargs):
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("original_module", "is_train", "backup_grad_state"):
            raise AttributeError(f"ModulesToSave has no attribute {name!r}")
        return getattr(self.original_module if self.tied else self.current, name)


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` (its target_modules given) puts LoRA on, by name.

    Raises:
        UserError: there are none, or one that cannot take LoRA.
    """
    modules = dict(model.named_modules())
    head = getattr(model, "output_embedding", None)
    if config.target_modules == "all-linear":
        targets = {
            name: module
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
            and module.weight is not head
            and not is_excluded(name, config)
        }
    else:
        targets = {n: m for n, m in modules.items() if n and is_target(n, config)}
    for name, module in targets.items():
        if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            raise UserError(
                f"target_modules fits {name}, which is a {type(module).__name__} module; "
                "LoRA goes on Linear, Conv1D and Embedding layers only"
            )
        if isinstance(module, nn.Linear) and module.weight is head:
            # The models read the head's weight and never call the layer: LoRA would do nothing.
            raise UserError(
                f"LoRA on the output head ({name}) is not supported; leave it out of "
                "target_modules, or train it in full with modules_to_save"
            )
    if not targets:
        kinds = (nn.Linear, Conv1D, nn.Embedding)
        possible = [name for name, module in modules.items() if isinstance(module, kinds)]
        raise no_match("target_modules", config.target_modules, possible)
    if config.enable_lora is not None and not any(is_fused(m, config) for m in targets.values()):
        blocks = len(config.enable_lora)
        raise UserError(
            f"enable_lora has {blocks} entries, but no target layer has {blocks} times as many "
            "outputs as inputs"
        )
    return targets


def is_fused(module: nn.Module, config: LoraConfig) -> bool:
    """Whether ``enable_lora`` is about this layer: equal blocks, each as wide as the input."""
    if config.enable_lora is None or isinstance(module, nn.Embedding):
        return False
    inputs, outputs = linear_shape(module)
    return outputs == len(config.enable_lora) * inputs


def linear_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(inputs, outputs)"""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def attach(model: nn.Module, config: LoraConfig) -> None:
    """Replace the target modules by LoRA layers and wrap ``modules_to_save``."""
    for name, module in find_targets(model, config).items():
        set_module(model, name, lora_layer(name, module, config))
    head = getattr(model, "output_embedding", None)
    for wanted in config.modules_to_save or []:
        modules = dict(model.named_modules())
        # PEFT compares the plain ends here: "norm" stands for "input_layernorm" too.
        found = {n: m for n, m in modules.items() if n.endswith(wanted) and _may_be_copied(m)}
        outer = {n: m for n, m in found.items() if not is_inside(n, [f for f in found if f != n])}
        if not outer:
            detach(model)
            raise no_match("modules_to_save", [wanted], modules)
        for name, module in outer.items():
            tied = isinstance(module, nn.Embedding) and module.weight is head
            set_module(model, name, ModulesToSave(module, tied))


def _may_be_copied(module: nn.Module) -> bool:
    return not any(isinstance(part, (LoRALayer, ModulesToSave)) for part in module.modules())


def lora_layer(name: str, module: nn.Module, config: LoraConfig) -> LoRALayer:
    """The LoRA layer that takes the place of ``module``."""
    r = pattern_value(name, config.rank_pattern, config.r)
    alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
    # Merging is an explicit call on a PeftModel, as in PEFT: merge_weights stays False.
    if isinstance(module, nn.Embedding):
        layer = Embedding.from_base(module, r, alpha)
    elif is_fused(module, config):
        layer = MergedLinear.from_base(module, r, alpha, config.lora_dropout, config.enable_lora)
    else:
        layer = Linear.from_base(module, r, alpha, config.lora_dropout)
    layer.scaling = config.scaling(r, alpha)
    _initialise(layer, config.init_lora_weights)
    return layer


def _initialise(layer: LoRALayer, init: bool | str) -> None:
    """PEFT's choices beside the usual one, which the layer has made already."""
    if not layer.has_adapter:
        return
    A, B = layer.lora_A, layer.lora_B
    if init == "gaussian":
        assign(A, jt.randn(*A.shape) / layer.r)
        assign(B, jt.randn(*B.shape) / layer.r if isinstance(layer, Embedding) else B * 0)
    elif init is False:
        for var in (A, B):
            if isinstance(layer, Embedding):
                assign(var, jt.randn(*var.shape))
            else:
                assign(var, (jt.rand(*var.shape) * 2 - 1) / var.shape[1] ** 0.5)


def detach(model: nn.Module, keep_trained_modules: bool = False) -> None:
    """Put plain layers back, with their weights as they are now."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALayer):
            set_module(model, name, module.to_base())
        elif isinstance(module, ModulesToSave):
            trained, original = module.modules_to_save, module.original_module
            set_module(model, name, trained if keep_trained_modules else original)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place called ``name``."""
    path, _, last = name.rpartition(".")
    parent = dict(model.named_modules())[path]
    if isinstance(parent, nn.Sequential):
        parent.layers[last] = module
    else:
        setattr(parent, last, module)


def _copy(module: nn.Module) -> nn.Module:
    """The module with its own copy of every Var in it."""
    copy = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, jt.Var):
            value = value.clone().stop_grad()
        elif isinstance(value, nn.Module):
            value = _copy(value)
        elif name == "layers" and isinstance(module, nn.Sequential):
            value = type(value)((key, _copy(child)) for key, child in value.items())
        copy.__dict__[name] = value
    return copy
