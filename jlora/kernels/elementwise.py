"""Fused norms, activations and rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from jlora.kernels.native import FusedFunction, operator
from jlora.system.runtime import nn

#: Numbers in activation.h.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _RMSNorm(FusedFunction):
    def execute(self, x, weight, eps, offset):
        shapes = [x.shape, x.shape[:-1]]
        y, self.rstd = operator(
            shapes, ["float32"] * 2, [x, weight], "rms_forward_op", x.shape[-1], eps, offset
        )
        return y

    def grad(self, dy):
        x, weight, _, offset = self.inputs
        inputs = [x, weight, self.rstd, dy]
        return *_norm_gradients("rms_backward_op", inputs, [weight], offset), None, None


class _LayerNorm(FusedFunction):
    def execute(self, x, weight, bias, eps):
        shapes = [x.shape, x.shape[:-1], x.shape[:-1]]
        y, self.mean, self.rstd = operator(
            shapes, ["float32"] * 3, [x, weight, bias], "layer_forward_op", x.shape[-1], eps
        )
        return y

    def grad(self, dy):
        x, weight, bias, _ = self.inputs
        inputs = [x, weight, self.mean, self.rstd, dy]
        return *_norm_gradients("layer_backward_op", inputs, [weight, bias]), None


def _norm_gradients(function, inputs, parameters, *numbers):
    """Gradients of x, the first input, and of those parameters that are trained."""
    x, trained = inputs[0], [not parameter.is_stop_grad() for parameter in parameters]
    shapes = [x.shape, *(p.shape if t else (1,) for p, t in zip(parameters, trained))]
    dtypes = ["float32"] * len(shapes)
    dx, *gradients = operator(shapes, dtypes, inputs, function, x.shape[-1], *trained, *numbers)
    return dx, *(gradient if t else None for gradient, t in zip(gradients, trained))


class _Embedding(FusedFunction):
    def execute(self, weight, ids):
        shape = (*ids.shape, weight.shape[1])
        return operator(shape, "float32", [weight, ids], "embedding_op")

    def grad(self, dy):
        weight, ids = self.inputs
        return operator(weight.shape, "float32", [dy, ids], "embedding_back_op"), None


class _Gated(FusedFunction):
    def execute(self, gate, up, kind):
        return operator(gate.shape, "float32", [gate, up], "gated_forward_op", kind)

    def grad(self, dy):
        gate, up, kind = self.inputs
        shapes, inputs = [gate.shape, up.shape], [gate, up, dy]
        return *operator(shapes, ["float32"] * 2, inputs, "gated_backward_op", kind), None


class _GELU(FusedFunction):
    def execute(self, x):
        return operator(x.shape, "float32", [x], "gelu_forward_op")

    def grad(self, dy):
        x = self.inputs[0]
        return operator(x.shape, "float32", [x, dy], "gelu_backward_op")


class _Rotary(FusedFunction):
    def execute(self, x, cos, sin, neighbours):
        return self.turn(x, 1)

    def turn(self, x, sign):
        _, cos, sin, neighbours = self.inputs
        numbers = *x.shape[-2:], 2 * cos.shape[-1], neighbours, sign
        return operator(x.shape, "float32", [x, cos, sin], "rotate_op", *numbers)

    def grad(self, dy):
        return self.turn(dy, -1), None, None, None


class _Dropout(FusedFunction):
    def execute(self, x, p, seed):
        return self.drop(x)

    def drop(self, x):
        p, seed = self.inputs[1:]
        return operator(x.shape, "float32", [x], "dropout_op", p, x.shape[-1], integers=seed)

    def grad(self, dy):
        return self.drop(dy), None, None


_first_row = ContextVar("first_row", default=0)


@contextmanager
def rows_from(first_row: int) -> Iterator[None]:
    """Number the rows from ``first_row`` on in the dropouts of a forward pass.

    Processes that share a batch each have some of its rows. What is dropped of a row is a function
    of the seed and its number in the whole batch, so it does not depend on how many they are.
    """
    token = _first_row.set(first_row)
    try:
        yield
    finally:
        _first_row.reset(token)


def dropout_seed() -> tuple[int, int]:
    """What decides the next dropout, as ``Seed`` in elementwise.h: a seed, and the first row.

    The seed comes from NumPy's global generator, which `set_seed` seeds.
    """
    return int(np.random.randint(2**31)), _first_row.get()


class FusedDropout(nn.Dropout):
    """``nn.Dropout`` that stores no mask; for seeds see `dropout_seed`."""

    def execute(self, x):
        if not self.is_train or self.p == 0:
            return x
        return _Dropout.apply(x, self.p, dropout_seed())


embedding = _Embedding.apply
layer_norm = _LayerNorm.apply
gelu = _GELU.apply


def rms_norm(x, weight, eps, offset=0.0):
    return _RMSNorm.apply(x, weight, eps, offset)


def swiglu(gate, up):
    """silu(gate) * up."""
    return _Gated.apply(gate, up, ACTIVATIONS["silu"])


def geglu(gate, up):
    """gelu(gate) * up, by the tanh approximation."""
    return _Gated.apply(gate, up, ACTIVATIONS["gelu_tanh"])


def rotary(x, cos, sin, neighbours=False):
    """Turn pairs of a head's halves, or of neighbours; see `jlora.models.rope`."""
    return _Rotary.apply(x, cos, sin, neighbours)
