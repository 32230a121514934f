"""Which modules a `LoraConfig` means: PEFT's rules for names, patterns and layer numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

from jlora.adapters.config import LoraConfig
from jlora.errors import UserError

# PEFT's choice where target_modules is not given.
DEFAULT_TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
}

Value = TypeVar("Value")


def default_targets(model_type: str | None) -> list[str]:
    """Raises: UserError: no usual choice is known for this family."""
    if model_type not in DEFAULT_TARGETS:
        raise UserError(
            f"no default target_modules for models of type {model_type!r}; set target_modules"
        )
    return list(DEFAULT_TARGETS[model_type])


def name_fits(name: str, wanted: list[str] | str) -> bool:
    """Whether a module's name is, or ends with, one of a list, or matches an expression whole."""
    if isinstance(wanted, str):
        return compiled(wanted, "target_modules").fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def is_target(name: str, config: LoraConfig) -> bool:
    """Whether ``config`` (its target_modules given) puts LoRA on the module called ``name``."""
    if config.exclude_modules and name_fits(name, config.exclude_modules):
        return False
    if config.modules_to_save and is_inside(name, config.modules_to_save):
        return False
    if not name_fits(name, config.target_modules):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == [] or name in config.target_modules:
        return True
    number = layer_number(name, config.layers_pattern)
    return number in ([layers] if isinstance(layers, int) else layers)


def is_inside(name: str, modules: list[str]) -> bool:
    """Whether a module is one of those that ``modules`` names, or a part of one."""
    return any(f".{module}." in f".{name}." for module in modules)


def layer_number(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """``transformer.h.3.attn.c_attn`` -> 3; None where the name has no layer number."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        found = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def pattern_value(name: str, patterns: dict[str, Value], default: Value) -> Value:
    """The entry of rank_pattern or alpha_pattern for a module: the first key that fits."""
    for pattern, value in patterns.items():
        if compiled(rf"(.*\.)?({pattern})", "rank_pattern or alpha_pattern").fullmatch(name):
            return value
    return default


def compiled(pattern: str, field: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def no_match(field: str, wanted: list[str] | str, names: Iterable[str]) -> UserError:
    """The error for names that fit no module, with the nearest ones there are."""
    ends = sorted({name.rpartition(".")[2] for name in names if name})
    ends = [end for end in ends if not end.isdigit()]
    words = [wanted] if isinstance(wanted, str) else list(wanted)
    near = [n for w in words for n in difflib.get_close_matches(w.rpartition(".")[2], ends, 3, 0.5)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(ends)
    return UserError(
        f"{field} {wanted!r} fits no module of the model that can take it; "
        f"{'nearest' if near else 'there are'}: {listed}"
    )
