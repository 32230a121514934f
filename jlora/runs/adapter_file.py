"""The base model and the adapter that a command names, the adapter in any of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jlora.adapters import PartialModel, PeftModel, TunedModel, is_partial
from jlora.adapters.loralib import is_loralib
from jlora.data.pull_models import NAME
from jlora.formats.peft_file import CONFIG, check_peft
from jlora.layers import set_trainable
from jlora.models.hub import find_local, load
from jlora.runs.recipe import Recipe, load_run_recipe
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.files import recover_directory
from jlora.system.json_files import read_object

NAMED_BASE = "base_model_name_or_path"  # of PEFT's settings


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on the disk.

    Attributes:
        path: a run folder, a PEFT folder, or loralib's .pt file.
        lora_alpha, enable_lora: what a .pt file does not say, see `PeftModel.from_loralib`.
        force: take a folder although it was made for another base model.
    """

    path: Path
    lora_alpha: float | None = None
    enable_lora: Sequence[bool] | None = None
    force: bool = False

    @cached_property
    def _found(self) -> tuple[Path, Recipe | None]:
        return run_of(self.path)

    @property
    def folder(self) -> Path:
        """The adapter folder (of a run, the one that its recipe decodes with), or the .pt file."""
        return self._found[0]

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the adapter's run; None where the adapter was made elsewhere."""
        return self._found[1]

    @cached_property
    def base(self) -> str | None:
        """The base model by the run's recipe, or else by PEFT's settings (said once); None: none.

        Raises:
            UserError: the settings name a path that is not there.
        """
        if self.recipe is not None:
            return self.recipe.model
        path = self.folder / CONFIG
        named = read_object(path, "get the file anew").get(NAMED_BASE) if path.is_file() else None
        if not named or not isinstance(named, str):
            return None
        if find_local(named) is None and not NAME.fullmatch(named):
            raise UserError(
                f"no --model given, and {path} names {named!r} as the base model, which is not "
                "here; give --model"
            )
        say(f"{path} names {named} as the base model, which is taken; --model takes another")
        return named

    @property
    def of_task(self) -> bool:
        """Whether it was trained for a task, and not to talk; .pt files are microsoft/LoRA's."""
        if self.recipe is not None:
            return self.recipe.data.task != "chat"
        return is_loralib(self.folder)

    def check(self) -> None:
        """Check that the adapter is there and that the settings go with its form.

        Called before the base model is loaded.

        Raises:
            UserError: no such file or folder, a .pt file without lora_alpha, or a folder with
                settings of .pt files.
        """
        folder = self.folder
        if is_loralib(folder):
            if self.lora_alpha is None:
                raise UserError(
                    f"{folder}: a .pt file does not say its lora_alpha; give --lora-alpha (32 in "
                    "microsoft/LoRA's GPT-2 runs)"
                )
            if not folder.is_file():
                raise UserError(f"cannot read {folder}: no such file; check the path")
        elif self.lora_alpha is not None or self.enable_lora is not None:
            raise UserError(
                f"{folder}: its adapter_config.json says lora_alpha and the blocks; leave out "
                "--lora-alpha and --enable-lora, which are for loralib's .pt files"
            )
        elif not is_partial(folder):
            check_peft(folder)

    def attach(self, model: Any) -> TunedModel:
        """``model`` with the adapter on it.

        Raises:
            UserError: as `load_tuned` and `PeftModel.from_loralib`.
        """
        if is_loralib(self.folder):
            return PeftModel.from_loralib(model, self.folder, self.lora_alpha, self.enable_lora)
        return load_tuned(model, self.folder, self.force)

    def add_to(self, model: PeftModel, name: str) -> None:
        """Load the adapter beside those that ``model`` has, as ``name``; `set_adapter` puts it on.

        Raises:
            UserError: as `PeftModel.load_adapter`; a .pt file or weights of the base itself (full
                fine-tuning, BitFit, top layers) cannot stand beside others.
        """
        if is_loralib(self.folder) or is_partial(self.folder):
            kind = "a .pt file" if is_loralib(self.folder) else "a change of the base's own weights"
            raise UserError(
                f"{self.folder} is {kind}, which cannot stand beside other adapters; open it alone"
                + (", or `jlora convert` it to a folder" if is_loralib(self.folder) else "")
            )
        model.load_adapter(self.folder, name, force=self.force)


def load_tuned(model: Any, folder: str | Path, force: bool = False) -> TunedModel:
    """``model`` with what a training wrote in it: an adapter, or weights of its own.

    Raises:
        UserError: as `PeftModel.from_pretrained` and `PartialModel.from_pretrained`.
    """
    kind = PartialModel if is_partial(folder) else PeftModel
    return kind.from_pretrained(model, folder, force=force)


def tuned_folder(run: Path, recipe: Recipe) -> Path | None:
    """The folder of a run that decoding takes: ``best``, or ``adapter`` with the last one.

    ``decode.adapter`` of the recipe says which; the other one where that is missing, and None where
    the run has none yet.
    """
    for name in ("adapter", "best"):
        recover_directory(run / name)
    names = ("adapter", "best") if recipe.decode.adapter == "last" else ("best", "adapter")
    return next((run / name for name in names if (run / name).is_dir()), None)


def run_of(adapter: Path) -> tuple[Path, Recipe | None]:
    """The adapter folder and the recipe of its run, for a run folder or an adapter folder.

    The recipe knows which tokens stood round the completions in training; None where the adapter
    was made elsewhere.
    """
    config = adapter / "config.yaml"
    if config.is_file() and not (adapter / "adapter_config.json").is_file():
        recipe = load_run_recipe(config)
        if recipe is not None:
            folder = tuned_folder(adapter, recipe)
            if folder is None:
                raise UserError(f"{adapter}: this run has no adapter yet; train it first")
            return folder, recipe
    config = adapter.resolve().parent / "config.yaml"
    return adapter, load_run_recipe(config) if config.is_file() else None


def base_name(name: str | None, adapter: AdapterFile | None) -> str:
    """The name of the base model, None being what the adapter names; the adapter is checked.

    Raises:
        UserError: no model is named, or the adapter cannot be loaded (see `AdapterFile.check`).
    """
    if adapter:
        adapter.check()
    name = name or (adapter and adapter.base)
    if not name:
        raise UserError("no --model given, such as --model smollm2-135m")
    return name


def switchable(model: Any) -> PeftModel:
    """An opened model as one that takes further adapters (`AdapterFile.add_to`).

    Its weights are not loaded or packed again: an adapter can come before or after
    `engine.prepare`, and one model with several adapters serves them all by `set_adapter`.

    Args:
        model: of `open_model`, with an adapter, which is then called "default", or without.

    Raises:
        UserError: a training changed the base's own weights (full fine-tuning, BitFit, top layers).
    """
    if isinstance(model, PeftModel):
        return model
    if isinstance(model, TunedModel):
        raise UserError(
            "the model is tuned in its own weights, on which no adapter goes; open the base model"
        )
    return PeftModel(model)


def open_model(name: str | None, adapter: AdapterFile | None) -> Any:
    """The model, with its adapter on it if there is one; nothing in it is trained.

    Args:
        name: None: the model that the adapter was made with, see `AdapterFile.base`.

    Raises:
        UserError: no model is named, or model or adapter cannot be loaded.
    """
    name = base_name(name, adapter)
    say(f"loading {name}")
    model = load(name)
    set_trainable(model, ())  # so the engine may pack every weight
    return adapter.attach(model) if adapter else model
