"""LoRA fine-tuning of language models for Jittor.

    import jlora

    model = jlora.load("smollm2-135m")
    model = jlora.get_peft_model(model, jlora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

Models and adapters speak PEFT's vocabulary; `jlora.layers` speaks loralib's. Jittor itself is
imported with the first name that needs it, not by ``import jlora``.
"""

from __future__ import annotations

import importlib
import sys
import types

_NAMES = {
    "load": "jlora.models.hub",
    "write_merged": "jlora.adapters.export_folder",
    "export_gguf": "jlora.adapters.export_gguf",
    "LoraConfig": "jlora.adapters",
    "PeftModel": "jlora.adapters",
    "get_peft_model": "jlora.adapters",
    "mark_only_lora_as_trainable": "jlora.layers",
    "lora_state_dict": "jlora.layers",
    "BeamConfig": "jlora.decoding.beam",
    "beam_search": "jlora.decoding.beam",
    "GenerateConfig": "jlora.decoding.sampling",
    "Example": "jlora.data.batches",
    "Task": "jlora.data.tasks",
    "register_task": "jlora.data.tasks",
    "Metric": "jlora.metrics",
    "register_metric": "jlora.metrics",
    "register_family": "jlora.models.families",
    "TrainConfig": "jlora.training.loop",
    "OptimConfig": "jlora.training.adamw",
    "UserError": "jlora.system.errors",
}
# A function may not share its module's name: importing the module would hide it.
_MODULES = {
    **{
        name: f"jlora.{name}"
        for name in ("adapters", "data", "engine", "layers", "metrics", "models")
    },
    "runtime": "jlora.system.runtime",
    "distributed": "jlora.system.distributed",
    "generate": "jlora.decoding.sampling",
    "pull": "jlora.data.pull_models",
    "tasks": "jlora.data.tasks",
    "train": "jlora.training.loop",
}

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Runtime(types.ModuleType):
    """`jlora.runtime`, as users write it; the module that it stands for is read when needed."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(_MODULES["runtime"]), name)


sys.modules["jlora.runtime"] = _Runtime("jlora.runtime", _Runtime.__doc__)
