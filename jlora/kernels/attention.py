"""Fused causal attention: `jlora.models.attention.CausalAttention` without the (T, S) matrix."""

from __future__ import annotations

import numpy as np

from jlora.kernels.native import FusedFunction, operator
from jlora.system.runtime import jt


class _Attention(FusedFunction):
    def execute(self, q, k, v, sequences, scores):
        H, D = q.shape[-2:]
        self.scores = scores
        out, lse = operator(
            [q.shape, (H, q.numel() // (H * D))],
            ["float32", "float32"],
            [q, k, v, sequences],
            "attention_forward_op",
            *scores,
        )
        self.results = [out, lse]
        return out

    def grad(self, dout):
        q, k, v = self.inputs[:3]
        dq, dk, dv = operator(
            [q.shape, k.shape, v.shape],
            ["float32"] * 3,
            [*self.inputs[:4], *self.results, dout],
            "attention_backward_op",
            *self.scores,
        )
        return dq, dk, dv, None, None


def causal_attention(q, k, v, keys=None, scale=None, window=None, cap=None):
    """Attend as `CausalAttention` does; q (B, T, H, D), k and v (B, S, H_kv, D), all float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, T, S = *q.shape[:2], k.shape[1]
    if keys is None:
        table = sequences(np.zeros(B, np.int32), np.full(B, S, np.int32), T, S)
    else:
        table = keys.sequences(T, S)
    return _Attention.apply(q, k, v, jt.array(table), (scale, cap or 0, window or 0))


def sequences(first: np.ndarray, last: np.ndarray, T: int, S: int) -> np.ndarray:
    """The operator's table of a padded batch, (B, 5) int32.

    Row b's keys are ``first[b]`` to ``last[b]``; the last T of its S places are the queries'.
    Columns: first row of q and number of rows, likewise of k, and how many of its keys the first
    query sees before its own.
    """
    row = np.arange(len(first), dtype=np.int32)
    columns = [row * T, np.full_like(row, T), row * S + first, last - first, S - T - first]
    return np.stack(columns, axis=1).astype(np.int32)
