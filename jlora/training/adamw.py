"""AdamW and the learning-rate schedule, over a list of trainable parameters.

Jittor's own optimisers count steps in ``backward()``, which is wrong under gradient accumulation,
so the step stands here: gradients in, parameters updated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.adapters import TunedModel
from jlora.kernels import native, structs
from jlora.layers import Embedding, assign
from jlora.models.gpt2 import LayerNorm
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.system.settings import check_choice, check_least

SCHEDULES = ("linear", "cosine", "constant")
SCHEDULE_UNITS = ("update", "batch")


@dataclass
class OptimConfig:
    """Settings of AdamW and its schedule."""

    lr: float = 2e-4
    schedule: str = "linear"  # after the warm-up: linear or cosine to the end, or constant
    min_lr_ratio: float = 0.0  # where linear and cosine end, as a share of lr
    warmup_steps: int = 0  # linear from 0; counted in schedule_unit
    schedule_unit: str = "update"  # what the schedule counts: update, or batch (microsoft/LoRA)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    variant: str = "torch"  # torch (torch.optim.AdamW) or loralib (microsoft/LoRA's optimizer.py)
    max_grad_norm: float = 0.0  # 0: no clipping
    # LoRA+ (arXiv 2402.12354): B learns so many times as fast as A, see `groups`; null: no
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6  # of LoRA on embeddings, with LoRA+

    def __post_init__(self):
        """Raises UserError for a value that makes no sense."""
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("schedule_unit", self.schedule_unit, SCHEDULE_UNITS)
        check_choice("AdamW variant", self.variant, ("torch", "loralib"))
        for name in ("lr", "eps", "loraplus_lr_ratio", "loraplus_lr_embedding"):
            value = getattr(self, name)
            if not (value is None and name == "loraplus_lr_ratio") and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, not {value}")
        if not 0 <= self.min_lr_ratio < 1:
            raise UserError(f"min_lr_ratio must be at least 0 and below 1, not {self.min_lr_ratio}")
        if self.min_lr_ratio and self.schedule == "constant":
            raise UserError("min_lr_ratio is for a schedule that falls: linear or cosine")
        check_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm")
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
    left = max(0.0, 1.0 - share)
    if config.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def _sum_of_squares(x: np.ndarray) -> float:
    """Of (n,) float32, in float64 and in pieces, which need no memory to speak of."""
    pieces = (x[start : start + (1 << 16)] for start in range(0, len(x), 1 << 16))
    return sum(float(np.sum(np.square(piece, dtype=np.float64))) for piece in pieces)


@dataclass(frozen=True)
class Group:
    """How a parameter learns: its rate as a share of the schedule's, and whether it decays."""

    rate: float = 1.0
    decays: bool = True


def groups(model: TunedModel, config: OptimConfig) -> list[Group] | None:
    """The groups of a model's trainable parameters; None: there is one.

    For LoRA+ those of PEFT's ``create_loraplus_optimizer``: B and all vectors learn
    ``loraplus_lr_ratio`` times as fast, LoRA on embeddings with a rate of its own, and biases and
    LayerNorms do not decay.

    Raises:
        UserError: LoRA+ without LoRA.
    """
    if config.loraplus_lr_ratio is None:
        return None
    modules = dict(model.base_model.named_modules())
    found = []
    for name, parameter in model.trainable_parameters():
        owner, last = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
        if isinstance(owner, Embedding) and last in ("lora_A", "lora_B"):
            found.append(Group(config.loraplus_lr_embedding / config.lr))
        elif last == "lora_B" or len(parameter.shape) == 1:
            decays = "bias" not in name and not isinstance(owner, LayerNorm)
            found.append(Group(config.loraplus_lr_ratio, decays))
        else:
            found.append(Group())
    if not any(name.endswith("lora_B") for name, _ in model.trainable_parameters()):
        raise UserError("loraplus_lr_ratio is for LoRA's B, and nothing trained has one")
    return found


LARGE = 1 << 24  # parameters; copies of fewer cost nothing beside a training step


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), outside Jittor's graph.

    A parameter that is computed from a gradient in the graph holds on to the whole step that the
    gradient came from. So the update is NumPy's, which serves adapters; a compiled operator with
    the same roundings makes it in one pass where the parameters are many.

    Args:
        groups: of each parameter; None: all the same.

    Two variants. "torch": weights decay before the update, eps is added to sqrt(v) after bias
    correction. "loralib": eps is added to sqrt(v) before, and the decay comes after the update.

    Attributes:
        m, v: (P,) float32, running means of the gradient and its square, P all parameters.
        updates: updates made so far.
        large: whether copies of the parameters are to be avoided.
    """

    def __init__(
        self,
        parameters: Sequence[jt.Var],
        config: OptimConfig,
        groups: Sequence[Group] | None = None,
    ):
        self.parameters = list(parameters)
        self.groups = list(groups) if groups else [Group()] * len(self.parameters)
        self.config = config
        self.m = np.zeros(sum(int(np.prod(p.shape)) for p in self.parameters), np.float32)
        self.v = np.zeros_like(self.m)
        self.updates = 0
        self.large = len(self.m) >= LARGE
        compiled = self.large and not jt.flags.use_cuda and native.problem() is None
        self._update = self._update_compiled if compiled else self._update_numpy

    def arrays(self, tensors: Sequence[jt.Var]) -> list[np.ndarray]:
        """Tensors as float32 arrays that share their memory, computed in one pass over the graph.

        They are cut off from the graph, which else would keep the parameters' last values.
        """
        for tensor in tensors:
            tensor.stop_grad()
        jt.sync(list(tensors))
        return [tensor.data for tensor in tensors]

    def step(self, gradients: Sequence[np.ndarray], lr: float) -> None:
        """Update all parameters.

        Args:
            gradients: float32, shaped as the parameters and in their order; see `arrays`.
            lr: this update's learning rate.
        """
        c = self.config
        self.updates += 1
        clip = 1.0
        if c.max_grad_norm:
            norm = math.sqrt(sum(_sum_of_squares(gradient.reshape(-1)) for gradient in gradients))
            clip = min(1.0, c.max_grad_norm / (norm + 1e-6))
        rows = zip(self.parameters, gradients, *self._means(), self.groups)
        for parameter, gradient, m, v, group in rows:
            self._update(parameter, gradient.reshape(-1), m, v, self._rates(lr, group), clip)

    def _means(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """m and v of each parameter, flat."""
        ends = np.cumsum([int(np.prod(p.shape)) for p in self.parameters])[:-1]
        return np.split(self.m, ends), np.split(self.v, ends)

    def _rates(self, lr: float, group: Group) -> tuple[float, float, float]:
        """What multiplies the change, what divides sqrt(v), and the decay."""
        c, lr = self.config, lr * group.rate
        correct1 = 1 - c.beta1**self.updates
        root2 = math.sqrt(1 - c.beta2**self.updates)
        decay = 1 - lr * c.weight_decay if group.decays else 1.0
        if c.variant == "torch":
            return lr / correct1, root2, decay
        return lr * root2 / correct1, 1.0, decay

    def _update_numpy(self, parameter, gradient, m, v, rates, clip: float) -> None:
        """The definition. Python floats do not widen float32 arrays."""
        c = self.config
        rate, root2, decay = rates
        gradient = gradient * np.float32(clip)
        m[:] = c.beta1 * m + (1 - c.beta1) * gradient
        v[:] = c.beta2 * v + (1 - c.beta2) * gradient * gradient
        change = rate * (m / (np.sqrt(v) / root2 + c.eps))
        values = parameter.numpy().reshape(-1)
        values = values * decay - change if c.variant == "torch" else (values - change) * decay
        assign(parameter, jt.array(values.reshape(parameter.shape)))

    def _update_compiled(self, parameter, gradient, m, v, rates, clip: float) -> None:
        c = self.config
        rate, root2, decay = rates
        numbers = structs.AdamWNumbers(
            beta1=c.beta1, rest1=1 - c.beta1, beta2=c.beta2, rest2=1 - c.beta2, rate=rate,
            root2=root2, decay=decay, eps=c.eps, clip=clip,
        )  # fmt: skip
        # Into new memory: Jittor's clones, and layers under another name, share a parameter's own.
        values = jt.empty(parameter.shape, "float32")
        inputs = [parameter.data, gradient, np.frombuffer(bytes(numbers), np.float32)]
        native.run("adamw_op", inputs, [values.data, m, v], c.variant == "loralib")
        assign(parameter, values)

    def undo(self, lr: float) -> bool:
        """Take back the parameters' last update, to rounding; m and v stay what they are.

        Args:
            lr: the update's learning rate.

        Returns:
            Whether all parameters are finite numbers again.
        """
        finite = True
        for parameter, m, v, group in zip(self.parameters, *self._means(), self.groups):
            rate, root2, decay = self._rates(lr, group)
            change = rate * (m / (np.sqrt(v) / root2 + self.config.eps))
            values = parameter.numpy().reshape(-1)
            torch = self.config.variant == "torch"
            values = (values + change) / decay if torch else values / decay + change
            assign(parameter, jt.array(values.astype("f").reshape(parameter.shape)))
            finite = finite and bool(np.isfinite(values).all())
        return finite

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs, not copied: m, v and the number of updates."""
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
        self.m[:], self.v[:] = state["m"], state["v"]
        self.updates = int(state["updates"][0])
