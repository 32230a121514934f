"""The structs that Python and the library share, and the check that both mean the same by them.

Each class mirrors the C++ struct of its name, field by field. The library says where it has its
fields (``struct_layouts`` in layouts.h), and `check` compares when it is loaded: a field that was
moved on one side alone would give wrong numbers, or a read of foreign memory, without a word.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_float, c_int64, c_void_p

from jlora.system.errors import UserError


class Array(Structure):
    """native.h: an operator's input or output."""

    _fields_ = [("data", c_void_p), ("size", c_int64), ("shape", c_int64 * 6), ("dims", c_int64)]


class AdamWNumbers(Structure):
    """adamw.h: what an update's arithmetic takes besides the arrays."""

    _fields_ = [
        (name, c_float)
        for name in ("beta1", "rest1", "beta2", "rest2", "rate", "root2", "decay", "eps", "clip")
    ]


class Weight(Structure):
    """tile_weights.h: a packed weight (n, k). In onednn_product.h n and k stand there too."""

    _fields_ = [("tiles", c_void_p), ("n", c_int64), ("k", c_int64), ("stride", c_int64),
                ("scales", c_void_p), ("kind", c_int64)]  # fmt: skip


class Norm(Structure):
    """norm.h: addresses of a norm's weight and bias, (C,) float32; LayerNorm is centred."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("centred", c_int64),
                ("offset", c_double)]  # fmt: skip


class LinearSpec(Structure):
    """block.h: a linear layer of a block and the shape of its low-rank branch."""

    _fields_ = [("weight", c_void_p), ("r", c_int64), ("blocks", c_int64), ("flags", c_int64),
                ("scale", c_double), ("p", c_double), ("trained", c_int64)]  # fmt: skip


class JointSpec(Structure):
    """block.h: linear layers that read the same rows."""

    _fields_ = [("count", c_int64), ("linears", LinearSpec * 3), ("bias", c_void_p)]


class BlockSpec(Structure):
    """block.h: a transformer block as it is trained."""

    _fields_ = [
        *((name, c_int64) for name in ("width", "heads", "key_heads", "head_size", "inner")),
        *((name, c_int64) for name in ("rotary", "neighbours", "grouped", "window")),
        ("scale", c_double), ("cap", c_double), ("activation", c_int64), ("gated", c_int64),
        ("eps", c_double), ("norms", Norm * 6), ("whole", c_int64),
        *((name, JointSpec) for name in ("qkv", "out", "up", "down")),
        ("given", c_int64),
    ]  # fmt: skip


class Linear(Structure):
    """linear.h: a linear layer of a model that decodes."""

    _fields_ = [("kind", c_int64), ("weight", c_void_p), ("n", c_int64), ("k", c_int64),
                ("bias", c_void_p), ("branches", c_void_p)]  # fmt: skip


class SlotBranch(Structure):
    """branches.h: the low-rank branch that an adapter has on a layer of a model that decodes."""

    _fields_ = [("A", c_void_p), ("B", c_void_p), ("from", c_void_p), ("rank", c_int64),
                ("reach", c_int64), ("narrow", c_int64), ("r", c_int64), ("blocks", c_int64),
                ("flags", c_int64), ("scale", c_double)]  # fmt: skip


class Block(Structure):
    """decoder.h: a transformer block as it decodes."""

    _fields_ = [
        *((name, Norm) for name in (
            "before_attention", "after_attention", "before_mlp", "after_mlp", "queries", "keys",
        )),
        ("qkv", Linear * 3), ("out", Linear), ("in", Linear * 2), ("down", Linear),
        ("rope", c_int64), ("window", c_int64),
    ]  # fmt: skip


class Model(Structure):
    """decoder.h: what a model that decodes has besides its blocks."""

    _fields_ = [
        *((name, c_int64) for name in ("layers", "C", "H", "G", "D", "inner")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("tokens", "packed_tokens", "positions", "frequencies")),
        ("last", Norm), ("activation", c_int64), ("gated", c_int64),
        *((name, c_int64) for name in ("ropes", "rotary", "neighbours", "long_from", "grouped")),
        ("whole", c_int64),
        *((name, c_double) for name in ("amplitude", "embedding_scale", "scale", "cap")),
        ("narrow", c_int64),
    ]  # fmt: skip


MIRRORS = (
    Array,
    AdamWNumbers,
    Weight,
    Norm,
    LinearSpec,
    JointSpec,
    BlockSpec,
    Linear,
    SlotBranch,
    Block,
    Model,
)


def check(layouts: str, mirrors: tuple[type[Structure], ...] = MIRRORS) -> None:
    """Compare the mirrors with the library's structs.

    Args:
        layouts: a line for each struct: its name, its size, and name, offset and size of each
            field. Structs that the library was compiled without are not there.

    Raises:
        UserError: size or place of a field differ.
    """
    said = {line.split()[0]: line.split()[1:] for line in layouts.strip().splitlines()}
    for mirror in mirrors:
        ours = [str(ctypes.sizeof(mirror))]
        for name, *_ in mirror._fields_:
            field = getattr(mirror, name)
            ours += [name, str(field.offset), str(field.size)]
        theirs = said.get(mirror.__name__)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"jlora's Python files and its C++ files do not fit together: {mirror.__name__} is "
                f"{' '.join(ours)} in structs.py and {' '.join(theirs)} in the library; install "
                "jlora again, all of one version"
            )
