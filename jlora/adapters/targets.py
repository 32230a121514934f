"""Which modules a `LoraConfig` means: PEFT's rules for names, patterns and layer numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

from jlora.adapters.config import LoraConfig
from jlora.system.errors import UserError
from jlora.system.runtime import nn

Value = TypeVar("Value")


def default_targets(model: nn.Module) -> list[str]:
    """PEFT's choice where target_modules is not given.

    Raises:
        UserError: no usual choice is known for this family.
    """
    family = getattr(model, "family", None)
    if family is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise UserError(
            f"no default target_modules for models of type {model_type!r}; set target_modules"
        )
    return list(family.targets)


def name_fits(name: str, wanted: list[str] | str, field: str = "exclude_modules") -> bool:
    """Whether a module's name is, or ends with, one of a list, or matches an expression whole."""
    if isinstance(wanted, str):
        return compiled(wanted, field).fullmatch(name) is not None
    return any(name == target or name.endswith(f".{target}") for target in wanted)


def is_target(name: str, config: LoraConfig) -> bool:
    """Whether ``config`` (its target_modules given) puts LoRA on the module called ``name``.

    The rules are those of PEFT 0.21's ``check_target_module_exists``, down to its corners: names in
    modules_to_save are expressions here, and a name that stands whole in target_modules counts in
    every layer.
    """
    if is_excluded(name, config) or not name_fits(name, config.target_modules, "target_modules"):
        return False
    layers = config.layers_to_transform
    if layers is None or layers == [] or name in config.target_modules:
        return True
    number = layer_number(name, config.layers_pattern)
    return number in ([layers] if isinstance(layers, int) else layers)


def is_excluded(name: str, config: LoraConfig) -> bool:
    """Whether a module gets no LoRA whatever target_modules says."""
    if config.exclude_modules and name_fits(name, config.exclude_modules):
        return True
    saved = config.modules_to_save or []
    return any(
        compiled(rf"(^|.*\.){module}($|\..*)", "modules_to_save").match(name) for module in saved
    )


def is_inside(name: str, modules: list[str]) -> bool:
    """Whether a module is one of those that ``modules`` names, or a part of one."""
    return any(f".{module}." in f".{name}." for module in modules)


def layer_number(name: str, layers_pattern: list[str] | str | None) -> int | None:
    """``transformer.h.3.attn.c_attn`` -> 3; None where the name has no layer number.

    Without a pattern the list of layers may have any name but must stand inside something, as in
    PEFT: ``h.3.attn.c_attn`` has no number.
    """
    if not layers_pattern:
        places = [r".*?\.[^.]*"]
    else:
        patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        places = [rf"(?:^|.*?\.){pattern}" for pattern in patterns]
    for place in places:
        found = compiled(rf"{place}\.(?P<number>\d+)\.", "layers_pattern").match(name)
        if found:
            # An expression such as "a|b" can match without coming to the number.
            return int(found["number"]) if found["number"] else None
    return None


def pattern_key(name: str, patterns: Iterable[str]) -> str | None:
    """The key of rank_pattern or alpha_pattern that counts for a module: the first that fits."""
    for pattern in patterns:
        if compiled(rf"(.*\.)?({pattern})", "rank_pattern or alpha_pattern").fullmatch(name):
            return pattern
    return None


def pattern_value(name: str, patterns: dict[str, Value], default: Value) -> Value:
    """The entry of rank_pattern or alpha_pattern for a module."""
    key = pattern_key(name, patterns)
    return default if key is None else patterns[key]


def compiled(pattern: str, field: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def no_match(field: str, wanted: list[str] | str, names: Iterable[str]) -> UserError:
    """The error for names that fit no module."""
    return UserError(
        f"{field} {wanted!r} fits no module of the model that can take it; {nearest(wanted, names)}"
    )


def nearest(wanted: list[str] | str, names: Iterable[str]) -> str:
    """The module names nearest to some words, or all there are."""
    words = [wanted] if isinstance(wanted, str) else list(wanted)
    names = [name for name in names if name]
    near = []
    for word in words:
        word = word.replace("\\", "")
        near += difflib.get_close_matches(word, _ends(names, word.count(".") + 1), 3, 0.5)
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(_ends(names, 1))
    return f"{'nearest' if near else 'there are'}: {listed}"


def _ends(names: list[str], parts: int) -> list[str]:
    """The last parts of names, without plain layer numbers."""
    ends = {".".join(name.split(".")[-parts:]) for name in names}
    return sorted(end for end in ends if not end.isdigit())
