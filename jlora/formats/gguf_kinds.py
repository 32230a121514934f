"""The number types in GGUF files: which are read, which are written, and llama.cpp's mixtures."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.system.errors import UserError

#: What the gguf package dequantizes.
READ = (
    *("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
#: What the matrices of a file can be written as: one type, or one of `MIXTURES`.
WRITTEN = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q4_K_M", "Q5_K_M", "Q6_K"),
)
#: Name of a mixture, as llama-quantize has it -> the type of most of its matrices.
MIXTURES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"}
#: A K-quant has blocks of 256 numbers. Rows that do not divide by that get a type of 32.
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def kind_of(name: str, shape: tuple[int, ...], kind: str, layers: int, tied: bool) -> str:
    """The type in which a tensor is stored if ``kind`` is requested, as llama-quantize chooses.

    Args:
        name: in the file.
        kind: one of `WRITTEN`.
        layers: number of blocks of the model.
        tied: the model has no output matrix of its own, but the embedding.
    """
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    own = MIXTURES.get(kind, kind)
    if kind in MIXTURES:
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            own = "Q6_K"
        elif "attn_v." in name or "attn_qkv." in name or "ffn_down." in name:
            own = "Q6_K" if more_bits(int(name.split(".")[1]), layers) else own
    if shape[-1] % block_size(own):
        own = SMALLER_BLOCKS.get(own, "F16")
    return "F16" if shape[-1] % block_size(own) else own


def more_bits(layer: int, layers: int) -> bool:
    """Whether a mixture gives a layer more bits: those of both ends, and every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def block_size(kind: str) -> int:
    """How many numbers of a row share a scale."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def check_written(kind: str) -> None:
    """Refuse a kind that cannot be written here.

    Raises:
        UserError: none of `WRITTEN`, or a mixture without the library that quantizes it.
    """
    if kind not in WRITTEN:
        raise UserError(f"type {kind.lower()!r} is not one of {', '.join(WRITTEN).lower()}")
    if kind in MIXTURES:
        k_quantizer(kind)


def k_quantizer(kind: str) -> Any:
    """The package that quantizes to K-quants, which the gguf package only reads."""
    try:
        import libgguf
    except ImportError:
        raise UserError(
            f"{kind.lower()} needs the package libgguf: pip install libgguf; q8_0, q5_0 and q4_0 "
            "need none"
        ) from None
    return libgguf


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """float32 (..., n) -> float32, float16, or uint8 (..., bytes a row) for the other kinds."""
    from gguf import GGMLQuantizationType, quants

    array, number = np.ascontiguousarray(array), GGMLQuantizationType[kind]
    if kind not in SMALLER_BLOCKS:
        return quants.quantize(array, number)
    stored = k_quantizer(kind).quantize_rows(array, int(number))
    return np.asarray(stored).view(np.uint8).reshape(*array.shape[:-1], -1)


def dequantize(stored: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of `quantize`: float32 in the array's own shape; of "F32" a view."""
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(stored, GGMLQuantizationType[kind])
