"""Fused `jlora.models.head.LanguageHead.losses` over a packed language-model head."""

from __future__ import annotations

from jlora.kernels.native import FusedFunction, operator
from jlora.kernels.packed_linear import PackedWeight, TrainedWeight
from jlora.system.runtime import jt


class _TargetLoss(FusedFunction):
    def execute(self, hidden, head, targets, smoothing, cap):
        wanted = not hidden.is_stop_grad() and not jt.flags.no_grad
        losses, self.dhidden = operator(
            [targets.shape, hidden.shape if wanted else (1,)],
            ["float32", "float32"],
            [hidden, targets],
            "target_loss_op",
            smoothing,
            wanted,
            cap,
            integers=[head.address],
        )
        return losses

    def grad(self, dlosses):
        return self.dhidden * dlosses.unsqueeze(1), None, None, None, None


class _TrainedTargetLoss(FusedFunction):
    def execute(self, hidden, weight, targets, trained, smoothing, cap):
        self.packed, self.numbers = trained.packed(), (trained.n, smoothing, cap)
        losses, self.log_sums = operator(
            [targets.shape] * 2, ["float32"] * 2, [hidden, targets, self.packed],
            "trained_loss_op", *self.numbers,
        )  # fmt: skip
        return losses

    def grad(self, dlosses):
        hidden, weight, targets, *_ = self.inputs
        inputs = [hidden, targets, self.packed, self.log_sums, dlosses]
        dhidden, dhead = operator(
            [hidden.shape, weight.shape], ["float32"] * 2, inputs, "trained_loss_back_op",
            *self.numbers,
        )  # fmt: skip
        return dhidden, dhead, None, None, None, None


def target_loss(
    hidden: jt.Var, head: PackedWeight, targets: jt.Var, smoothing: float, cap: float | None = None
) -> jt.Var:
    """Losses (N,) of hidden states (N, C) for int32 targets (N,), as `LanguageHead.losses`."""
    return _TargetLoss.apply(hidden, head, targets, smoothing, cap or 0)


def trained_target_loss(
    hidden: jt.Var, head: TrainedWeight, targets: jt.Var, smoothing: float, cap: float | None = None
) -> jt.Var:
    """The same over a head that is trained itself; differentiable in both."""
    return _TrainedTargetLoss.apply(hidden, head.weight, targets, head, smoothing, cap or 0)
