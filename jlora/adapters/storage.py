"""Adapters in PEFT's form: keys, and fused layers as block matrices.

A `MergedLinear` of g enabled blocks of rank r is the same as one PEFT layer of rank g * r whose B
is zero off the blocks, with alpha multiplied so that the scaling stays. So it is written that way,
and read back as a `MergedLinear` wherever B has that structure.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jlora.adapters.attach import TokenRows, find_targets, linear_shape
from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import pattern_value
from jlora.formats.names import is_lora_name
from jlora.layers import Embedding, LoRALayer, MergedLinear
from jlora.system.errors import UserError
from jlora.system.runtime import nn

log = logging.getLogger("jlora.adapters")

PREFIX = "base_model.model."


def to_peft_key(name: str, owner: object) -> str:
    """A parameter's name -> PEFT's key; ``owner`` is the module it belongs to."""
    module, _, last = name.rpartition(".")
    if isinstance(owner, LoRALayer) and last in owner.variant.parameters:
        return PREFIX + (f"{module}.lora_B.bias" if last == "lora_bias" else name)
    if last in ("lora_A", "lora_B"):
        if isinstance(owner, Embedding):
            return f"{PREFIX}{module}.lora_embedding_{last[-1]}"
        return f"{PREFIX}{name}.weight"
    if isinstance(owner, LoRALayer):
        return f"{PREFIX}{module}.base_layer.{last}"
    return PREFIX + name.replace(".modules_to_save.", ".")


def rows_name(module: str) -> str:
    """The name of a `TokenRows`' rows in PEFT's files, without the prefix."""
    return f"{module}.token_adapter.trainable_tokens_delta"


def from_peft_keys(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Tensors by PEFT's keys -> by parameter name.

    Raises:
        UserError: two keys mean one parameter.
    """
    result, keys = {}, {}
    for key, array in tensors.items():
        name = from_peft_key(key)
        # PEFT writes the bias of a module that is copied twice where biases are trained as well.
        copied = name in keys and "modules_to_save" in keys[name] + key
        if name in keys and not (copied and np.array_equal(tensors[keys[name]], array)):
            raise UserError(
                f"{source}: {keys[name]} and {key} are both {name}; take out one of them"
            )
        keys[name] = key
        # PEFT 0.2 kept the factor of a fused layer as a convolution of width 1.
        squeezed = name.endswith(".lora_B") and array.ndim == 3 and array.shape[-1] == 1
        result[name] = array[..., 0] if squeezed else array
    return result


def from_peft_key(key: str) -> str:
    """PEFT's key -> parameter name; keys that are none of PEFT's come back as they are.

    What DataParallel (``module.``) and torch.compile (``_orig_mod.``) put in front is taken off.
    """
    name = key.replace("_orig_mod.", "").removeprefix("module.")
    if name.startswith(PREFIX):
        name = name[len(PREFIX) :].removeprefix("module.")
    parts = name.split(".")
    # Files written without PEFT's own saving function still have the adapter's name in the keys.
    if len(parts) > 1 and parts[-1] == "default":
        parts.pop()
    elif len(parts) > 2 and parts[-2] == "default":
        del parts[-2]
    if parts[-1] == "weight" and parts[-2:-1] != [] and is_lora_name(parts[-2]):
        parts.pop()
    elif parts[-2:] == ["lora_B", "bias"]:
        parts[-2:] = ["lora_bias"]
    elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        parts[-1] = f"lora_{parts[-1][-1]}"
    return ".".join(part for part in parts if part not in ("base_layer", "modules_to_save"))


def peft_keys(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Tensors by whatever keys a PEFT wrote -> by those that PEFT 0.21 writes.

    Raises:
        UserError: as `from_peft_keys`.
    """
    tables = {from_peft_key(key) for key in tensors if "lora_embedding_" in key}
    found = {}
    for name, array in from_peft_keys(tensors, source).items():
        module, _, last = name.rpartition(".")
        if name in tables:
            found[f"{PREFIX}{module}.lora_embedding_{last[-1]}"] = array
        else:
            found[PREFIX + name + ".weight" * (last in ("lora_A", "lora_B"))] = array
    return found


def factor_of(key: str) -> tuple[str, str] | None:
    """PEFT's key of A or B -> the key with ``*`` for the letter, and the letter; None: another."""
    found = re.fullmatch(r"(.*\.lora_(?:embedding_)?)([AB])((?:\.weight)?)", key)
    return (f"{found[1]}*{found[3]}", found[2]) if found else None


def block_matrix(B: np.ndarray, enable_lora: list[bool], r: int) -> np.ndarray:
    """MergedLinear's B (block * enabled, r) -> PEFT's (out, r * enabled), zero off the blocks."""
    size = B.shape[0] // sum(enable_lora)
    full = np.zeros((size * len(enable_lora), r * sum(enable_lora)), B.dtype)
    blocks = [i for i, enabled in enumerate(enable_lora) if enabled]
    for place, block in enumerate(blocks):
        rows = slice(block * size, (block + 1) * size)
        full[rows, place * r : (place + 1) * r] = B[place * size : (place + 1) * size]
    return full


def from_block_matrix(full: np.ndarray, enable_lora: list[bool]) -> np.ndarray | None:
    """The inverse of `block_matrix`; None where something off the blocks is not zero."""
    enabled = sum(enable_lora)
    if enabled == 0 or full.shape[1] % enabled or full.shape[0] % len(enable_lora):
        return None
    size, r = full.shape[0] // len(enable_lora), full.shape[1] // enabled
    blocks = [i for i, on in enumerate(enable_lora) if on]
    parts = [
        full[block * size : (block + 1) * size, place * r : (place + 1) * r]
        for place, block in enumerate(blocks)
    ]
    B = np.concatenate(parts)
    return B if np.array_equal(block_matrix(B, enable_lora, r), full) else None


def find_blocks(full: np.ndarray, blocks: int) -> list[bool] | None:
    """The ``enable_lora`` that a PEFT B matrix was made from, or None if it has no blocks."""
    used = np.abs(full.reshape(blocks, -1, full.shape[1])).max(1) > 0  # (blocks, columns)
    if not (used.sum(0) == 1).all():
        return None
    runs = [(block, len(list(g))) for block, g in itertools.groupby(used.argmax(0))]
    order, lengths = [block for block, _ in runs], {length for _, length in runs}
    if order != sorted(set(order)) or len(lengths) != 1:
        return None
    return [block in order for block in range(blocks)]


def peft_form(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, np.ndarray]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Settings and tensors of the adapter on ``model`` -> as PEFT has them, by its keys."""
    modules = dict(model.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, LoRALayer)}
    found = {}
    for name, array in tensors.items():
        owner = modules[name.rpartition(".")[0]]
        if isinstance(owner, MergedLinear) and name.endswith("lora_B"):
            array = block_matrix(array, owner.enable_lora, owner.r)
        found[to_peft_key(name, owner)] = array
    for name, module in modules.items():
        if isinstance(module, TokenRows):
            found[PREFIX + rows_name(name)] = module.rows
    transposed = any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values())
    return replace(peft_config(config, layers), fan_in_fan_out=transposed), found


def peft_config(config: LoraConfig, layers: Mapping[str, LoRALayer]) -> LoraConfig:
    """The settings with which PEFT computes the same, fused layers counted as one."""
    if not any(isinstance(layer, MergedLinear) for layer in layers.values()):
        return config
    settings = {}
    for name, layer in layers.items():
        enabled = sum(layer.enable_lora) if isinstance(layer, MergedLinear) else 1
        r = layer.r * enabled
        settings[name] = (r, _scaled(config, layer.lora_alpha, layer.r, r))
    return replace(with_patterns(config, settings), enable_lora=None)


def native_config(
    model: nn.Module, config: LoraConfig, tensors: dict[str, np.ndarray], notes: Mapping[str, Any]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Settings and tensors as read -> with fused layers where B has the structure for it.

    Args:
        config: with target_modules given.
        tensors: by parameter names.
        notes: may hold ``enable_lora``, which is believed where the structure agrees.
    """
    targets = find_targets(model, config)
    hint = notes.get("enable_lora")
    if hint is not None and not (isinstance(hint, list) and all(type(h) is bool for h in hint)):
        raise UserError(
            f"jlora_adapter.json: enable_lora must be a list of true and false, not {hint!r}; "
            "remove the file to have it found out from the weights"
        )
    fused = {}
    for name, module in targets.items():
        B = tensors.get(f"{name}.lora_B")
        if isinstance(module, nn.Embedding) or B is None or B.ndim != 2:
            continue
        inputs, outputs = linear_shape(module)
        if outputs % inputs or outputs == inputs or B.shape[0] != outputs:
            continue
        enable_lora = hint or find_blocks(B, outputs // inputs)
        if not enable_lora or outputs != len(enable_lora) * inputs:
            continue
        part = from_block_matrix(B, enable_lora)
        if part is None:
            continue
        fused[name] = (enable_lora, part)
    patterns = {tuple(enable_lora) for enable_lora, _ in fused.values()}
    if len(patterns) != 1:
        return config, tensors
    enable_lora = [bool(flag) for flag in patterns.pop()]
    config = replace(config, enable_lora=enable_lora)
    widths = {n: linear_shape(m) for n, m in targets.items() if not isinstance(m, nn.Embedding)}
    alike = {n for n, (inputs, outputs) in widths.items() if outputs == len(enable_lora) * inputs}
    if alike != set(fused):
        return replace(config, enable_lora=None), tensors
    settings = {}
    for name in targets:
        enabled = sum(enable_lora) if name in fused else 1
        r = pattern_value(name, config.rank_pattern, config.r)
        alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
        settings[name] = (r // enabled, _scaled(config, alpha, r, r // enabled))
    parts = {f"{name}.lora_B": part for name, (_, part) in fused.items()}
    return with_patterns(config, settings), {**tensors, **parts}


def _scaled(config: LoraConfig, alpha: float, r: int, new_r: int) -> float:
    """Alpha for another rank, so that the scaling stays."""
    if new_r != r:
        alpha = alpha * config.scaling(r, 1.0) / config.scaling(new_r, 1.0)
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def with_patterns(config: LoraConfig, settings: Mapping[str, tuple[int, float]]) -> LoraConfig:
    """``config`` with r and alpha of each module: the commonest pair, and patterns for the rest."""
    (r, alpha), _ = Counter(settings.values()).most_common(1)[0]
    return replace(
        config,
        r=r,
        lora_alpha=alpha,
        rank_pattern={name: pair[0] for name, pair in settings.items() if pair[0] != r},
        alpha_pattern={name: pair[1] for name, pair in settings.items() if pair[1] != alpha},
    )


def check_ranks(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], model: nn.Module, source: str
) -> None:
    """Refuse ranks beyond any size in the file, before memory is filled with layers of them.

    Raises:
        UserError: a target's rank is larger than every dimension of every tensor.
    """
    largest = max((size for array in tensors.values() for size in array.shape), default=0)
    for name in find_targets(model, config):
        rank = pattern_value(name, config.rank_pattern, config.r)
        if rank > largest:
            raise UserError(
                f"{source}: rank {rank} for {name}, and no tensor of the adapter has a size above "
                f"{largest}; take the settings and the weights of one adapter"
            )


def without_head(
    config: LoraConfig, tensors: dict[str, np.ndarray], model: nn.Module, source: str
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Leave out the classifier's head, which a language model has no place for, and say so."""
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return config, tensors
    there = {name.partition(".")[0] for name, _ in model.named_modules()}
    heads = {"score", "classifier"} - there
    left = sorted(name for name in tensors if name.partition(".")[0] in heads)
    if left:
        log.warning(
            "%s is a classifier's adapter: %s left out, since the model has no such head",
            source,
            ", ".join(left),
        )
    kept = [name for name in config.modules_to_save or [] if name not in heads]
    # What is left is a language model's adapter; PEFT would look for the head by the task type.
    config = replace(config, modules_to_save=kept or None, task_type="CAUSAL_LM")
    return config, {name: array for name, array in tensors.items() if name not in left}


def check_tensors(
    what: str, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]
) -> None:
    """Raises: UserError: lists what is missing, unexpected or of another shape."""
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
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
