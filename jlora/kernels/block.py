"""A whole transformer block as one operator, forward and backward; see block.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.kernels.native import FusedFunction, call, operator, retire
from jlora.kernels.packed_linear import Branch, PackedWeight
from jlora.runtime import jt

ROWS = 256
i64, address, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class _Linear(ctypes.Structure):
    _fields_ = [("weight", address), ("r", i64), ("blocks", i64), ("flags", i64),
                ("scale", real), ("p", real)]  # fmt: skip


class _Joint(ctypes.Structure):
    _fields_ = [("count", i64), ("linears", _Linear * 3), ("bias", address)]


class _Spec(ctypes.Structure):
    _fields_ = [
        *((name, i64) for name in ("width", "heads", "key_heads", "head_size", "inner", "gated")),
        ("eps", real),
        *((name, address) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, _Joint) for name in ("qkv", "out", "up", "down")),
    ]


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer of a block: packed weight, bias (N,) or None, low-rank branch."""

    weight: PackedWeight
    bias: np.ndarray | None
    branch: Branch | None


@dataclass(frozen=True)
class Shape:
    """What a block's weights do not say. ``gated``: Llama's norm, rotary embedding and SwiGLU."""

    heads: int
    key_heads: int
    head_size: int
    gated: bool
    eps: float

    def fits(self, width: int, inner: int) -> bool:
        """Whether the operator can do it: rows are handled 32 numbers at a time."""
        return self.head_size % 32 == 0 and width % 32 == 0 and inner % 32 == 0


class BlockPlan:
    """The fixed part of a block: what the operator reads besides the arrays of a call."""

    def __init__(
        self, shape: Shape, norms: Sequence[np.ndarray | None], joints: Sequence[Sequence[Layer]]
    ):
        """Describe a block.

        Args:
            norms: weight and bias of the first norm and of the second, biases None where gated.
            joints: the layers that read the same rows: query-key-value, output, up, down.
        """
        self._kept = [norms, joints]  # the operator has their addresses
        self.width = joints[0][0].weight.k
        self.branches = sum(layer.branch is not None for joint in joints for layer in joint)
        self.spec = _Spec(
            self.width, shape.heads, shape.key_heads, shape.head_size, joints[2][0].weight.n,
            shape.gated, shape.eps, *(_pointer(norm) for norm in norms),
            *(self._joint(joint) for joint in joints),
        )  # fmt: skip
        self.address = ctypes.addressof(self.spec)
        self.gated = shape.gated

    def _joint(self, layers: Sequence[Layer]) -> _Joint:
        joint = _Joint(count=len(layers))
        for i, layer in enumerate(layers):
            linear = joint.linears[i]
            linear.weight = layer.weight.address
            if layer.branch is not None:
                r, blocks, flags, scale, p, _ = layer.branch.numbers
                linear.r, linear.blocks, linear.flags = r, blocks, flags
                linear.scale, linear.p = scale, p
        if any(layer.bias is not None for layer in layers):
            parts = [np.zeros(x.weight.n, "f") if x.bias is None else x.bias for x in layers]
            bias = np.concatenate(parts)
            self._kept.append(bias)
            joint.bias = _pointer(bias)
        return joint

    def saved_bytes(self, rows: int) -> int:
        """Room for what the forward pass keeps for the backward pass.

        For a multiple of `ROWS`: Jittor's allocator uses freed memory again where sizes are
        equal, and pages that nobody touches are not there.
        """
        return call("saved_bytes", i64, self.address, -(-rows // ROWS) * ROWS)

    def __del__(self):
        if hasattr(self, "address") and retire is not None:  # it is while Python ends
            retire(self._kept, self.spec)


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class _Block(FusedFunction):
    def execute(self, x, plan, keep, seed, *arrays):
        rows = x.numel() // plan.width
        self.numbers = (plan.address, plan.branches, seed, keep)
        size = plan.saved_bytes(rows) if keep else 1
        y, self.saved = operator(
            [x.shape, (size,)], ["float32", "uint8"], [x, *arrays], "block_forward_op",
            *self.numbers,
        )  # fmt: skip
        return y

    def grad(self, dy):
        x, plan, _, _, *arrays = self.inputs
        wanted = not x.is_stop_grad()
        adapters = arrays[len(arrays) - 2 * plan.branches :]
        shapes = [x.shape if wanted else (1,), *(a.shape for a in adapters)]
        gradients = operator(
            shapes, ["float32"] * len(shapes), [x, *arrays, self.saved, dy], "block_backward_op",
            *self.numbers, wanted,
        )  # fmt: skip
        others = [None] * (3 + len(arrays) - len(adapters))
        return gradients[0] if wanted else None, *others, *gradients[1:]


def run_block(
    plan: BlockPlan,
    x: jt.Var,
    starts: jt.Var,
    rotation: Sequence[jt.Var],
    adapters: Sequence[jt.Var],
    keep: bool,
    seed: int,
) -> jt.Var:
    """Run a block; differentiable in x and the adapters.

    Args:
        x: (..., width) float32, the sequences one after the other.
        starts: (n + 1,) int32, first row of each sequence, and the number of rows.
        rotation: cosine and sine, (rows, head_size / 2) each, where the plan is gated; else empty.
        adapters: A and B of each branch, in the order of the layers.
        keep: False recomputes the forward pass in the backward pass instead of keeping it.
        seed: of dropout, below 2**31.
    """
    return _Block.apply(x, plan, keep, seed, starts, *rotation, *adapters)
