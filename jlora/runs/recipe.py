"""Recipes: one YAML file says everything about a run; these dataclasses say what it may say."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jlora.adapters import METHODS, LoraConfig
from jlora.decoding.beam import BeamConfig
from jlora.engine import PRECISIONS
from jlora.runs.data_config import DataConfig, rename_settings
from jlora.system.console import say, warn
from jlora.system.errors import UserError, one_line
from jlora.system.files import read_text
from jlora.system.settings import check_choice, check_least
from jlora.training.loggers import LOGGERS
from jlora.training.loop import TrainConfig


@dataclass(frozen=True)
class DecodeConfig(BeamConfig):
    """How the test inputs are answered."""

    eos_token_ids: list[int] | None = None  # None: the end token of training
    adapter: str = "best"  # of the validations; or "last"

    def __post_init__(self):
        super().__post_init__()
        check_choice("decode.adapter", self.adapter, ("best", "last"))


@dataclass
class Recipe:
    """A whole run."""

    model: str
    # lora, or what the paper compares with: full (everything), bitfit (biases), top-layers
    method: str = "lora"
    top_layers: int = 2  # blocks that top-layers trains
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    # plain, fp32, bf16, int8, int8-both, int4; auto: the fastest this machine does well
    precision: str = "auto"
    checkpoint_activations: bool = False  # less memory in training, a third more time
    score_before: bool = False  # also score the untouched model on the test inputs
    log: list[str] = field(default_factory=list)  # more loggers: wandb, tensorboard, swanlab

    def __post_init__(self):
        """Raises UserError for a value that makes no sense."""
        if not self.model.strip():
            raise UserError("model is empty; name one, such as smollm2-135m")
        check_choice("method", self.method, ("lora", *METHODS))
        check_least(self, 1, "top_layers")
        check_precision(self.precision)
        if self.checkpoint_activations and self.precision in ("plain", "fp32"):
            raise UserError(
                "checkpoint_activations works with precision bf16 or int8, not with "
                f"{self.precision}"
            )
        for name in self.log:
            check_choice("log", name, LOGGERS)


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with jlora.

    Raises:
        UserError: there is none; shows the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = importlib.resources.files("jlora.runs") / "recipes"
    names = sorted(p.name[: -len(".yaml")] for p in folder.iterdir() if p.name.endswith(".yaml"))
    wanted = path.name[: -len(path.suffix)] if path.suffix in (".yaml", ".yml") else path.name
    if wanted in names and path.parent.name in ("", "recipes"):
        return Path(str(folder / f"{wanted}.yaml"))
    near = difflib.get_close_matches(wanted, names, n=2, cutoff=0.4) or names
    raise UserError(f"no recipe {name}: no such file; jlora comes with {', '.join(near)}")


def find_sweep(name: str) -> Path:
    """The file of a sweep's cases: a path, or the name of one that comes with jlora.

    Raises:
        UserError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(importlib.resources.files("jlora.runs") / "recipes" / "sweeps"))
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"no cases {name}: no such file; jlora comes with {', '.join(names)}")
    return folder / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """YAML with snares removed: 1e-3 is a number, a key may not stand twice, no aliases.

    A few lines of lists of aliases of lists are larger than any memory once they are written out.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "an alias; write the value again", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            found = self.construct_object(key)
            if found in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there twice", key.start_mark
                )
            seen.add(found)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as it was."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str, lines: bool = True) -> Any:
    """A YAML text by `_Loader`; ``lines``: whether errors name a line of ``source``.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark and lines else source
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{where}: not YAML ({one_line(reason)}); fix it") from error
    except (ValueError, RecursionError) as error:  # an impossible date, say
        raise UserError(f"{source}: not YAML ({one_line(error)}); put texts in quotes") from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply ``key.path=value`` overrides, whose values are YAML.

    Raises:
        UserError: not YAML, an unknown setting (with the nearest name), or a value of a wrong kind.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a YAML mapping, such as `model: smollm2-135m`")
    trainer = trainer_of(values)
    if trainer is not None:
        raise UserError(
            f"{path}: this looks like a file of {trainer}, whose settings have other names here; "
            "write a recipe (docs/recipes.md), or begin with `jlora finetune --model MODEL --data "
            "FOLDER`"
        )
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, f"{path} with the options given" if overrides else str(path))


#: Settings by which a file of another trainer is known.
TRAINERS = {
    "mlx-lm": {
        "lora_parameters", "fine_tune_type", "iters", "adapter_path", "num_layers", "val_batches",
        "steps_per_report", "steps_per_eval", "grad_checkpoint", "mask_prompt", "lora_layers",
        "max_seq_length", "save_every",
    },
    "Axolotl": {
        "base_model", "datasets", "adapter", "sequence_len", "micro_batch_size", "lora_r",
        "lora_target_modules", "lora_target_linear", "val_set_size", "num_epochs",
    },
    "LLaMA-Factory": {
        "model_name_or_path", "stage", "do_train", "finetuning_type", "template", "cutoff_len",
        "lora_rank", "lora_target", "dataset_dir", "overwrite_output_dir",
    },
    "LitGPT": {"checkpoint_dir", "lora_query", "lora_key", "lora_value", "lora_r", "lora_head"},
    "torchtune": {"tokenizer", "checkpointer", "optimizer", "lr_scheduler", "lora_attn_modules"},
}  # fmt: skip


def trainer_of(values: dict[str, Any]) -> str | None:
    """Whose file a mapping of settings looks like, and by what; None: it may be jlora's."""
    found = {
        trainer: [str(name) for name in values if name in names]
        for trainer, names in TRAINERS.items()
    }
    if isinstance(values.get("data"), str) and isinstance(values.get("train", True), bool):
        found["mlx-lm"].insert(0, "data: a path")
    if isinstance(values.get("train"), bool):
        found["mlx-lm"].insert(0, f"train: {str(values['train']).lower()}")
    for name, value in values.items():
        if isinstance(value, dict) and "_component_" in value:  # a class path
            found["torchtune"].append(f"{name}._component_")
    trainer, marks = max(found.items(), key=lambda item: len(item[1]))
    if len(marks) >= 2 or isinstance(values.get("train"), bool):
        return f"{trainer} ({', '.join(marks[:3])})"
    return None


def load_run_recipe(path: Path) -> Recipe | None:
    """The recipe of a finished run, for commands that go on from its adapter.

    Settings that this version does not know are left out with a warning, and so are ``lora`` and
    ``train`` where their values are no longer taken: the adapter is made, and only ``model``,
    ``data`` and ``decode`` still matter.

    Returns:
        None where the file is another program's, which a line says.

    Raises:
        UserError: one of the groups that matter makes no sense.
    """
    try:
        values = parse_yaml(read_text(path), str(path))
    except UserError:
        values = None
    groups = ("data", "lora", "train", "decode")  # jlora writes all of them
    if not isinstance(values, dict) or not (
        isinstance(values.get("model"), str)
        and all(isinstance(values.get(name), dict) for name in groups)
    ):
        say(f"{path} is not of a run of jlora and is left alone")
        return None
    unknown: list[str] = []
    values = _known(values, Recipe, "", unknown)
    if unknown:
        warn(
            f"{path}: this version of jlora does not know {', '.join(unknown)}; the adapter is "
            "used without"
        )
    try:
        return make_recipe(values, str(path))
    except UserError:
        kept = {name: values[name] for name in ("model", "data", "decode")}
        recipe = make_recipe(kept, str(path))
        warn(f"{path}: settings of the training that are no longer taken are left out")
        return recipe


def _known(values: dict[str, Any], kind: type, path: str, unknown: list[str]) -> dict[str, Any]:
    """``values`` without the settings that ``kind`` lacks; their names go to ``unknown``."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    kept = {}
    for name, value in values.items():
        if name not in fields:
            unknown.append(f"{path}{name}")
            continue
        group = fields[name].default_factory
        if dataclasses.is_dataclass(group) and isinstance(value, dict):
            value = _known(value, group, f"{path}{name}.", unknown)
        kept[name] = value
    return kept


def differences(here: Recipe, there: Recipe) -> list[str]:
    """The settings in which two recipes differ, as ``train.steps (5, and 1200 there)``."""

    def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            # Patterns are settings too, however many names are in them.
            group = isinstance(value, dict) and name not in ("rank_pattern", "alpha_pattern")
            found.update(flat(value, f"{path}{name}.") if group else {path + name: value})
        return found

    ours, theirs = flat(dataclasses.asdict(here)), flat(dataclasses.asdict(there))
    return [
        f"{name} ({ours[name]!r}, and {theirs[name]!r} there)"
        for name in ours
        if ours[name] != theirs[name]
    ]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put ``a.b=value`` into nested dicts.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"--set {override}: write KEY=VALUE, such as train.steps=100")
    value = parse_yaml(text, f"--set {override}", lines=False)
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(
                f"--set {override}: {parent} is one value and has no settings in it; "
                f"write {parent}=VALUE"
            )
    values[last] = value


def make_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Check nested dicts against the dataclasses.

    Args:
        values: as YAML gives them.
        source: what to call them in an error, usually the file's path.

    Raises:
        UserError: an unknown setting (with the nearest name), a value of a wrong kind, or one that
            makes no sense: all that can be known before anything is loaded.
    """
    import pydantic

    values = _check_names(rename_settings(values, source), Recipe, "", source)
    if values.get("model") is None:
        raise UserError(f"{source}: no model given; add one, such as `model: smollm2-135m`")
    try:
        return pydantic.TypeAdapter(Recipe).validate_python(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_pydantic_message(error, values)}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def changes_of(overrides: Sequence[str], known: Sequence[str], task: str) -> dict[str, Any]:
    """What ``data.NAME=VALUE`` change of the settings of data that ``task`` reads.

    Args:
        known: the names that count.

    Raises:
        UserError: another name, or as `apply_override` and `make_recipe`.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    given = rename_settings(values, "--set").get("data")
    if values and not (
        isinstance(given, dict) and set(values) == {"data"} and {*given} <= {*known}
    ):
        raise UserError(
            f"--set {overrides[0]}: what can be set here is data.NAME=VALUE, with NAME one of "
            f"{', '.join(known)}"
        )
    data = {"task": task, **(given or {})}
    made = make_recipe({"model": "-", "data": data}, "--set").data
    return {name: getattr(made, name) for name in given or {}}


def check_precision(precision: str) -> None:
    """Raises UserError for a precision that there is not."""
    check_choice("precision", precision, ("auto", *PRECISIONS))


def _check_names(values: Any, kind: type, path: str, source: str) -> dict[str, Any]:
    """Refuse unknown settings; gives ``values`` back without groups that are left empty."""
    if not isinstance(values, dict):
        name = path[:-1]
        raise UserError(f"{source}: {name} is a group of settings; write {name}.NAME=VALUE")
    known = {item.name: item for item in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{source}: unknown setting {path}{name}; {hint}")
        group = known[name].default_factory
        if dataclasses.is_dataclass(group):
            if value is None:  # every line of the group is commented out
                continue
            value = _check_names(value, group, f"{path}{name}.", source)
        elif isinstance(value, bool) and "bool" not in str(known[name].type):
            # pydantic would make a 1 of it, and YAML makes true of yes and on.
            raise UserError(f"{source}: {path}{name} is {value}; give a value, not true or false")
        checked[name] = value
    return checked


def _pydantic_message(error: Any, values: dict[str, Any]) -> str:
    """``train.steps is 'many': should be a valid integer``, for the first few settings."""
    problems: dict[str, str] = {}
    for item in error.errors():
        # The place goes on with the kinds of a union; what is in `values` is the setting.
        names, found = [], values
        for part in item["loc"]:
            if isinstance(found, dict) and part in found:
                names, found = [*names, str(part)], found[part]
            else:
                break
        name = ".".join(names)
        rule = one_line(item["msg"]).replace("Input should", "should")
        if name in problems:
            problems[name] += f", or {rule}"
        else:
            problems[name] = f"{name} is {one_line(repr(found))[:60]}: {rule}"
    return "; ".join(list(problems.values())[:3])


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every setting in it, defaults included."""
    values = dataclasses.asdict(recipe)
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029\ufeff]", text):  # PyYAML reads these back as something else
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
    return text
