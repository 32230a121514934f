"""AdamW and the learning-rate schedule, over the trainable parameters as one flat vector.

Jittor's own optimisers count steps in ``backward()``, which is wrong under gradient accumulation,
so the step stands here: gradients in, parameters updated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.errors import UserError
from jlora.layers import assign
from jlora.runtime import jt

SCHEDULES = ("linear", "cosine", "constant")
SCHEDULE_UNITS = ("update", "batch")


@dataclass
class OptimConfig:
    """Settings of AdamW and its schedule."""

    lr: float = 2e-4
    schedule: str = "linear"  # after the warm-up: linear to 0, cosine to 0, or constant
    warmup_steps: int = 0  # linear from 0; counted in schedule_unit
    schedule_unit: str = "update"  # what the schedule counts: update, or batch (microsoft/LoRA)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    variant: str = "torch"  # torch (torch.optim.AdamW) or loralib (microsoft/LoRA's optimizer.py)
    max_grad_norm: float = 0.0  # 0: no clipping

    def check(self) -> None:
        """Raises UserError for a value that makes no sense."""
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.schedule_unit not in SCHEDULE_UNITS:
            raise UserError(
                f"schedule_unit {self.schedule_unit!r} is not one of {', '.join(SCHEDULE_UNITS)}"
            )
        if self.variant not in ("torch", "loralib"):
            raise UserError(f"AdamW variant {self.variant!r} is not one of torch, loralib")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")


def learning_rate(
    config: OptimConfig, step: int, total_steps: int, grad_accumulation: int = 1
) -> float:
    """Learning rate of update ``step``, counted from 0.

    The first update of a warm-up has rate 0, as in transformers and microsoft/LoRA. With the
    `schedule_unit` "batch" everything is counted in batches, as in microsoft/LoRA's gpt2_ft.py: its
    scheduler moves on after every batch, and an update takes the rate of its last one. So with
    accumulation the first rate is above 0 there. Without accumulation the two are one.

    Args:
        total_steps: length of the run in the schedule's unit: updates, or batches.
        grad_accumulation: batches an update.
    """
    if config.schedule_unit == "batch":
        step = (step + 1) * grad_accumulation - 1
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return config.lr * max(0.0, 1.0 - share)


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), in NumPy.

    Adapters are small, and NumPy keeps the update out of Jittor's graph: a parameter computed from
    a gradient there holds on to the whole step that the gradient came from.

    Two variants. "torch": weights decay before the update, eps is added to sqrt(v) after bias
    correction. "loralib": eps is added to sqrt(v) before, and the decay comes after the update.

    Attributes:
        m, v: (P,) float32, running means of the gradient and its square, P all parameters.
        updates: updates made so far.
    """

    def __init__(self, parameters: Sequence[jt.Var], config: OptimConfig):
        config.check()
        self.parameters = list(parameters)
        self.config = config
        self.m = np.zeros(sum(int(np.prod(p.shape)) for p in self.parameters), np.float32)
        self.v = np.zeros_like(self.m)
        self.updates = 0

    def flatten(self, tensors: Sequence[jt.Var]) -> np.ndarray:
        """Tensors shaped as the parameters -> one (P,) float32 array."""
        jt.sync(list(tensors))  # one pass over the graph, not one a tensor
        return np.concatenate([tensor.numpy().reshape(-1) for tensor in tensors])

    def step(self, gradient: np.ndarray, lr: float) -> None:
        """Update all parameters.

        Args:
            gradient: (P,) float32, see `flatten`.
            lr: this update's learning rate.
        """
        c = self.config
        self.updates += 1
        if c.max_grad_norm:
            norm = float(np.sqrt(np.sum(np.square(gradient, dtype=np.float64))))
            gradient = gradient * np.float32(min(1.0, c.max_grad_norm / (norm + 1e-6)))
        # Python floats do not widen float32 arrays.
        self.m = c.beta1 * self.m + (1 - c.beta1) * gradient
        self.v = c.beta2 * self.v + (1 - c.beta2) * gradient * gradient
        correct1 = 1 - c.beta1**self.updates
        correct2 = 1 - c.beta2**self.updates
        values = self.flatten(self.parameters)
        decay = 1 - lr * c.weight_decay
        if c.variant == "torch":
            change = self.m / (np.sqrt(self.v) / math.sqrt(correct2) + c.eps)
            values = values * decay - (lr / correct1) * change
        else:
            change = self.m / (np.sqrt(self.v) + c.eps)
            values = (values - (lr * math.sqrt(correct2) / correct1) * change) * decay
        start = 0
        for parameter in self.parameters:
            size = int(np.prod(parameter.shape))
            assign(parameter, jt.array(values[start : start + size].reshape(parameter.shape)))
            start += size

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs: m, v and the number of updates."""
        return {
            "m": self.m,
            "v": self.v,
            "updates": np.array([self.updates], dtype=np.int64),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` gave.

        Raises:
            UserError: it belongs to other parameters.
        """
        if state["m"].shape != self.m.shape:
            raise UserError(
                f"the checkpoint's optimiser holds {state['m'].size} parameters and this adapter "
                f"has {self.m.size}; resume with the settings the run was started with"
            )
        self.m, self.v = state["m"], state["v"]
        self.updates = int(state["updates"][0])
