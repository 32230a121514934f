"""loralib's ``.pt`` files: what their keys and shapes say of the layers, and what they cannot say.

``torch.save(lora.lora_state_dict(model), path)``, bare or under ``model_state_dict``, keeps the
parameters alone. The targets follow from the keys and r from the shapes; lora_alpha, and which
blocks of a fused layer have LoRA, are for the user to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jlora.adapters.attach import linear_shape
from jlora.adapters.config import LoraConfig
from jlora.adapters.storage import with_patterns
from jlora.adapters.targets import name_fits
from jlora.formats.names import is_lora_name
from jlora.formats.torch_file import read_torch
from jlora.formats.torch_write import write_torch
from jlora.layers import Conv1D, LoRALayer, MergedLinear
from jlora.system.errors import UserError
from jlora.system.runtime import nn

SUFFIXES = (".pt", ".pth", ".bin")
#: GPT-2's mask, which `lora_state_dict(model, bias="all")` takes for a bias.
MASK = re.compile(r"\.attn\.(bias|masked_bias)$")


def is_loralib(path: str | Path) -> bool:
    """Whether a path means a .pt file rather than an adapter's folder."""
    path = Path(path)
    return path.suffix in SUFFIXES and not path.is_dir()


def read_loralib(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a .pt file by parameter name.

    Raises:
        UserError: no PyTorch file, or one without loralib's keys (it says what they are).
    """
    tensors = {}
    for name, array in read_torch(path).items():
        while name.startswith(("module.", "_orig_mod.")):  # DataParallel, torch.compile
            name = name.split(".", 1)[1]
        if not MASK.search(name):
            tensors[name] = array
    if any(is_lora(name) for name in tensors):
        return tensors
    first = next(iter(tensors), "none")
    what = "a model's own weights: give it as the base model"
    if any(is_lora_name(name) for name in tensors):
        what = "an adapter in another form: give the folder with its adapter_config.json"
    elif all("bias" in name for name in tensors):
        what = "biases only"
    raise UserError(f"{path}: no loralib adapter, no key ends in lora_A (first: {first}); it holds "
                    f"{what}")  # fmt: skip


def is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def model_names(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by the model's names.

    Names may lack their beginning (``transformer.``), and a whole checkpoint repeats the tied head.
    """
    if "lm_head" not in dict(model.named_modules()):
        head = getattr(model, "output_embedding", None)
        tensors = {
            name: array
            for name, array in tensors.items()
            if not (name.startswith("lm_head.") and np.array_equal(array, head.numpy()))
        }
    modules = dict(model.named_modules())
    owners = [name.rpartition(".")[0] for name in tensors if is_lora(name)]
    tops = [f"{name}." for name in modules if name and "." not in name]
    for prefix in ("", *tops):
        if all(prefix + owner in modules for owner in owners):
            return {prefix + name: array for name, array in tensors.items()}
    return dict(tensors)


def loralib_config(
    model: nn.Module,
    tensors: Mapping[str, np.ndarray],
    lora_alpha: float,
    enable_lora: Sequence[bool] | None,
    lora_dropout: float,
    source: str,
) -> LoraConfig:
    """The settings that go with a file's tensors.

    Args:
        tensors: by the model's parameter names.
        enable_lora: needed where a fused layer has LoRA on some of its blocks.
        source: the file, for errors.

    Raises:
        UserError: keys that match no module, shapes that fit none or not ``enable_lora``, some of
            the biases but not all.
    """
    modules = dict(model.named_modules())
    layers = {name.rpartition(".")[0] for name in tensors if is_lora(name)}
    unknown = sorted(name for name in layers if name not in modules)
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of its {len(layers)} layers match no module of the model, "
            f"such as {unknown[0]}.lora_A; load it on the model that it was made for"
        )
    ranks, flags = {}, {}
    for name in sorted(layers):
        A, B = (tensors.get(f"{name}.{part}") for part in ("lora_A", "lora_B"))
        for part, array in (("lora_A", A), ("lora_B", B)):
            if array is None or array.ndim != 2:
                raise UserError(f"{source}: {name}.{part} is missing or no matrix; save it anew")
        try:
            ranks[name], flags[name] = read_shapes(modules[name], A.shape, B.shape, enable_lora)
        except UserError as error:
            raise UserError(
                f"{source}: {name}.lora_A {A.shape} and .lora_B {B.shape} {error}"
            ) from None
    pattern = one_pattern(modules, flags, source)
    if enable_lora is not None and pattern is None:
        raise UserError(
            f"{source}: enable_lora is given, but no layer is fused in the file; leave it out"
        )
    config = LoraConfig(
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_names(modules, layers),
        bias=bias_kind(model, tensors, layers, source),
        enable_lora=pattern,
    )
    return with_patterns(config, {name: (r, lora_alpha) for name, r in ranks.items()})


def read_shapes(
    module: nn.Module,
    a: tuple[int, int],
    b: tuple[int, int],
    enable_lora: Sequence[bool] | None,
) -> tuple[int, list[bool] | None]:
    """(r, enable_lora or None for a layer that is not fused) from the shapes of a layer.

    Raises:
        UserError: the rest of a sentence that begins with the two tensors.
    """
    r = b[1]
    if isinstance(module, nn.Embedding):
        if (a, b) == ((r, module.weight.shape[0]), (module.weight.shape[1], r)):
            return r, None
        raise UserError(f"do not fit the embedding {tuple(module.weight.shape)}")
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UserError(f"are of a {type(module).__name__}, which takes no LoRA here")
    inputs, outputs = linear_shape(module)
    if (a, b) == ((r, inputs), (outputs, r)):
        return r, None
    enabled = a[0] // max(r, 1)
    blocks = enabled * outputs // max(b[0], 1)
    if (
        a != (r * enabled, inputs)
        or b[0] * blocks != enabled * outputs
        or not 0 < enabled <= blocks
        or outputs != blocks * inputs
    ):
        raise UserError(f"do not fit the layer of {inputs} inputs and {outputs} outputs")
    found = f"have LoRA on {enabled} of {blocks} blocks"
    if enable_lora is None and enabled < blocks:
        raise UserError(
            f"{found}: say which, such as enable_lora=[True, False, True] (--enable-lora 1,0,1) "
            "for query and value of GPT-2"
        )
    flags = [True] * blocks if enable_lora is None else [bool(flag) for flag in enable_lora]
    if (len(flags), sum(flags)) != (blocks, enabled):
        raise UserError(f"{found}, but enable_lora has {sum(flags)} of {len(flags)}")
    return r, flags


def one_pattern(
    modules: Mapping[str, nn.Module], flags: Mapping[str, list[bool] | None], source: str
) -> list[bool] | None:
    """The enable_lora of all fused layers.

    Raises:
        UserError: they differ, or a layer of their shape is not fused.
    """
    fused = {name: pattern for name, pattern in flags.items() if pattern is not None}
    if not fused:
        return None
    first, pattern = next(iter(fused.items()))
    for name, other in flags.items():
        if isinstance(modules[name], nn.Embedding):
            continue
        inputs, outputs = linear_shape(modules[name])
        if other != pattern and (other or outputs == len(pattern) * inputs):
            raise UserError(
                f"{source}: {first} and {name} have LoRA on different blocks, which jlora has no "
                "setting for; train them alike"
            )
    return pattern


def target_names(modules: Mapping[str, nn.Module], layers: set[str]) -> list[str]:
    """The shortest target_modules for exactly these layers."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    return ends if {n for n in modules if n and name_fits(n, ends)} == layers else sorted(layers)


def bias_kind(
    model: nn.Module, tensors: Mapping[str, np.ndarray], layers: set[str], source: str
) -> str:
    """loralib's ``bias`` that the file was saved with."""
    every = {name for name, _ in model.named_parameters() if "bias" in name}
    found = every & set(tensors)
    if not found:
        return "none"
    if found == every & {f"{name}.bias" for name in layers}:
        return "lora_only"
    missing = sorted(every - found)
    if missing:
        raise UserError(
            f'{source}: has the bias {min(found)}, but not {missing[0]}; save it with bias="all", '
            '"lora_only" or "none"'
        )
    return "all"


def write_loralib(
    path: str | Path,
    config: LoraConfig,
    layers: Mapping[str, LoRALayer],
    tensors: Mapping[str, np.ndarray],
    nested: bool,
) -> float:
    """Write a .pt file; see `PeftModel.save_loralib`."""
    if config.modules_to_save:
        raise UserError(
            f"modules_to_save {config.modules_to_save} have no place in a loralib file; keep the "
            "PEFT folder"
        )
    if not config.lora_variant.is_plain:
        raise UserError(
            f"variant {config.variant_name!r} has no place in a loralib file; keep the PEFT folder"
        )
    lora_alpha = loralib_alpha(layers)
    write_torch(path, tensors, "model_state_dict" if nested else None)
    return lora_alpha


def loralib_alpha(layers: Mapping[str, LoRALayer]) -> float:
    """The lora_alpha with which loralib's ``lora_alpha / r`` gives every layer its scaling.

    Raises:
        UserError: no single one does.
    """
    alphas = {name: layer.scaling * layer.r for name, layer in layers.items()}
    first, alpha = next(iter(alphas.items()))
    for name, other in alphas.items():
        if not math.isclose(other, alpha, rel_tol=1e-6):
            raise UserError(
                f"the layers need different lora_alpha ({first}: {alpha:g}, {name}: {other:g}), "
                "which a loralib file has no place for; keep the PEFT folder"
            )
    return int(alpha) if float(alpha).is_integer() else alpha


def loralib_note(lora_alpha: float, layers: Mapping[str, LoRALayer]) -> str:
    """What must be known to load a file, in one line."""
    patterns = {
        tuple(layer.enable_lora) for layer in layers.values() if isinstance(layer, MergedLinear)
    }
    blocks = "".join(f", enable_lora={list(pattern)}" for pattern in patterns)
    names = "lora_alpha and enable_lora" if blocks else "lora_alpha"
    return f"a .pt file has no place for {names}: load it with lora_alpha={lora_alpha:g}{blocks}"
