"""Which parameters of a model learn, and which are saved."""

from __future__ import annotations

from collections.abc import Iterable

from jlora.formats.names import is_lora_name
from jlora.layers.base import LoRALayer
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but the LoRA parameters and the asked-for biases.

    Args:
        bias: "none"; "all" biases of the model; "lora_only", those of LoRA layers.

    Raises:
        UserError: another value of ``bias``.
    """
    biases = bias_names(model, bias)
    set_trainable(model, {n for n, _ in model.named_parameters() if is_lora_name(n)} | biases)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, jt.Var]:
    """The LoRA parameters of ``model`` by name, with the asked-for biases.

    Args and Raises: as `mark_only_lora_as_trainable`.
    """
    biases = bias_names(model, bias)
    return {n: p for n, p in model.state_dict().items() if is_lora_name(n) or n in biases}


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Make exactly the parameters called ``names`` trainable, also across eval() and train().

    Jittor's ``eval()`` notes on each module whose gradients it stopped and ``train()`` restarts
    those: notes made before are dropped here, else the next ``train()`` would un-freeze the base.
    """
    names = set(names)
    for module in model.modules():
        module.__dict__.pop("backup_grad_state", None)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.start_grad()
        else:
            parameter.stop_grad()


def bias_names(model: nn.Module, bias: str) -> set[str]:
    """Names of the biases that "none", "all" or "lora_only" (those of LoRA layers) stands for."""
    if bias == "none":
        return set()
    names = {name for name, _ in model.named_parameters() if "bias" in name}
    if bias == "all":
        return names
    if bias == "lora_only":
        layers = [m for m in model.modules() if isinstance(m, LoRALayer) and m.has_adapter]
        owned = {id(m.bias) for m in layers if getattr(m, "bias", None) is not None}
        return {name for name, parameter in model.named_parameters() if id(parameter) in owned}
    raise UserError(f'bias must be "none", "all" or "lora_only", not {bias!r}')
