"""Hugging Face names, shapes and config.json -> a GGUF file: the inverse of `gguf_file`.

Names, layouts, metadata and the choice of types follow llama.cpp's ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.gguf_architecture import Architecture
from jlora.formats.gguf_kinds import kind_of
from jlora.formats.gguf_rope import rope_tensors
from jlora.formats.lazy import LazyArray
from jlora.formats.rounding import narrow_rows
from jlora.system.errors import UserError
from jlora.system.files import atomic_path
from jlora.system.progress import progress


def write_gguf(
    path: str | Path,
    architecture: Architecture,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | LazyArray],
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> dict[str, float]:
    """Write a GGUF file, atomically, one tensor after the other.

    Args:
        architecture: how models of this family stand in GGUF files.
        config: config.json with every field that the family's ``to_dict`` gives.
        tensors: float32 arrays by Hugging Face's names; a tied head is left out.
        kind: of the matrices, one of `gguf_kinds.WRITTEN`. Vectors, position embeddings and
            rotary factors stay F32; matrices whose rows do not divide into blocks get another type
            (`gguf_kinds.kind_of`).
        tokenizer: metadata as `Tokenizer.to_gguf` gives it.
        name: ``general.name``.

    Returns:
        The norm of the rounding error (`rounding.norm`) of each tensor, by Hugging Face's name.

    Raises:
        UserError: the file cannot be written, or a weight does not fit into ``kind``.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    errors: dict[str, float] = {}
    tied = architecture.names.get("output", "none") + ".weight" not in tensors
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, architecture.name)
        try:
            add_metadata(writer, architecture, config, kind, name)
            for key, value in (tokenizer or {}).items():
                add_value(writer, key, value)
            ropes = rope_tensors(config)
            for rope, factors in ropes.items():
                add_tensor_info(writer, rope, factors.shape, GGMLQuantizationType.F32)
            layers, kinds = block_count(architecture, tensors), {}
            shapes = {name: np.broadcast_to(np.float32(0), a.shape) for name, a in tensors.items()}
            for _, new, part, shapeless in stored_parts(architecture, config, shapes):
                shape = architecture.file_shape(part, shapeless.shape)
                own = kinds[new] = GGMLQuantizationType[kind_of(new, shape, kind, layers, tied)]
                add_tensor_info(writer, new, shape, own)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for factors in ropes.values():
                writer.write_tensor_data(factors)
            with progress(len(kinds), f"writing {Path(path).name}", "tensor") as bar:
                for old, new, part, array in stored_parts(architecture, config, tensors):
                    rows = architecture.to_file(part, array, config)
                    pieces = list(narrow_rows(old, rows, kinds[new].name))
                    squares = errors.get(old, 0.0) ** 2 + sum(lost for _, lost in pieces)
                    errors[old] = squares**0.5
                    writer.write_tensor_data(np.concatenate([stored for stored, _ in pieces]))
                    bar.update()
        finally:
            writer.close()
    return errors


def block_count(own: Architecture, names: Iterable[str]) -> int:
    """How many blocks a model's tensors belong to."""
    start = own.blocks + "."
    return len({name[len(start) :].split(".")[0] for name in names if name.startswith(start)})


def stored_parts(
    own: Architecture, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray | LazyArray]
) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """(Hugging Face's name, GGUF's, ours of the part, the part in our layout) of every tensor."""
    inverse = {theirs: ours for ours, theirs in own.names.items()}
    for name, whole in tensors.items():
        for part, array in own.split(name, np.asarray(whole), config):
            block = re.match(rf"{re.escape(own.blocks)}\.(\d+)\.", part)
            module, _, last = part[block.end() if block else 0 :].rpartition(".")
            prefix = f"blk.{block.group(1)}." if block else ""
            if module not in inverse:
                raise UserError(f"{name} has no place in a GGUF file of architecture {own.name}")
            yield name, f"{prefix}{inverse[module]}.{last}", part, array


def add_tensor_info(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    """Announce a tensor whose data come later, in the order of these calls."""
    from gguf import GGML_QUANT_SIZES

    numbers, size = GGML_QUANT_SIZES[kind]
    bytes_ = int(np.prod(shape)) // numbers * size
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    if plain is None:  # the package takes the shape of the bytes
        shape = (*shape[:-1], shape[-1] // numbers * size)
    writer.add_tensor_info(name, shape, np.dtype(plain or np.uint8), bytes_, kind)


def add_metadata(
    writer: Any, own: Architecture, config: Mapping[str, Any], kind: str, name: str | None
) -> None:
    """What llama.cpp wants to know of a model, tokenizer aside."""
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    writer.add_type(GGUFType.MODEL)
    if name:
        writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    own.write_metadata(writer, config)


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add one key with a plain Python value."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value < 0:
        writer.add_int32(key, value)
    else:
        writer.add_uint32(key, value)
