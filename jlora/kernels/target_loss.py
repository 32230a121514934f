"""Fused `jlora.models.head.LanguageHead.losses` over a packed, frozen language-model head."""

from __future__ import annotations

from jlora.kernels.native import FusedFunction, operator
from jlora.kernels.packed_linear import PackedWeight
from jlora.runtime import jt


class _TargetLoss(FusedFunction):
    def execute(self, hidden, head, targets, smoothing):
        wanted = not hidden.is_stop_grad() and not jt.flags.no_grad
        losses, self.dhidden = operator(
            [targets.shape, hidden.shape if wanted else (1,)],
            ["float32", "float32"],
            [hidden, targets],
            "target_loss_op",
            head.address,
            smoothing,
            wanted,
        )
        return losses

    def grad(self, dlosses):
        return self.dhidden * dlosses.unsqueeze(1), None, None, None


def target_loss(hidden: jt.Var, head: PackedWeight, targets: jt.Var, smoothing: float) -> jt.Var:
    """Losses (N,) of hidden states (N, C) for int32 targets (N,), as `LanguageHead.losses`."""
    return _TargetLoss.apply(hidden, head, targets, smoothing)
