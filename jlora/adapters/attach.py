"""Putting LoRA layers into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import (
    is_excluded,
    is_inside,
    is_target,
    layer_number,
    name_fits,
    nearest,
    no_match,
    pattern_key,
    pattern_value,
)
from jlora.layers import Conv1D, Embedding, Linear, LoRALayer, MergedLinear, assign
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn

#: What can take LoRA.
KINDS = (nn.Linear, Conv1D, nn.Embedding)


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

    def put_on(self, original: nn.Module) -> None:
        """Stand in the place of ``original`` again, after `take_off`."""
        self.original_module = original

    def take_off(self) -> nn.Module:
        """The original, which this one lets go of until `put_on`."""
        return self.__dict__.pop("original_module")

    @property
    def current(self) -> nn.Module:
        return self.modules_to_save if self.adapter_enabled else self.original_module

    def execute(self, *args, **kwargs):
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("original_module", "is_train", "backup_grad_state"):
            raise AttributeError(f"ModulesToSave has no attribute {name!r}")
        return getattr(self.original_module if self.tied else self.current, name)


class TokenRows(ModulesToSave):
    """An embedding or a head with other rows for some tokens (PEFT's ``trainable_token_indices``).

    The rows of a copy are replaced, which a head that is the embedding shares, as in PEFT.

    Attributes:
        tokens: their ids.
    """

    def __init__(self, original: nn.Module, tokens: list[int]):
        super().__init__(original, tied=False)
        self.tokens = tokens

    @property
    def rows(self) -> np.ndarray:
        """(tokens, width) float32"""
        return self.modules_to_save.weight.float32().numpy()[self.tokens]

    def set_rows(self, rows: np.ndarray) -> None:
        weight = self.modules_to_save.weight
        values = weight.float32().numpy().copy()
        values[self.tokens] = rows
        weight.update(jt.array(values).cast(weight.dtype).stop_grad())


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
        if not isinstance(module, KINDS):
            raise UserError(
                f"target_modules fits {name}, which is a {type(module).__name__} module; "
                "LoRA goes on Linear, Conv1D and Embedding layers only"
            )
        if not isinstance(module.weight, jt.Var) and not _reads_packed(module):
            raise UserError(
                f"the weight of {name} is kept in packed form alone, which LoRA cannot go around; "
                "put the adapter on before engine.prepare, or call engine.restore(model) first"
            )
    if not targets:
        possible = [name for name, module in modules.items() if isinstance(module, KINDS)]
        raise _no_match(model, "target_modules", config.target_modules, possible)
    if config.enable_lora is not None and not any(is_fused(m, config) for m in targets.values()):
        blocks = len(config.enable_lora)
        raise UserError(
            f"enable_lora has {blocks} entries, but no target layer has {blocks} times as many "
            "outputs as inputs"
        )
    return targets


def _reads_packed(module: nn.Module) -> bool:
    """Whether a LoRA layer in the place of ``module`` has its packed copy to multiply by."""
    return "_packed" in vars(module) and not isinstance(module, nn.Embedding)


def check_patterns(model: nn.Module, config: LoraConfig) -> None:
    """Refuse names, patterns and layer numbers that nothing in the model answers to.

    For an adapter that is to be trained, where they are slips. PEFT passes over them, and loading
    an adapter does so, too.

    Args:
        config: with target_modules given.

    Raises:
        UserError: one of them has no effect.
    """
    if config.trainable_token_indices is not None:
        raise UserError(
            "trainable_token_indices is read in adapters that PEFT trained, and not trained here; "
            "train the whole embedding with modules_to_save"
        )
    targets = find_targets(model, config)
    modules = {name: module for name, module in model.named_modules() if name}
    possible = [name for name, module in modules.items() if isinstance(module, KINDS)]
    for field, names in (("target_modules", possible), ("exclude_modules", list(modules))):
        wanted = getattr(config, field)
        for word in wanted if isinstance(wanted, list) else []:
            if not any(name_fits(name, [word]) for name in names):
                raise _no_match(model, field, word, names)
    numbers = config.layers_to_transform
    if numbers is not None and isinstance(config.target_modules, list):
        fitting = [name for name in possible if name_fits(name, config.target_modules)]
        there = {layer_number(name, config.layers_pattern) for name in fitting} - {None}
        for number in [numbers] if isinstance(numbers, int) else numbers:
            if number not in there:
                raise UserError(
                    f"layers_to_transform {number} is no layer with a target module; "
                    f"they are {min(there)} to {max(there)}"
                )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        used = {pattern_key(name, patterns) for name in targets}
        for pattern in patterns:
            if pattern in used:
                continue
            if any(pattern_key(name, [pattern]) for name in targets):
                raise UserError(
                    f"{field} {pattern!r} has no effect: patterns before it fit all its modules; "
                    "put it first"
                )
            raise UserError(
                f"{field} {pattern!r} fits none of the modules with LoRA; "
                f"{nearest(pattern, targets)}"
            )


def _no_match(model: nn.Module, field: str, wanted: list[str] | str, names) -> UserError:
    """`no_match`, or what there is to say of a head that is the embedding itself."""
    words = [wanted] if isinstance(wanted, str) else wanted
    if has_tied_head(model) and any(name_fits("lm_head", word.split(".")[-1:]) for word in words):
        return tied_head_error(model, f"{field} {wanted!r}")
    return no_match(field, wanted, names)


def has_tied_head(model: nn.Module) -> bool:
    """Whether the head of a language model is its embedding, and no module of its own."""
    head = getattr(model, "head_name", "lm_head")
    return getattr(model, "output_embedding", None) is not None and not hasattr(model, head)


def tied_head_error(model: nn.Module, what: str) -> UserError:
    """The error for something that is about the head of a model which has none of its own."""
    head = model.output_embedding
    embedding = next(name for name, var in model.named_parameters() if var is head)
    way = "leave it out"
    if hasattr(model.config, "tie_word_embeddings"):
        way += (
            ", or give the base model a head of its own (tie_word_embeddings: false in "
            "config.json, and a tensor lm_head.weight)"
        )
    return UserError(
        f"{what}: the output head of this model is tied to {embedding} and no module; {way}"
    )


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


def attach(model: nn.Module, config: LoraConfig) -> dict[str, LoRALayer | ModulesToSave]:
    """Replace the target modules by LoRA layers and wrap ``modules_to_save``.

    Returns:
        What was put into the model, by name.

    Raises:
        UserError: something cannot be made; the model is unchanged then.
    """
    made = {
        name: lora_layer(name, module, config)
        for name, module in find_targets(model, config).items()
    }
    head = getattr(model, "output_embedding", None)
    for wanted in config.modules_to_save or []:
        # PEFT compares the plain ends here: "norm" stands for "input_layernorm" too.
        possible = {
            name: module
            for name, module in model.named_modules()
            if name
            and _has_weights(module)
            and not is_inside(name, list(made))
            and not any(is_inside(other, [name]) for other in made)
        }
        found = {n: m for n, m in possible.items() if n.endswith(wanted)}
        outer = {n: m for n, m in found.items() if not is_inside(n, [f for f in found if f != n])}
        if not outer:
            if has_tied_head(model) and "lm_head".endswith(wanted):
                raise tied_head_error(model, f"modules_to_save {[wanted]!r}")
            raise no_match("modules_to_save", [wanted], possible)
        for name, module in outer.items():
            tied = isinstance(module, nn.Embedding) and module.weight is head
            made[name] = ModulesToSave(module, tied)
    for name, tokens in token_modules(model, config).items():
        if name in made:
            raise UserError(
                f"trainable_token_indices and target_modules or modules_to_save are both about "
                f"{name}; leave out one"
            )
        made[name] = TokenRows(dict(model.named_modules())[name], tokens)
    set_modules(model, made)
    return made


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
    _initialise(layer, config.init_lora_weights)
    layer.adapt(config.lora_variant)
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
    plain = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            plain[name] = module.to_base()
        elif isinstance(module, ModulesToSave):
            trained, original = module.modules_to_save, module.original_module
            plain[name] = trained if keep_trained_modules else original
    set_modules(model, plain)


def token_modules(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """The modules that ``trainable_token_indices`` is about, and the tokens of each.

    Raises:
        UserError: a name that fits none, or a token that there is not.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    modules = dict(model.named_modules())
    if isinstance(wanted, list):
        wanted = {model.family.embedding.removesuffix(".weight"): wanted}
    found = {}
    for end, tokens in wanted.items():
        field = f"trainable_token_indices {end!r}"
        names = [n for n, m in modules.items() if name_fits(n, [end]) and "weight" in vars(m)]
        if not names:
            raise _no_match(model, "trainable_token_indices", [end], modules)
        for name in names:
            size = modules[name].weight.shape[0]
            if tokens and max(tokens) >= size:
                raise UserError(f"{field}: there is no token {max(tokens)}; {name} has {size} rows")
            found[name] = list(tokens)
    return found


def _has_weights(module: nn.Module) -> bool:
    return any("weight" in vars(part) or part.parameters() for part in module.modules())


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of its name; none of them is inside another."""
    parents = dict(model.named_modules())
    for name, module in modules.items():
        path, _, last = name.rpartition(".")
        parent = parents[path]
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
        elif name == "weight" and hasattr(value, "unpacked"):  # kept in packed form alone
            value = value.unpacked()
        elif isinstance(value, nn.Module):
            value = _copy(value)
        elif name == "layers" and isinstance(module, nn.Sequential):
            value = type(value)((key, _copy(child)) for key, child in value.items())
        copy.__dict__[name] = value
    return copy
