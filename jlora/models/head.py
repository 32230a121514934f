"""The language-model head, and what every causal language model has round its backbone."""

from __future__ import annotations

from typing import ClassVar

from jlora.models.attention import KVCache, soft_cap
from jlora.system.runtime import jt, nn


class LanguageHead(nn.Module):
    """Logits and losses of hidden states; the weight is handed in, since GPT-2 ties it.

    A module without parameters, so that a fused one can take its place.

    Attributes:
        cap: logits become ``cap tanh(logit / cap)``, as in Gemma 2; None: they stay.
    """

    def __init__(self, cap: float | None = None):
        self.cap = cap

    def execute(self, hidden: jt.Var, weight: jt.Var) -> jt.Var:
        """States (..., C) and weight (V, C) -> logits (..., V)."""
        return self.capped(nn.matmul_transpose(hidden, weight))

    def capped(self, logits: jt.Var) -> jt.Var:
        return logits if self.cap is None else soft_cap(logits, self.cap)

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
        return cross_entropy(self(hidden, weight), targets, smoothing)


def cross_entropy(logits: jt.Var, targets: jt.Var, smoothing: float) -> jt.Var:
    """Losses (N,) of logits (N, V); see `LanguageHead.losses`."""
    peak = logits.max(-1, keepdims=True).stop_grad()
    log_sum = jt.log(sum_in_pieces(jt.exp(logits - peak))) + peak.squeeze(-1)  # (N,)
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    loss = log_sum - (1.0 - smoothing) * picked
    return loss - smoothing / logits.shape[1] * sum_in_pieces(logits) if smoothing else loss


PIECE = 256


def sum_in_pieces(values: jt.Var) -> jt.Var:
    """Sums (N,) of values (N, V), first over pieces of `PIECE`.

    Jittor adds one value after another, so that behind a likely word the many unlikely ones of
    50,000 would be rounded away: losses were too small by 1.4e-4.
    """
    N, V = values.shape
    pieces = [N, -(-V // PIECE)]
    return values.reindex_reduce("add", pieces, ["i0", f"i1/{PIECE}"]).sum(-1)


class CausalLM(nn.Module):
    """What the model families share: a backbone's states in, logits and losses out.

    A family gives ``head``, ``hidden_states``, ``output_embedding`` and ``first_attention``.
    """

    head_name: ClassVar[str] = "lm_head"  # of the layer with the head's weight, if it is untied

    @property
    def family(self):
        """The model's entry in `models.families`; None: a family that is not registered."""
        from jlora.models.families import FAMILIES  # which imports the model files

        return FAMILIES.get(self.config.model_type)

    def new_cache(self) -> KVCache:
        """An empty cache for decoding."""
        return self.first_attention.new_cache(self.config.layers)

    @property
    def reads_streams(self) -> bool:
        """Whether a `Stream` costs no more than its sequences do."""
        return self.first_attention.reads_streams

    @property
    def head_layer(self) -> nn.Module | None:
        """``lm_head`` where it does more than multiply its weight, as with LoRA on it, else None.

        Otherwise `LanguageHead` multiplies the weight, and the layer is never called.
        """
        layer = getattr(self, self.head_name, None)
        more = isinstance(layer, nn.Linear) and type(layer).execute is not nn.Linear.execute
        return layer if more else None

    def lm_head_logits(self, hidden: jt.Var) -> jt.Var:
        """States (..., C) -> logits (..., V)."""
        layer = self.head_layer
        if layer is None:
            return self.head(hidden, self.output_embedding)
        return self.head.capped(layer(hidden))

    def target_losses(self, hidden: jt.Var, targets: jt.Var, smoothing: float = 0.0) -> jt.Var:
        """Losses (N,) of states (N, C) for targets (N,) int32; see `LanguageHead.losses`."""
        layer = self.head_layer
        if layer is not None:
            return cross_entropy(self.lm_head_logits(hidden), targets, smoothing)
        return self.head.losses(hidden, self.output_embedding, targets, smoothing)

    def execute(
        self, input_ids: jt.Var, attention_mask=None, cache: KVCache | None = None
    ) -> jt.Var:
        """Token ids (B, T) int32 -> logits (B, T, V) float32.

        ``attention_mask`` (B, past + T) is 1 for real tokens and 0 for padding, which stands on
        one side only. With a ``cache`` the new keys and values are added to it.
        """
        return self.lm_head_logits(self.hidden_states(input_ids, attention_mask, cache))
