"""`TunedModel`: a base model of which a part is trained and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.adapters import storage
from jlora.layers import assign, set_trainable
from jlora.system.runtime import jt, nn


class TunedModel(nn.Module):
    """What adapters and other ways of fine-tuning share; called like the base model.

    Everything the base model has (``config``, ``tokenizer``, ``hidden_states``, ``new_cache``, ...)
    is there under the same name. Parameter names are the base model's, without a prefix.

    Args:
        model: the base model, already as it is to be trained.
        names: the parameters that are trained and saved; all others are frozen.

    Attributes:
        base_model: the model inside.
    """

    def __init__(self, model: nn.Module, names: set[str]):
        self.base_model = model
        self._adapter_names = self._trainable_names = names
        set_trainable(model, names)

    def execute(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def __getattr__(self, name: str):
        # Only reached when the wrapper lacks the name. Underscored names and Jittor's own notes
        # belong to one module and must not be found on another.
        if name.startswith("_") or name in ("base_model", "is_train", "backup_grad_state"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.base_model, name)

    def train(self) -> TunedModel:
        """Training mode. Jittor's own would also un-freeze a base that was in eval() before."""
        super().train()
        set_trainable(self.base_model, self._trainable_names)
        return self

    def get_base_model(self) -> nn.Module:
        """The model inside, with what is trained in it."""
        return self.base_model

    def freeze(self) -> None:
        """Stop training: every parameter is frozen, and the model is in eval mode."""
        self._trainable_names = set()
        set_trainable(self.base_model, set())
        self.eval()

    def trainable_parameters(self) -> list[tuple[str, jt.Var]]:
        """Names and Vars of what the optimiser shall change, in the model's order."""
        return self._named(self._trainable_names)

    def _named(self, names: set[str]) -> list[tuple[str, jt.Var]]:
        return [(name, var) for name, var in self.base_model.named_parameters() if name in names]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, the adapter's among the latter."""
        named = self.base_model.named_parameters()
        sizes = {name: int(np.prod(var.shape)) for name, var in named}
        # What an engine keeps in packed form alone is no Var; tied weights are one thing.
        weights = [module.__dict__.get("weight") for module in self.base_model.modules()]
        packed = {id(w): w for w in weights if w is not None and not isinstance(w, jt.Var)}
        total = sum(sizes.values()) + sum(int(np.prod(w.shape)) for w in packed.values())
        return sum(sizes[name] for name in self._trainable_names), total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def adapter_tensors(self) -> dict[str, np.ndarray]:
        """All that is trained and saved, by parameter name, as float32 arrays."""
        return {name: var.float32().numpy() for name, var in self._named(self._adapter_names)}

    def set_adapter_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replace what is trained by `adapter_tensors` of another time or place.

        Raises:
            UserError: names are missing or unknown or shapes differ; nothing is changed then.
        """
        parameters: dict[str, Any] = dict(self._named(self._adapter_names))
        shapes = {name: tuple(var.shape) for name, var in parameters.items()}
        storage.check_tensors("the adapter", shapes, tensors)
        for name, var in parameters.items():
            assign(var, jt.array(np.ascontiguousarray(tensors[name])).cast(var.dtype))
