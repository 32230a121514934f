"""The training loss, computed only where a target counts."""

from __future__ import annotations

from jlora.runtime import jt

from jittor import nn


class TargetLoss(nn.Module):
    """Cross-entropy with label smoothing, as microsoft/LoRA computes it.

    Per target, with s the smoothing and log p the log-softmax over V words:
    ``(1 - s) * -log p[target] + s * -mean(log p)``.
    """

    def execute(self, hidden: jt.Var, weight: jt.Var, targets: jt.Var, smoothing: float) -> jt.Var:
        """Losses (N,) float32 of N targets.

        Args:
            hidden: (N, C) float32, the states from which the targets are predicted.
            weight: (V, C) float32, the language-model head.
            targets: (N,) int32.
            smoothing: s in [0, 1).
        """
        logits = nn.matmul_transpose(hidden, weight)  # (N, V)
        peak = logits.max(-1, keepdims=True).stop_grad()
        log_sum = jt.log(jt.exp(logits - peak).sum(-1)) + peak.squeeze(-1)  # (N,)
        index = targets.unsqueeze(1)
        loss = log_sum - (1.0 - smoothing) * logits.gather(1, index).squeeze(1)
        if smoothing:
            loss = loss - smoothing * logits.mean(-1)
        return loss
