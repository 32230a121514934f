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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` below finds, for editors and type checkers
    from jlora import adapters as adapters
    from jlora import data as data
    from jlora import engine as engine
    from jlora import layers as layers
    from jlora import metrics as metrics
    from jlora import models as models
    from jlora.adapters import LoraConfig as LoraConfig
    from jlora.adapters import PeftModel as PeftModel
    from jlora.adapters import get_peft_model as get_peft_model
    from jlora.adapters.export_folder import write_merged as write_merged
    from jlora.adapters.export_gguf import export_gguf as export_gguf
    from jlora.data import pull_models as pull  # noqa: F401
    from jlora.data import tasks as tasks
    from jlora.data.batches import Example as Example
    from jlora.data.tasks import Task as Task
    from jlora.data.tasks import register_task as register_task
    from jlora.decoding import sampling as generate  # noqa: F401
    from jlora.decoding.beam import BeamConfig as BeamConfig
    from jlora.decoding.beam import beam_search as beam_search
    from jlora.decoding.sampling import GenerateConfig as GenerateConfig
    from jlora.layers import lora_state_dict as lora_state_dict
    from jlora.layers import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from jlora.metrics import Metric as Metric
    from jlora.metrics import register_metric as register_metric
    from jlora.models.families import register_family as register_family
    from jlora.models.hub import load as load
    from jlora.system import distributed as distributed
    from jlora.system import runtime as runtime
    from jlora.system.errors import UserError as UserError
    from jlora.training import loop as train  # noqa: F401
    from jlora.training.adamw import OptimConfig as OptimConfig
    from jlora.training.loop import TrainConfig as TrainConfig

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


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Runtime(types.ModuleType):
    """`jlora.runtime`, as users write it; the module that it stands for is read when needed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(_MODULES["runtime"]), name)


sys.modules["jlora.runtime"] = _Runtime("jlora.runtime", _Runtime.__doc__)
