"""Frozen linear layers with weights packed once: y = x W^T + b forward, dx = g W backward."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from jlora.errors import UserError
from jlora.kernels.native import FusedFunction, call, operator
from jlora.runtime import jt


class PackedWeight:
    """A weight (N, K) held twice in oneDNN's layout, for products with it and its transpose.

    In bf16 the two copies take as much memory as one float32 weight, which the model keeps beside
    them: saving, merging and `jlora.engine.restore` need it.
    """

    def __init__(self, weight: jt.Var, transposed: bool, bf16: bool):
        """Pack ``weight``, (N, K) as nn.Linear holds it, or (K, N) as Conv1D does (transposed)."""
        shape = tuple(weight.shape)
        self.n, self.k = shape[::-1] if transposed else shape
        self.bf16 = bf16
        self.forward_blob = pack(weight, self.n, self.k, transposed, bf16)
        self.backward_blob = pack(weight, self.k, self.n, not transposed, bf16)

    def __call__(self, x: jt.Var, bias: jt.Var | None = None) -> jt.Var:
        """(..., K) float32 -> (..., N) float32; ``bias`` (N,). Differentiable in x alone."""
        return _PackedProduct.apply(x, self, bias)

    def with_lora(self, x: jt.Var, bias: jt.Var | None, branch: Branch) -> jt.Var:
        """The same plus a low-rank branch; differentiable in x and the branch's A and B."""
        return _LoraProduct.apply(x, self, bias, branch, branch.A, branch.B)

    def unpack(self, transposed: bool) -> jt.Var:
        """The weight as it was given, to the precision kept."""
        shape = (self.k, self.n) if transposed else (self.n, self.k)
        numbers = (self.n, self.k, self.bf16, transposed)
        return operator(shape, "float32", [self.forward_blob], "unpack_op", *numbers)


def pack(weight: jt.Var, n: int, k: int, transposed: bool, bf16: bool) -> jt.Var:
    """The packed bytes of a weight, uint8; ``transposed`` says that it is stored as (K, N).

    Raises:
        UserError: oneDNN cannot do it on this processor.
    """
    # oneDNN may pad the layout, so it is asked for the size first.
    size = call("packed_bytes", ctypes.c_int64, n, k, bf16)
    if size == 0:
        raise UserError(
            f"oneDNN has no {'bf16' if bf16 else 'float32'} product for this processor; "
            "use precision fp32"
        )
    blob = operator((size,), "uint8", [weight], "pack_op", n, k, bf16, transposed)
    return blob.stop_grad()


@dataclass(frozen=True)
class Branch:
    """The low-rank branch of a layer: ``y += scale * (dropout(x) A^T) B^T`` by blocks.

    Attributes:
        A: (r * enabled, K); B: (N / blocks * enabled, r), the enabled blocks one after the other.
        enabled: one flag for each of the equal blocks of outputs.
        p, seed: of dropout; p 0 drops nothing.
    """

    A: jt.Var
    B: jt.Var
    enabled: tuple[bool, ...]
    scale: float
    p: float = 0.0
    seed: int = 0

    @property
    def numbers(self) -> tuple[float, ...]:
        flags = sum(1 << block for block, flag in enumerate(self.enabled) if flag)
        return self.B.shape[1], len(self.enabled), flags, self.scale, self.p, self.seed


def _multiply(x: jt.Var, blob: jt.Var, bias: jt.Var | None, n: int, k: int, bf16: bool) -> jt.Var:
    inputs = [x, blob] if bias is None else [x, blob, bias]
    shape = (*x.shape[:-1], n)
    return operator(shape, "float32", inputs, "multiply_op", n, k, bf16, bias is not None)


class _PackedProduct(FusedFunction):
    def execute(self, x, weight, bias):
        return _multiply(x, weight.forward_blob, bias, weight.n, weight.k, weight.bf16)

    def grad(self, dy):
        w = self.inputs[1]
        return _multiply(dy, w.backward_blob, None, w.k, w.n, w.bf16), None, None


class _LoraProduct(FusedFunction):
    def execute(self, x, weight, bias, branch, A, B):
        inputs = [x, weight.forward_blob, A, B] + ([] if bias is None else [bias])
        rows = x.numel() // weight.k
        kinds = weight.bf16 + 2 * (bias is not None)
        y, self.low = operator(
            [(*x.shape[:-1], weight.n), (rows, A.shape[0])], ["float32"] * 2, inputs,
            "lora_forward_op", *branch.numbers, weight.n, kinds,
        )  # fmt: skip
        return y

    def grad(self, dy):
        x, weight, _, branch, A, B = self.inputs
        dx, dA, dB = operator(
            [x.shape, A.shape, B.shape], ["float32"] * 3,
            [x, weight.backward_blob, A, B, self.low, dy],
            "lora_backward_op", *branch.numbers, weight.n, weight.bf16,
        )  # fmt: skip
        return dx, None, None, None, dA, dB
