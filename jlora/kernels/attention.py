"""Fused causal attention: `jlora.models.attention.CausalAttention` without the (T, S) matrix."""

from __future__ import annotations

import math

import numpy as np

from jlora.kernels.native import FusedFunction, operator
from jlora.runtime import jt


class _Attention(FusedFunction):
    def execute(self, q, k, v, first, last):
        B, T, H, D = q.shape
        self.scale = 1.0 / math.sqrt(D)
        out, lse = operator(
            [(B, T, H, D), (B, H, T)],
            ["float32", "float32"],
            [q, k, v, first, last],
            "attention_forward_op",
            self.scale,
        )
        self.results = [out, lse]
        return out

    def grad(self, dout):
        q, k, v = self.inputs[:3]
        dq, dk, dv = operator(
            [q.shape, k.shape, v.shape],
            ["float32"] * 3,
            [*self.inputs, *self.results, dout],
            "attention_backward_op",
            self.scale,
        )
        return dq, dk, dv, None, None


def causal_attention(q, k, v, keys=None):
    """Attend as `CausalAttention` does; q (B, T, H, D), k and v (B, S, H_kv, D), all float32."""
    if keys is None:
        B, S = k.shape[:2]
        first, last = jt.array(np.zeros(B, np.int32)), jt.array(np.full(B, S, np.int32))
    else:
        first, last = keys.first, keys.last
    return _Attention.apply(q, k, v, first, last)
