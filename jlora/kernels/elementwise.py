"""Fused norms, activations and rotary embedding; weights are frozen and get no gradient."""

from __future__ import annotations

import numpy as np

from jlora.kernels.native import FusedFunction, operator

from jittor import nn  # isort: skip  (after jlora.kernels.native, which prepares Jittor's import)


class _RMSNorm(FusedFunction):
    def execute(self, x, weight, eps):
        shapes = [x.shape, x.shape[:-1]]
        y, self.rstd = operator(
            shapes, ["float32"] * 2, [x, weight], "rms_forward_op", x.shape[-1], eps
        )
        return y

    def grad(self, dy):
        x, weight, _ = self.inputs
        inputs = [x, weight, self.rstd, dy]
        return operator(x.shape, "float32", inputs, "rms_backward_op", x.shape[-1]), None, None


class _LayerNorm(FusedFunction):
    def execute(self, x, weight, bias, eps):
        shapes = [x.shape, x.shape[:-1], x.shape[:-1]]
        y, self.mean, self.rstd = operator(
            shapes, ["float32"] * 3, [x, weight, bias], "layer_forward_op", x.shape[-1], eps
        )
        return y

    def grad(self, dy):
        x, weight, _, _ = self.inputs
        inputs = [x, weight, self.mean, self.rstd, dy]
        dx = operator(x.shape, "float32", inputs, "layer_backward_op", x.shape[-1])
        return dx, None, None, None


class _SwiGLU(FusedFunction):
    def execute(self, gate, up):
        return operator(gate.shape, "float32", [gate, up], "swiglu_forward_op")

    def grad(self, dy):
        gate, up = self.inputs
        shapes = [gate.shape, up.shape]
        return operator(shapes, ["float32"] * 2, [gate, up, dy], "swiglu_backward_op")


class _GELU(FusedFunction):
    def execute(self, x):
        return operator(x.shape, "float32", [x], "gelu_forward_op")

    def grad(self, dy):
        x = self.inputs[0]
        return operator(x.shape, "float32", [x, dy], "gelu_backward_op")


class _Rotary(FusedFunction):
    def execute(self, x, cos, sin):
        return self.turn(x, 1)

    def turn(self, x, sign):
        heads, size = x.shape[-2:]
        inputs = [x, *self.inputs[1:]]
        return operator(x.shape, "float32", inputs, "rotate_op", heads, size, sign)

    def grad(self, dy):
        return self.turn(dy, -1), None, None


class _Dropout(FusedFunction):
    def execute(self, x, p, seed):
        return self.drop(x)

    def drop(self, x):
        return operator(x.shape, "float32", [x], "dropout_op", *self.inputs[1:])

    def grad(self, dy):
        return self.drop(dy), None, None


class FusedDropout(nn.Dropout):
    """``nn.Dropout`` that stores no mask; its seeds come from NumPy's global generator.

    `jlora.runtime.set_seed` seeds that generator with Jittor's own.
    """

    def execute(self, x):
        if not self.is_train or self.p == 0:
            return x
        return _Dropout.apply(x, self.p, int(np.random.randint(2**31)))


rms_norm = _RMSNorm.apply
layer_norm = _LayerNorm.apply
swiglu = _SwiGLU.apply
gelu = _GELU.apply
rotary = _Rotary.apply
