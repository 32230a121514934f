"""Adapters in PEFT's form: keys, fused layers as block matrices, and the base they belong to.

A `MergedLinear` of g enabled blocks of rank r is the same as one PEFT layer of rank g * r whose B
is zero off the blocks, with alpha multiplied so that the scaling stays. So it is written that way,
and read back as a `MergedLinear` wherever B has that structure.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jlora.adapters.attach import find_targets, linear_shape
from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import pattern_value
from jlora.layers import Embedding, LoRALayer, MergedLinear
from jlora.system.errors import UserError
from jlora.system.runtime import nn

log = logging.getLogger("jlora.adapters")

PREFIX = "base_model.model."
# Enough of a tensor to tell two models apart, and little enough to hash in milliseconds.
HASHED_VALUES = 2**20


def to_peft_key(name: str, owner: object) -> str:
    """A parameter's name -> PEFT's key; ``owner`` is the module it belongs to."""
    module, _, last = name.rpartition(".")
    if last in ("lora_A", "lora_B"):
        if isinstance(owner, Embedding):
            return f"{PREFIX}{module}.lora_embedding_{last[-1]}"
        return f"{PREFIX}{name}.weight"
    if isinstance(owner, LoRALayer):
        return f"{PREFIX}{module}.base_layer.{last}"
    return PREFIX + name.replace(".modules_to_save.", ".")


def from_peft_key(key: str) -> str:
    """PEFT's key -> parameter name; keys that are none of PEFT's come back as they are."""
    name = key[len(PREFIX) :] if key.startswith(PREFIX) else key
    parts = name.split(".")
    # Files written without PEFT's own saving function still have the adapter's name in the keys.
    if len(parts) > 1 and parts[-1] == "default":
        parts.pop()
    elif len(parts) > 2 and parts[-2] == "default":
        del parts[-2]
    if parts[-1] == "weight" and parts[-2:-1] in (["lora_A"], ["lora_B"]):
        parts.pop()
    elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        parts[-1] = f"lora_{parts[-1][-1]}"
    return ".".join(part for part in parts if part not in ("base_layer", "modules_to_save"))


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


def peft_config(config: LoraConfig, layers: Mapping[str, LoRALayer]) -> LoraConfig:
    """The settings with which PEFT computes the same, fused layers counted as one."""
    if not any(isinstance(layer, MergedLinear) for layer in layers.values()):
        return config
    settings = {}
    for name, layer in layers.items():
        enabled = sum(layer.enable_lora) if isinstance(layer, MergedLinear) else 1
        settings[name] = (layer.r * enabled, _scaled(config, layer.lora_alpha, enabled))
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
        settings[name] = (r // enabled, _scaled(config, alpha, 1 / enabled))
    parts = {f"{name}.lora_B": part for name, (_, part) in fused.items()}
    return with_patterns(config, settings), {**tensors, **parts}


def _scaled(config: LoraConfig, alpha: float, factor: float) -> float:
    """Alpha for a rank that is ``factor`` times as large, so that the scaling stays."""
    alpha = alpha * (math.sqrt(factor) if config.use_rslora else factor)
    return int(alpha) if float(alpha).is_integer() else alpha


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


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another: its family, shapes, and hashes of a few weights."""
    parameters = dict(model.named_parameters())
    matrices = sorted(name for name, p in parameters.items() if len(p.shape) == 2)
    step = max(1, len(matrices) // 4)
    config = getattr(model, "config", None)
    return {
        "name": getattr(model, "name_or_path", None),
        "model_type": getattr(config, "model_type", type(model).__name__),
        "parameters": sum(int(np.prod(p.shape)) for p in parameters.values()),
        "tensors": {name: _describe_tensor(parameters[name]) for name in matrices[::step][:4]},
    }


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


def _describe_tensor(var) -> dict[str, Any]:
    values = var.float32().numpy()
    hashed = values.reshape(-1)[:HASHED_VALUES]
    return {
        "shape": list(values.shape),
        "dtype": str(var.dtype),
        "sha256": hashlib.sha256(hashed.tobytes()).hexdigest(),
        "sample": [float(v) for v in values.reshape(-1)[:: max(1, values.size // 8)][:8]],
    }


def check_base(recorded: Mapping[str, Any], model: nn.Module, where: str) -> None:
    """Raises: UserError: an adapter was made for another base model than ``model``."""
    parameters = dict(model.named_parameters())
    try:
        difference = _difference(recorded, model, parameters)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the record of the base model is damaged ({error!r}); "
            "remove jlora_adapter.json to load the adapter unchecked"
        ) from error
    if difference:
        name = getattr(model, "name_or_path", None) or type(model).__name__
        count = recorded.get("parameters")
        parameters_there = f"{count:,}" if isinstance(count, int) else "unknown"
        raise UserError(
            f"{where}: made for the base model {recorded.get('name') or 'without a name'} "
            f"({recorded.get('model_type')}, {parameters_there} parameters), "
            f"not for {name}: {difference}; load it on its own base, or insist with --force "
            "(force=True)"
        )


def _difference(recorded: Mapping[str, Any], model: nn.Module, parameters) -> str | None:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if recorded["model_type"] != model_type:
        return f"this one is of type {model_type}"
    for name, expected in recorded["tensors"].items():
        if name not in parameters:
            return f"this one has no {name}"
        if list(parameters[name].shape) != expected["shape"]:
            return f"{name} is {tuple(parameters[name].shape)} here"
        found = _describe_tensor(parameters[name])
        if found["dtype"] == expected["dtype"]:
            same = found["sha256"] == expected["sha256"]
        else:
            # The same weights stored in another type: equal up to bfloat16's rounding.
            scale = max(abs(value) for value in expected["sample"])
            same = np.allclose(found["sample"], expected["sample"], rtol=2**-7, atol=scale / 1000)
        if not same:
            return f"the weights of {name} differ"
    return None


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
