"""Fused norms, activations and rotary embedding; weights are frozen and get no gradient."""

from __future__ import annotations

import numpy as np

from jlora.kernels.native import FusedFunction, operator

from jittor import nn  # isort: skip  (after jlora.kernels.native, which prepares Jittor's import)


def _call(shapes, count, inputs, call, **data):
    dtypes = ["float32"] * count if count > 1 else "float32"
    source = 'int64_t n = (int64_t)data["n"], rows = in0->num / n;\n' + call
    return operator(shapes, dtypes, inputs, source, "elementwise.h", **data)


class _RMSNorm(FusedFunction):
    def execute(self, x, weight, eps):
        n = x.shape[-1]
        y, rstd = _call(
            [x.shape, x.shape[:-1]],
            2,
            [x, weight],
            'jlora::rms_forward(in0_p, in1_p, out0_p, out1_p, rows, n, (float)data["eps"]);',
            n=n,
            eps=eps,
        )
        self.rstd = rstd
        return y

    def grad(self, dy):
        x, weight, _ = self.inputs
        dx = _call(
            x.shape,
            1,
            [x, weight, self.rstd, dy],
            "jlora::rms_backward(in0_p, in1_p, in2_p, in3_p, out0_p, rows, n);",
            n=x.shape[-1],
        )
        return dx, None, None


class _LayerNorm(FusedFunction):
    def execute(self, x, weight, bias, eps):
        n = x.shape[-1]
        y, mean, rstd = _call(
            [x.shape, x.shape[:-1], x.shape[:-1]],
            3,
            [x, weight, bias],
            "jlora::layer_forward(in0_p, in1_p, in2_p, out0_p, out1_p, out2_p, rows, n, "
            '(float)data["eps"]);',
            n=n,
            eps=eps,
        )
        self.mean, self.rstd = mean, rstd
        return y

    def grad(self, dy):
        x, weight, _, _ = self.inputs
        dx = _call(
            x.shape,
            1,
            [x, weight, self.mean, self.rstd, dy],
            "jlora::layer_backward(in0_p, in1_p, in2_p, in3_p, in4_p, out0_p, rows, n);",
            n=x.shape[-1],
        )
        return dx, None, None, None


class _SwiGLU(FusedFunction):
    def execute(self, gate, up):
        return _call(
            gate.shape, 1, [gate, up], "jlora::swiglu_forward(in0_p, in1_p, out0_p, rows);", n=1
        )

    def grad(self, dy):
        gate, up = self.inputs
        return _call(
            [gate.shape, up.shape],
            2,
            [gate, up, dy],
            "jlora::swiglu_backward(in0_p, in1_p, in2_p, out0_p, out1_p, rows);",
            n=1,
        )


class _GELU(FusedFunction):
    def execute(self, x):
        return _call(x.shape, 1, [x], "jlora::gelu_forward(in0_p, out0_p, rows);", n=1)

    def grad(self, dy):
        x = self.inputs[0]
        return _call(x.shape, 1, [x, dy], "jlora::gelu_backward(in0_p, in1_p, out0_p, rows);", n=1)


class _Rotary(FusedFunction):
    def execute(self, x, cos, sin):
        return self.turn(x, 1)

    def turn(self, x, sign):
        cos, sin = self.inputs[1:]
        heads, size = x.shape[-2:]
        return _call(
            x.shape,
            1,
            [x, cos, sin],
            'int64_t H = (int64_t)data["heads"];\n'
            'jlora::rotate(in0_p, in1_p, in2_p, out0_p, rows / H, H, n, (float)data["sign"]);',
            n=size,
            heads=heads,
            sign=sign,
        )

    def grad(self, dy):
        return self.turn(dy, -1), None, None


class _Dropout(FusedFunction):
    def execute(self, x, p, seed):
        return self.drop(x)

    def drop(self, x):
        p, seed = self.inputs[1:]
        return _call(
            x.shape, 1, [x],
            "jlora::dropout(in0_p, out0_p, rows, (uint64_t)data[\"seed\"], data[\"p\"]);",
            n=1, p=p, seed=seed,
        )  # fmt: skip

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
