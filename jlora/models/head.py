"""The language-model head: logits, and the training loss only where a target counts."""

from __future__ import annotations

from jlora.runtime import jt

from jittor import nn  # isort: skip  (after jlora.runtime, which prepares Jittor's import)


class LanguageHead(nn.Module):
    """Logits and losses of hidden states; the weight is handed in, since GPT-2 ties it.

    A module without parameters, so that a fused one can take its place.
    """

    def execute(self, hidden: jt.Var, weight: jt.Var) -> jt.Var:
        """States (..., C) and weight (V, C) -> logits (..., V)."""
        return nn.matmul_transpose(hidden, weight)

    def losses(self, hidden: jt.Var, weight: jt.Var, targets: jt.Var, smoothing: float) -> jt.Var:
        """Cross-entropy with label smoothing of N targets, (N,) float32.

        Per target, with s the smoothing and log p the log-softmax over V words:
        ``(1 - s) * -log p[target] + s * -mean(log p)``, as microsoft/LoRA computes it.

        Args:
            hidden: (N, C) float32, the states from which the targets are predicted.
            weight: (V, C) float32.
            targets: (N,) int32.
            smoothing: s in [0, 1).
        """
        logits = self(hidden, weight)  # (N, V)
        peak = logits.max(-1, keepdims=True).stop_grad()
        log_sum = jt.log(jt.exp(logits - peak).sum(-1)) + peak.squeeze(-1)  # (N,)
        picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        loss = log_sum - (1.0 - smoothing) * picked
        return loss - smoothing * logits.mean(-1) if smoothing else loss
