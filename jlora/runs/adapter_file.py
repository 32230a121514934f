"""What a command's model and adapter mean: a base, and an adapter in any of its forms on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.adapters import PartialModel, PeftModel, TunedModel, is_partial
from jlora.adapters.loralib import is_loralib
from jlora.runs.recipe import Recipe, load_recipe
from jlora.system.errors import UserError
from jlora.layers import set_trainable
from jlora.models.hub import load


def say(message: str) -> None:
    print(f"jlora: {message}", file=sys.stderr, flush=True)


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

    def check(self, folder: Path) -> None:
        """Whether the settings go with the form, before the base is loaded.

        Raises:
            UserError: a .pt file without lora_alpha, or a folder with settings of .pt files.
        """
        if is_loralib(folder):
            if self.lora_alpha is None:
                raise UserError(
                    f"{folder}: a .pt file does not say its lora_alpha; give --lora-alpha (32 in "
                    "microsoft/LoRA's GPT-2 runs)"
                )
        elif self.lora_alpha is not None or self.enable_lora is not None:
            raise UserError(
                f"{folder}: its adapter_config.json says lora_alpha and the blocks; leave out "
                "--lora-alpha and --enable-lora, which are for loralib's .pt files"
            )

    def attach(self, model: Any, folder: Path) -> TunedModel:
        """``model`` with the adapter in ``folder`` (see `run_of`), or in the .pt file.

        Raises:
            UserError: as `from_pretrained` of the two, and `PeftModel.from_loralib`.
        """
        if is_loralib(folder):
            return PeftModel.from_loralib(model, folder, self.lora_alpha, self.enable_lora)
        return load_tuned(model, folder, self.force)


def load_tuned(model: Any, folder: str | Path, force: bool = False) -> TunedModel:
    """``model`` with what a training wrote in it: an adapter, or weights of its own.

    Raises:
        UserError: as `PeftModel.from_pretrained` and `PartialModel.from_pretrained`.
    """
    kind = PartialModel if is_partial(folder) else PeftModel
    return kind.from_pretrained(model, folder, force=force)


def run_of(adapter: Path) -> tuple[Path, Recipe | None]:
    """The adapter folder and the recipe of its run, for a run folder or an adapter folder.

    The recipe knows which tokens stood round the completions in training; None where the adapter
    was made elsewhere.
    """
    if (adapter / "config.yaml").is_file() and not (adapter / "adapter_config.json").is_file():
        found = [adapter / name for name in ("best", "adapter") if (adapter / name).is_dir()]
        if not found:
            raise UserError(f"{adapter}: this run has no adapter yet; train it first")
        return found[0], load_recipe(adapter / "config.yaml")
    config = adapter.resolve().parent / "config.yaml"
    return adapter, load_recipe(config) if config.is_file() else None


def open_model(name: str | None, adapter: AdapterFile | None) -> tuple[Any, Recipe | None]:
    """The model, its adapter on it, and the recipe of the adapter's run, if it has one.

    Args:
        name: None: the model that the adapter's run was made with.

    Raises:
        UserError: no model is named, or model or adapter cannot be loaded.
    """
    folder, recipe = None, None
    if adapter:
        folder, recipe = run_of(adapter.path)
        adapter.check(folder)
    name = name or (recipe and recipe.model)
    if not name:
        raise UserError("no --model given, such as --model smollm2-135m")
    say(f"loading {name}")
    model = load(name)
    set_trainable(model, ())  # nothing is trained here, so the engine may pack every weight
    return (adapter.attach(model, folder) if adapter else model), recipe
