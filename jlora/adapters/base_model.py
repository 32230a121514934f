"""The base model that an adapter was made for: recorded by jlora, or named in PEFT's settings."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from jlora.formats.rounding import narrow, widen
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn
from jlora.system.unread import values

log = logging.getLogger("jlora.adapters")

# Enough of a tensor to tell two models apart, and little enough to hash in milliseconds.
HASHED_VALUES = 2**20

#: Word in a model's name -> how the model_type of such a model begins. Some families have models
#: of Llama's architecture, and GGUF files of Mistral say "llama".
FAMILIES = {
    r"(?<!o)llama|vicuna": ("llama",),
    r"smollm": ("llama", "smollm"),
    r"mistral": ("mistral", "llama"),
    r"mixtral": ("mixtral",),
    r"qwen": ("qwen",),
    r"gpt-?2|dialogpt": ("gpt2",),
    r"gemma": ("gemma", "recurrent_gemma"),
    r"(?<![a-z])phi(?![a-z])": ("phi",),
    r"(?<![a-z])opt(?![a-z])": ("opt",),
    r"bloomz?": ("bloom",),
    r"falcon": ("falcon", "llama"),
    r"pythia|gpt-?neox": ("gpt_neox",),
    r"olmo": ("olmo",),
    r"(?<![a-z])glm|chatglm": ("glm", "chatglm"),
    r"internlm": ("internlm", "llama"),
}


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What tells one base model from another: its family, shapes, and hashes of a few weights."""
    remembered = vars(model).get("_base_record")
    if remembered is not None:
        return remembered
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


def remember_base(model: nn.Module) -> None:
    """Have `describe_base` know a base whose float32 weights are about to go.

    Args:
        model: a base or tuned model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base._base_record = vars(model).get("_base_record") or describe_base(base)


def forget_base(base: nn.Module) -> None:
    """Undo `remember_base`: the weights are there, or others now."""
    vars(base).pop("_base_record", None)


def _describe_tensor(var) -> dict[str, Any]:
    array = values(var)  # one that is still in a file stays there
    hashed = array.reshape(-1)[:HASHED_VALUES]
    return {
        "shape": list(array.shape),
        "dtype": str(var.dtype),
        "sha256": hashlib.sha256(hashed.tobytes()).hexdigest(),
        "sample": [float(v) for v in array.reshape(-1)[:: max(1, array.size // 8)][:8]],
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
    remembered = vars(model).get("_base_record") or {"tensors": {}}
    for name, expected in recorded["tensors"].items():
        found = remembered["tensors"].get(name)
        if found is None:
            if name not in parameters:
                return f"this one has no {name}"
            found = _describe_tensor(parameters[name])
        if found["shape"] != expected["shape"]:
            return f"{name} is {tuple(found['shape'])} here"
        if found["dtype"] == expected["dtype"]:
            same = found["sha256"] == expected["sha256"]
        else:
            # The same weights stored in another type: equal up to bfloat16's rounding.
            scale = max(abs(value) for value in expected["sample"])
            same = np.allclose(found["sample"], expected["sample"], rtol=2**-7, atol=scale / 1000)
        if not same:
            return f"the weights of {name} differ"
    return None


def check_same(name: str, array: np.ndarray, parameter, source: str) -> None:
    """Compare a weight of the base that came with an adapter with the base's own.

    Args:
        array: as stored, perhaps in 16 bits.

    Raises:
        UserError: it is another one, rounding to a narrower type apart.
    """
    packed = not isinstance(parameter, jt.Var)  # by an engine, and rounded to bfloat16
    own = parameter.numpy() if packed else parameter.float32().numpy()
    way = "merge the adapter with PEFT and load the result"
    if own.shape != array.shape:
        sizes = f"{array.shape[0]:,} rows", f"{own.shape[0]:,}"
        if own.shape[1:] != array.shape[1:]:
            sizes = f"shape {tuple(array.shape)}", f"{tuple(own.shape)}"
        raise UserError(
            f"{source} brings its own {name} of {sizes[0]}, and the base model's has {sizes[1]}; "
            f"{way}"
        )
    array = array.astype(np.float32)
    if packed:
        array = widen(narrow(name, array, "BF16"), "BF16")
    if np.array_equal(array, own):
        return
    with np.errstate(over="ignore"):
        half = own.astype(np.float16)
    bfloat = widen(narrow(name, own, "BF16"), "BF16")
    if any(np.array_equal(array, rounded) for rounded in (half, bfloat)):
        return
    raise UserError(f"{source} brings its own {name}, which differs from the base model's; {way}")


def check_family(named: Any, model: nn.Module, where: str) -> None:
    """Compare the base that PEFT's settings name with ``model``, by what their names tell.

    A warning is all where the two may have one architecture.

    Args:
        named: ``base_model_name_or_path``; a name of no family that is known here says nothing.

    Raises:
        UserError: the families differ.
    """
    expected = families(named) if isinstance(named, str) else set()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not expected or model_type is None:
        return
    name = getattr(model, "name_or_path", None)
    said = f"{where}: its settings name the base model {named}, and this is {name or 'a model'}"
    starts = tuple(start for family in expected for start in FAMILIES[family])
    if not model_type.startswith(starts):
        raise UserError(
            f"{said} of type {model_type}; load it on its own base, or insist with --force "
            "(force=True)"
        )
    if not expected & (families(name or "") or expected):
        log.warning("%s of type %s; are they one?", said, model_type)


def families(name: str) -> set[str]:
    """The keys of `FAMILIES` that a model's name fits; of a path its last part is the name."""
    parts = PurePosixPath(name.lower()).parts
    # Hugging Face's cache: models--google--gemma-2b/snapshots/...
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[0] if cached else (parts[-1] if parts else "")
    return {family for family in FAMILIES if re.search(family, last.rpartition("--")[2])}
