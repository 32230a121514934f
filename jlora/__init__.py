"""LoRA fine-tuning of language models for Jittor.

    import jlora

    model = jlora.load("smollm2-135m")
    model = jlora.get_peft_model(model, jlora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

Models and adapters speak PEFT's vocabulary; `jlora.layers` speaks loralib's. Jittor itself is
imported with the first name that needs it, not by ``import jlora``.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "load": "jlora.models.hub",
    "write_merged": "jlora.merge",
    "export_gguf": "jlora.export",
    "LoraConfig": "jlora.adapters",
    "PeftModel": "jlora.adapters",
    "get_peft_model": "jlora.adapters",
    "mark_only_lora_as_trainable": "jlora.layers",
    "lora_state_dict": "jlora.layers",
    "BeamConfig": "jlora.beam",
    "beam_search": "jlora.beam",
    "GenerateConfig": "jlora.generate",
    "TrainConfig": "jlora.train",
    "OptimConfig": "jlora.optim",
    "UserError": "jlora.errors",
}
# A function may not share its module's name: importing the module would hide it.
_MODULES = (
    "adapters", "data", "engine", "export", "generate", "layers", "merge", "metrics", "models",
    "pull", "tasks", "train",
)  # fmt: skip

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"jlora.{name}")
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
