"""Frozen linear layers with weights packed once: y = x W^T + b forward, dx = g W backward."""

from __future__ import annotations

from jlora.errors import UserError
from jlora.kernels.native import FusedFunction, operator
from jlora.runtime import jt

SIZES = 'int64_t n = (int64_t)data["n"], k = (int64_t)data["k"]; bool bf16 = data["bf16"] != 0;\n'


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

    def __call__(self, x: jt.Var) -> jt.Var:
        """(..., K) float32 -> (..., N) float32; differentiable in x alone."""
        return _PackedProduct.apply(x, self)

    def unpack(self, transposed: bool) -> jt.Var:
        """The weight as it was given, to the precision kept."""
        shape = (self.k, self.n) if transposed else (self.n, self.k)
        return operator(
            shape, "float32", [self.forward_blob],
            SIZES + 'jlora::unpack((void*)in0_p, out0_p, n, k, data["transposed"] != 0, bf16);',
            "packed_linear.h", onednn=True,
            n=self.n, k=self.k, transposed=transposed, bf16=self.bf16,
        )  # fmt: skip


def pack(weight: jt.Var, n: int, k: int, transposed: bool, bf16: bool) -> jt.Var:
    """The packed bytes of a weight, uint8; ``transposed`` says that it is stored as (K, N).

    Raises:
        UserError: oneDNN cannot do it on this processor.
    """
    sizes = {"n": n, "k": k, "bf16": bf16}
    # oneDNN may pad the layout, so it is asked for the size first.
    size = operator(
        (1,), "int64", [], SIZES + "out0_p[0] = jlora::packed_size(n, k, bf16);",
        "packed_linear.h", onednn=True, **sizes,
    ).item()  # fmt: skip
    if size == 0:
        raise UserError(
            f"oneDNN has no {'bf16' if bf16 else 'float32'} product for this processor; "
            "use precision fp32"
        )
    blob = operator(
        (size,), "uint8", [weight],
        SIZES + 'jlora::pack(in0_p, out0_p, n, k, data["transposed"] != 0, bf16);',
        "packed_linear.h", onednn=True, transposed=transposed, **sizes,
    )  # fmt: skip
    return blob.stop_grad()


def _multiply(x: jt.Var, blob: jt.Var, n: int, k: int, bf16: bool) -> jt.Var:
    return operator(
        (*x.shape[:-1], n), "float32", [x, blob],
        SIZES + "jlora::multiply(in0_p, (void*)in1_p, out0_p, in0->num / k, n, k, bf16);",
        "packed_linear.h", onednn=True, n=n, k=k, bf16=bf16,
    )  # fmt: skip


class _PackedProduct(FusedFunction):
    def execute(self, x, weight):
        return _multiply(x, weight.forward_blob, weight.n, weight.k, weight.bf16)

    def grad(self, dy):
        w = self.inputs[1]
        return _multiply(dy, w.backward_blob, w.k, w.n, w.bf16), None
