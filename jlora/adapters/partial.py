"""The other columns of the paper's tables: full fine-tuning, BitFit, the top layers.

Each trains some of the model's own parameters and adds none, but for BitFit's biases where a layer
has none. What was trained is kept as ``tuned.safetensors`` with ``tuned.json`` beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from jlora.adapters import base_model
from jlora.adapters.tuned import TunedModel
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, read_text, write_text
from jlora.system.runtime import jt, nn

METHODS = ("full", "bitfit", "top-layers")
DESCRIPTION = "tuned.json"
TENSORS = "tuned.safetensors"
#: A parameter of transformer block number n, in GPT-2's names or Llama's.
BLOCK = re.compile(r"(?:^|\.)(?:h|layers)\.(\d+)\.")


class PartialModel(TunedModel):
    """A base model of which a part is trained in place.

    Args:
        model: the base model; changed in place, also by what is trained.
        method: "full", all parameters; "bitfit", all biases (Ben Zaken et al., arXiv 2106.10199),
            and where a Llama model has none, new ones of zero on its linear layers, which change
            nothing until they are trained; "top-layers", the last ``top_layers`` transformer
            blocks (the paper's FT-Top2 with 2).
        top_layers: for "top-layers" only.

    Raises:
        UserError: no such method, more layers than there are, or a family without biases.
    """

    def __init__(self, model: nn.Module, method: str, top_layers: int = 2):
        if method not in METHODS:
            raise UserError(f"method {method!r} is not one of {', '.join(METHODS)}")
        self.method, self.top_layers = method, top_layers
        self._base_record = base_model.describe_base(model)
        if method == "bitfit":
            add_biases(model)
        super().__init__(model, trained_names(model, method, top_layers))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what is trained, float32, whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        description = {
            "method": self.method,
            "top_layers": self.top_layers,
            "base_model": self._base_record,
        }
        with atomic_path(folder, directory=True) as temporary:
            write_safetensors(temporary / TENSORS, self.adapter_tensors())
            write_text(temporary / DESCRIPTION, json.dumps(description, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, folder: str | Path, force: bool = False
    ) -> PartialModel:
        """The base model with what `save_pretrained` wrote in it, frozen.

        Args:
            model: the base model; changed in place.
            force: take it although it was made for another base model.

        Raises:
            UserError: files missing or damaged, another base model, or tensors that do not fit.
        """
        folder = Path(folder)
        path = folder / DESCRIPTION
        try:
            description = json.loads(read_text(path))
            method, top_layers = description["method"], int(description["top_layers"])
            base = description["base_model"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); take another copy") from error
        if not force:
            base_model.check_base(base, model, str(folder))
        tuned = cls(model, method, top_layers)
        tuned.set_adapter_tensors(read_safetensors(folder / TENSORS))
        tuned.freeze()
        return tuned


def is_partial(folder: str | Path) -> bool:
    """Whether `PartialModel.save_pretrained` wrote the folder."""
    return (Path(folder) / DESCRIPTION).is_file()


def trained_names(model: nn.Module, method: str, top_layers: int) -> set[str]:
    """Names of the parameters that a method trains; see `PartialModel`."""
    names = {name for name, _ in model.named_parameters()}
    if method == "full":
        return names
    if method == "bitfit":
        return {name for name in names if name.endswith(".bias")}
    layers = model.config.layers
    if not 1 <= top_layers <= layers:
        raise UserError(f"top_layers is {top_layers}; this model has {layers} layers")
    found = {name: BLOCK.search(name) for name in names}
    return {n for n, match in found.items() if match and int(match[1]) >= layers - top_layers}


def add_biases(model: nn.Module) -> None:
    """Give the linear layers of a model without biases ones of zero; its config says so.

    Raises:
        UserError: the model has no biases, and transformers' config of its family knows none.
    """
    if any(name.endswith(".bias") for name, _ in model.named_parameters()):
        return
    flags = dict.fromkeys(model.family.biases, True)
    if not flags:
        raise UserError(
            f"bitfit trains biases, and a {model.config.model_type} model has none and no place "
            "for them in its config; use method lora, full or top-layers"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != model.head_name:
            module.bias = jt.zeros((module.out_features,))
    for key, value in flags.items():
        setattr(model.config, key, value)
    if getattr(model, "source_config", None):  # what merging writes as config.json
        model.source_config = {**model.source_config, **flags}
