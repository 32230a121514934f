"""Linear layers over packed weights, y = x W^T + b and dx = dy W; trained ones are packed anew."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jlora.kernels import structs
from jlora.kernels.gpu_library import DeviceMemory, on_gpu
from jlora.kernels.native import (
    FusedFunction,
    call,
    free_retired,
    has,
    operator,
    retire,
    value_number,
)
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.system.unread import source_of, values

LINE = 64  # bytes; packed weights begin on a line of the cache
PIECE = 32 << 20  # bytes


# What packed weights are kept in, by the numbers of tile_weights.h. "int8" and "int4" multiply
# activations in int8 and gradients in bf16, "int8-both" both in int8.
KINDS = {"bf16": 0, "int8": 1, "int8-both": 2, "int4": 3}


#: GGUF's forms that int4 has, by the numbers of int4.h.
FORMS = {"Q4_0": 0, "Q4_1": 1, "Q4_K": 2}


class _Piece(threading.local):
    """The last piece of memory that a thread has taken weights from, and how much of it."""

    owner: Callable[[], np.ndarray | None] = staticmethod(lambda: None)  # a weak reference
    used = 0


_piece = _Piece()


def memory_for(size: int) -> np.ndarray:
    """``size`` bytes for a packed weight, from a line of the cache on.

    Of pieces of `PIECE` bytes, for which numpy asks the system for huge pages: a token that is
    decoded reads all weights once, faster than from pages of 4 KB. A piece lives as long as a
    weight in it.
    """
    owner, used = (_piece.owner(), _piece.used) if size < PIECE else (None, 0)
    if owner is None or used + size > owner.size:
        owner = np.empty(max(size, PIECE) + LINE, np.uint8)
        used = -owner.ctypes.data % LINE
        if size < PIECE:
            _piece.owner = weakref.ref(owner)
    if size < PIECE:
        _piece.used = used + -(-size // LINE) * LINE
    return owner[used : used + size]


def available(kind: str) -> bool:
    """Whether the compiled operators have products of this kind on this machine."""
    return has("packed_bytes") and packed_bytes(64, 64, kind) > 0


def packed_bytes(n: int, k: int, kind: str) -> int:
    """Bytes of a packed weight (n, k); 0 where this machine has no such products."""
    return call("packed_bytes", ctypes.c_int64, n, k, KINDS[kind])


def tiles() -> str | None:
    """What multiplies packed weights: "AMX", "AVX-512", "AVX2" or "NEON", None for oneDNN."""
    if not has("tile_products"):
        return None
    return {1: "AVX-512", 2: "AMX", 3: "AVX2", 4: "NEON"}.get(call("tile_products", ctypes.c_int64))


class PackedWeight:
    """A weight (N, K) in bf16, int8 or int4, in the layout that the processor multiplies best.

    By tiles (`tiles`) one packing serves the product and its transpose, 2 bytes a number, 1 or
    5/8; by oneDNN there is one of bf16 for each. int8 has a scale for each of the N outputs,
    int4 a scale and a minimum for each 32 inputs of an output.

    Attributes:
        taken: GGUF's form of the file's own blocks, if they were taken over as they are (of Q4_K
            but for the scales, which are rounded to float16); None: the weight was rounded.
    """

    def __init__(self, weight: jt.Var, transposed: bool, kind: str = "bf16"):
        """Pack ``weight``, (N, K) as nn.Linear holds it, or (K, N) as Conv1D does (transposed).

        Args:
            kind: a key of `KINDS`.

        Raises:
            UserError: the library cannot multiply that kind on this processor.
        """
        shape = tuple(weight.shape)
        self.n, self.k = shape[::-1] if transposed else shape
        size = packed_bytes(self.n, self.k, kind)
        if size == 0:
            where, instead = ("GPU", "plain") if on_gpu() else ("processor", "fp32")
            raise UserError(
                f"this {where} has no {kind} product of {self.n} by {self.k}; use precision "
                f"{instead}"
            )
        free_retired()
        if on_gpu():
            self._memory = DeviceMemory(size)
            begin = self._memory.address
        else:
            self._memory = memory_for(size)
            begin = self._memory.ctypes.data
        self._weight = structs.Weight()
        self.address = ctypes.addressof(self._weight)
        blocks = getattr(source_of(weight), "blocks", None)
        self.taken = None
        if kind == "int4" and blocks is not None and blocks.kind in FORMS and has("pack_blocks"):
            rows, self.taken = np.ascontiguousarray(blocks.read()), blocks.kind
            form = (rows.shape[1], FORMS[blocks.kind])
            sizes = (self.n, self.k)
            call("pack_blocks", None, rows.ctypes.data, *form, begin, self.address, *sizes)
            return
        # Jittor's memory itself, or the file's numbers without a copy in Jittor's memory.
        given = weight.data if source_of(weight) is None else values(weight)
        numbers = np.ascontiguousarray(given)
        sizes = (self.n, self.k, KINDS[kind], transposed)
        call("pack_weight", None, numbers.ctypes.data, begin, self.address, *sizes)

    def __del__(self, retire=retire):  # bound here: at Python's exit the module is emptied first
        if hasattr(self, "address"):
            retire(self._memory, self._weight)

    def __call__(self, x: jt.Var, bias: jt.Var | None = None) -> jt.Var:
        """(..., K) float32 -> (..., N) float32; ``bias`` (N,). Differentiable in x alone."""
        return _PackedProduct.apply(x, self, bias)

    def with_lora(self, x: jt.Var, bias: jt.Var | None, branch: Branch) -> jt.Var:
        """The same plus a low-rank branch; differentiable in x and the branch's A and B."""
        return _LoraProduct.apply(x, self, bias, branch, branch.A, branch.B)

    def settled(self) -> PackedWeight:
        """See `TrainedWeight.settled`."""
        return self

    def rows(self, ids: jt.Var) -> jt.Var:
        """Rows of the weight: int32 (...) -> (..., K) float32. Not by oneDNN."""
        shape = (*ids.shape, self.k)
        rows = operator(shape, "float32", [ids], "rows_op", integers=[self.address])
        return rows.stop_grad()

    def unpack(self, transposed: bool) -> np.ndarray:
        """The weight as it was given, to the precision kept; float32."""
        result = np.empty((self.k, self.n) if transposed else (self.n, self.k), np.float32)
        call("unpack_weight", None, self.address, result.ctypes.data, transposed)
        return result


class TrainedWeight:
    """A weight (N, K) that is trained, and the bf16 copy of it that products read.

    The copy is an array of Jittor's graph, made once for each value that the weight takes, so what
    has not run yet keeps the one it was meant for. By tiles alone.
    """

    def __init__(self, weight: jt.Var, transposed: bool):
        """``weight``: (N, K) as nn.Linear holds it, or (K, N) as Conv1D does (transposed)."""
        shape = tuple(weight.shape)
        self.weight, self.transposed = weight, transposed
        self.n, self.k = shape[::-1] if transposed else shape
        self.bytes = call("trained_bytes", ctypes.c_int64, self.n, self.k)
        self._shape = structs.Weight(n=self.n, k=self.k)
        self.address = ctypes.addressof(self._shape)  # what a plan reads of it
        self._copy, self._copied = None, None

    def packed(self) -> jt.Var:
        """The copy of the weight as it is now, uint8."""
        number = value_number(self.weight)
        if self._copied != number:
            numbers = (self.n, self.k, self.transposed)
            copy = operator((self.bytes,), "uint8", [self.weight], "pack_op", *numbers)
            self._copy, self._copied = copy.stop_grad(), number
        return self._copy

    def settled(self) -> SettledWeight:
        """The weight as it is now, for what reads packed weights by their address."""
        return SettledWeight(self)

    def __call__(self, x: jt.Var, bias: jt.Var | None = None) -> jt.Var:
        """(..., K) float32 -> (..., N) float32; differentiable in x, the weight and ``bias``."""
        return _TrainedProduct.apply(x, self.weight, bias, self)


class SettledWeight:
    """A `TrainedWeight` at one moment; ``address`` is good as long as this is held."""

    def __init__(self, trained: TrainedWeight):
        self._copy, self._weight = trained.packed(), structs.Weight()
        self.address = ctypes.addressof(self._weight)
        call("describe_trained", None, self._copy.raw_ptr, self.address, trained.n, trained.k)


@dataclass(frozen=True)
class Branch:
    """The low-rank branch of a layer: ``y += scale * (dropout(x) A^T) B^T`` by blocks.

    Attributes:
        A: (r * enabled, K); B: (N / blocks * enabled, r), the enabled blocks one after the other.
        enabled: one flag for each of the equal blocks of outputs.
        p: of dropout; 0 drops nothing.
        seed, first_row: what decides the dropout, see `elementwise.dropout_seed`.
    """

    A: jt.Var
    B: jt.Var
    enabled: tuple[bool, ...]
    scale: float
    p: float = 0.0
    seed: int = 0
    first_row: int = 0

    @property
    def flags(self) -> int:
        return sum(1 << block for block, flag in enumerate(self.enabled) if flag)

    @property
    def numbers(self) -> tuple[float, ...]:
        r, blocks = self.B.shape[1], len(self.enabled)
        return r, blocks, self.flags, self.scale, self.p


class _PackedProduct(FusedFunction):
    def execute(self, x, weight, bias):
        inputs = [x] if bias is None else [x, bias]
        shape = (*x.shape[:-1], weight.n)
        numbers = (False, bias is not None)
        return operator(
            shape, "float32", inputs, "multiply_op", *numbers, integers=[weight.address]
        )

    def grad(self, dy):
        weight = self.inputs[1]
        shape = (*dy.shape[:-1], weight.k)
        dx = operator(shape, "float32", [dy], "multiply_op", True, False, integers=[weight.address])
        return dx, None, None


class _LoraProduct(FusedFunction):
    def execute(self, x, weight, bias, branch, A, B):
        inputs = [x, A, B] + ([] if bias is None else [bias])
        rows = x.numel() // weight.k
        y, self.low = operator(
            [(*x.shape[:-1], weight.n), (rows, A.shape[0])], ["float32"] * 2, inputs,
            "lora_forward_op", *branch.numbers, bias is not None,
            integers=[weight.address, branch.seed, branch.first_row],
        )  # fmt: skip
        return y

    def grad(self, dy):
        x, weight, _, branch, A, B = self.inputs
        dx, dA, dB = operator(
            [x.shape, A.shape, B.shape], ["float32"] * 3, [x, A, B, self.low, dy],
            "lora_backward_op", *branch.numbers,
            integers=[weight.address, branch.seed, branch.first_row],
        )  # fmt: skip
        return dx, None, None, None, dA, dB


class _TrainedProduct(FusedFunction):
    def execute(self, x, weight, bias, trained):
        self.packed = trained.packed()
        inputs = [x, self.packed] + ([] if bias is None else [bias])
        numbers = (trained.n, trained.k, bias is not None)
        shape = (*x.shape[:-1], trained.n)
        return operator(shape, "float32", inputs, "trained_forward_op", *numbers)

    def grad(self, dy):
        x, weight, bias, trained = self.inputs
        wanted = [v is not None and not v.is_stop_grad() for v in (x, weight, bias)]
        shapes = [v.shape if w else (1,) for v, w in zip((x, weight, bias), wanted)]
        gradients = operator(
            shapes, ["float32"] * 3, [x, self.packed, dy], "trained_backward_op",
            trained.n, trained.k, trained.transposed, *wanted,
        )  # fmt: skip
        return *(g if w else None for g, w in zip(gradients, wanted)), None
