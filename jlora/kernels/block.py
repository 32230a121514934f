"""A whole transformer block as one operator, forward and backward; see block.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.kernels import structs
from jlora.kernels.elementwise import ACTIVATIONS
from jlora.kernels.gpu_library import on_gpu
from jlora.kernels.native import FusedFunction, call, operator, retire
from jlora.kernels.packed_linear import Branch, PackedWeight, TrainedWeight
from jlora.system.runtime import jt

ROWS = 256
NORMS = ("rms", "layer")


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block: packed weight, bias (N,) or None, low-rank branch."""

    weight: PackedWeight | TrainedWeight
    bias: np.ndarray | None
    branch: Branch | None


@dataclass(frozen=True)
class Shape:
    """What a block's weights do not say.

    Attributes:
        heads, key_heads, head_size: of attention.
        eps: of all norms.
        norm: one of `NORMS`.
        activation: a key of `ACTIVATIONS`.
        gated: whether the activation of one layer multiplies another's result.
        offset: what is added to the norms' weights.
        rotary: how many numbers of queries and keys are turned by their positions, or 0.
        neighbours: whether those are pairs of neighbours, not of halves.
        scale, window, cap: see `jlora.models.attention.CausalAttention`.
        grouped: whether the one layer of queries, keys and values has them group by group.
        whole: whether norms of queries and keys are of all heads together.
    """

    heads: int
    key_heads: int
    head_size: int
    eps: float
    norm: str
    activation: str
    gated: bool
    offset: float
    rotary: int
    neighbours: bool
    scale: float
    window: int | None
    cap: float | None
    grouped: bool
    whole: bool

    def fits(self, width: int, inner: int) -> bool:
        """Whether the operator can do it: rows are handled 32 numbers at a time."""
        if on_gpu():
            # Larger heads have tiles that do not fit into shared memory.
            usual = self.rotary in (0, self.head_size) and self.head_size <= 128
            if not usual or self.neighbours or self.grouped:
                return False
        return all(n % 32 == 0 for n in (self.head_size, self.rotary, width, inner))


class BlockPlan:
    """The fixed part of a block: what the operator reads besides the arrays of a call."""

    def __init__(
        self,
        shape: Shape,
        norms: Sequence[np.ndarray | None],
        joints: Sequence[Sequence[Layer]],
        given: bool = False,
    ):
        """Describe a block.

        Args:
            norms: weight and bias of each: before and after attention, before and after the MLP,
                of queries, of keys; None: there is none.
            joints: the layers that read the same rows: query-key-value, output, up, down.
            given: whether norms and biases come with each call instead of being those here.
        """
        self._kept = [norms, joints]  # the operator has their addresses
        self.width = joints[0][0].weight.k
        self.branches = sum(layer.branch is not None for joint in joints for layer in joint)
        addresses = list(map(_pointer, norms))
        each = zip(addresses[::2], addresses[1::2])
        specs = [(weight, bias, shape.norm == "layer", shape.offset) for weight, bias in each]
        self.spec = structs.BlockSpec(
            self.width, shape.heads, shape.key_heads, shape.head_size, joints[3][0].weight.k,
            shape.rotary, shape.neighbours, shape.grouped, shape.window or 0, shape.scale,
            shape.cap or 0, ACTIVATIONS[shape.activation], shape.gated, shape.eps,
            (structs.Norm * len(specs))(*specs), shape.whole,
            *(self._joint(joint) for joint in joints), given,
        )  # fmt: skip
        self.trained = [x.weight for j in joints for x in j if isinstance(x.weight, TrainedWeight)]
        self.address = ctypes.addressof(self.spec)

    def _joint(self, layers: Sequence[Layer]) -> structs.JointSpec:
        joint = structs.JointSpec(count=len(layers))
        for i, layer in enumerate(layers):
            linear = joint.linears[i]
            linear.weight = layer.weight.address
            if isinstance(layer.weight, TrainedWeight):
                linear.trained = 2 if layer.weight.transposed else 1
            if layer.branch is not None:
                r, blocks, flags, scale, p = layer.branch.numbers
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
        return call("saved_bytes", ctypes.c_int64, self.address, -(-rows // ROWS) * ROWS)

    def __del__(self, retire=retire):  # see PackedWeight
        if hasattr(self, "address"):
            retire(self._kept, self.spec)


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class _Block(FusedFunction):
    def execute(self, x, plan, keep, seed, fixed, adapters, parameters, *differentiated):
        self.numbers = (plan.branches, keep, len(plan.trained))
        self.integers = (plan.address, *seed)
        # Of trained weights the operator reads the packed copies, and so does the backward pass.
        self.read = [*fixed, *adapters, *parameters, *(w.packed() for w in plan.trained)]
        size = plan.saved_bytes(x.numel() // plan.width) if keep else 1
        y, self.saved = operator(
            [x.shape, (size,)], ["float32", "uint8"], [x, *self.read], "block_forward_op",
            *self.numbers, integers=self.integers,
        )  # fmt: skip
        return y

    def grad(self, dy):
        x, *others = self.inputs
        differentiated = others[6:]
        branches = len(others[4])  # whose gradients the operator always makes
        wanted = [not v.is_stop_grad() for v in (x, *differentiated)]
        wanted[1 : 1 + branches] = [True] * branches
        shapes = [v.shape if w else (1,) for v, w in zip((x, *differentiated), wanted)]
        gradients = operator(
            shapes, ["float32"] * len(shapes), [x, *self.read, self.saved, dy],
            "block_backward_op", *self.numbers, integers=self.integers,
        )  # fmt: skip
        dx, *rest = (g if w else None for g, w in zip(gradients, wanted))
        return dx, *[None] * 6, *rest


def run_block(
    plan: BlockPlan,
    x: jt.Var,
    starts: jt.Var,
    rotation: Sequence[jt.Var],
    adapters: Sequence[jt.Var],
    keep: bool,
    seed: tuple[int, int],
    parameters: Sequence[jt.Var] = (),
) -> jt.Var:
    """Run a block; differentiable in x, the adapters, the parameters and the trained weights.

    Args:
        x: (..., width) float32, the sequences one after the other.
        starts: (n + 1,) int32, first row of each sequence, and the number of rows.
        rotation: cosine and sine, (rows, head_size / 2) each, where they turn by
            positions; else empty.
        adapters: A and B of each branch, in the order of the layers.
        keep: False recomputes the forward pass in the backward pass instead of keeping it.
        seed: of dropout, see `elementwise.dropout_seed`.
        parameters: where the plan's are given: weight and bias of each norm, then for each joint
            with a bias that of all its outputs.
    """
    fixed, weights = (starts, *rotation), [trained.weight for trained in plan.trained]
    return _Block.apply(
        x, plan, keep, seed, fixed, tuple(adapters), tuple(parameters),
        *adapters, *parameters, *weights,
    )  # fmt: skip
