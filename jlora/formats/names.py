"""What the names of tensors say, in a model as in a file."""

from __future__ import annotations


def is_lora_name(name: str) -> bool:
    """Whether a tensor is LoRA's own: a part of its name begins with ``lora_``."""
    return any(part.startswith("lora_") for part in name.split("."))
