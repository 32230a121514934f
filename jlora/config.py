"""Recipes: one YAML file says everything about a run; these dataclasses say what it may say."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jlora.adapters import LoraConfig
from jlora.errors import UserError
from jlora.files import read_text
from jlora.train import TrainConfig


@dataclass
class DataConfig:
    """Which dataset, and how its texts become tokens."""

    task: str = "e2e"
    folder: str | None = None  # a folder with the splits; None: the usual places
    train: str | None = None  # a file instead of the folder's training split
    valid: str | None = None
    test: str | None = None
    separator_id: int | None = None  # token after the prompt; None: the tokenizer's end token
    end_id: int | None = None  # token after the completion; None: the tokenizer's end token
    train_limit: int | None = None  # only the first so many examples
    valid_stride: int = 1  # every n-th validation example, from the first
    test_limit: int | None = None  # only so many test inputs, evenly spaced


@dataclass
class DecodeConfig:
    """How the test inputs are answered; see `jlora.beam.BeamConfig`."""

    adapter: str = "best"  # of the validations; or "last"
    num_beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64
    min_length: int = 0
    repetition_penalty: float = 1.0
    batch_size: int = 16
    rank_up_to: float | None = None
    eos_token_ids: list[int] | None = None  # None: the end token of training


@dataclass
class Recipe:
    """A whole run."""

    model: str
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    precision: str = "auto"  # plain, fp32, bf16; auto: the fastest this machine does well
    score_before: bool = False  # also score the untouched model on the test inputs
    log: list[str] = field(default_factory=list)  # more loggers: wandb


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with jlora.

    Raises:
        UserError: there is none; shows the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = importlib.resources.files("jlora") / "recipes"
    names = sorted(p.name[: -len(".yaml")] for p in folder.iterdir() if p.name.endswith(".yaml"))
    wanted = path.name[: -len(path.suffix)] if path.suffix in (".yaml", ".yml") else path.name
    if wanted in names and path.parent.name in ("", "recipes"):
        return Path(str(folder / f"{wanted}.yaml"))
    near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.4) or names
    raise UserError(f"no recipe {name}: no such file; jlora comes with {', '.join(near)}")


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides, whose values are YAML.

    Raises:
        UserError: not YAML, an unknown setting (with the nearest name), or a value of a wrong kind.
    """
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a YAML mapping, such as `model: smollm2-135m`")
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put ``a.b=value`` into nested dicts.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write key=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {parent} is one value, not a group of settings")
    values[last] = value


def make_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Check nested dicts against the dataclasses.

    Raises:
        UserError: an unknown setting (with the nearest name), or a value of a wrong kind.
    """
    import pydantic

    _check_names(values, Recipe, "", source)
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_python(values)
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        ]
        raise UserError(f"{source}: {'; '.join(problems[:3])}") from error
    recipe.train.check()
    if recipe.decode.adapter not in ("best", "last"):
        raise UserError(
            f"{source}: decode.adapter {recipe.decode.adapter!r} is not one of best, last"
        )
    if recipe.data.valid_stride < 1:
        raise UserError(f"{source}: data.valid_stride must be at least 1")
    for name in ("train_limit", "test_limit"):
        limit = getattr(recipe.data, name)
        if limit is not None and limit < 1:
            raise UserError(f"{source}: data.{name} must be at least 1, or null for all")
    return recipe


def _check_names(values: Any, kind: type, path: str, source: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {path[:-1]} is a group of settings, not one value")
    known = {item.name: item for item in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{source}: unknown setting {path}{name}; {hint}")
        group = known[name].default_factory
        if dataclasses.is_dataclass(group):
            _check_names(value, group, f"{path}{name}.", source)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting in it, defaults included."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
