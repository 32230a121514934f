"""GGUF files -> Hugging Face names, shapes and config.json, as numpy arrays.

What is particular to an architecture stands in `gguf_architectures`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.gguf_architecture import Architecture
from jlora.formats.gguf_architectures import ARCHITECTURES
from jlora.formats.gguf_kinds import READ, block_size, dequantize
from jlora.formats.gguf_rope import ROPE_TENSORS
from jlora.formats.lazy import Blocks, LazyArray
from jlora.formats.safetensors_file import check_unchanged, file_state, one_line
from jlora.system.errors import UserError
from jlora.system.files import os_error
from jlora.system.text import check_no_pointer

#: Limit of strings in lists of the metadata, each of which becomes several objects. 256,000 tokens
#: and their merges are about a million.
MOST_ENTRIES = 2**21

#: Settings under ``<architecture>.`` that change results and are not computed here, with the values
#: that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}
#: Settings that must be one number for all layers.
COUNTS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
)


@dataclass
class GGUFFile:
    """The content of a GGUF file, with Hugging Face's names.

    ``tensors``: name -> float32 array, read when it is asked for; ``config``: as in config.json;
    ``metadata``: the file's own key-value pairs (tokenizer included).
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, LazyArray] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)


def read_gguf(
    path: str | Path, architectures: Mapping[str, Architecture] = ARCHITECTURES
) -> GGUFFile:
    """Read a GGUF file of a known architecture.

    Args:
        architectures: those that are known, by their names.

    Raises:
        UserError: the file is not GGUF or truncated, or has an unknown architecture or tensor, or a
            type that is none of `gguf_kinds.READ`.
    """
    path = Path(path)
    reader = open_gguf(path)
    metadata = read_metadata(path, reader)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in architectures:
        raise UserError(
            f"{path}: architecture {name!r}; only {', '.join(architectures)} are read from GGUF"
        )
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise UserError(
            f"{path}: one of {parts} parts of a model; put them together first "
            "(llama-gguf-split --merge), or take the model from Hugging Face"
        )
    own = architectures[name]
    raw = read_tensors(path, reader)
    factors = {rope: raw.pop(rope).read() for rope in ROPE_TENSORS if rope in raw}
    tensors = rename(path, raw, own)
    try:
        check_metadata(path, own, metadata)
        config = own.read_config(own, path, metadata, tensors, factors)
    except KeyError as error:
        raise UserError(
            f"{path}: the GGUF file lacks {error.args[0]}; convert the model again with a current "
            "llama.cpp"
        ) from error
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{key}_token_id"] = None if value is None else int(value)
    for name, array in tensors.items():
        shape = array.shape[::-1] if own.is_transposed(name) else array.shape
        with fitting(path):
            own.check_shape(name, array.shape, config)
        read = functools.partial(_in_our_layout, own, name, array, config)
        tensors[name] = LazyArray(shape, np.float32, read, own.our_blocks(name, array, config))
    with fitting(path):
        own.join(tensors, config)
    return GGUFFile(path, config, tensors, metadata)


def _in_our_layout(
    own: Architecture, name: str, array: LazyArray, config: Mapping[str, Any]
) -> np.ndarray:
    return own.from_file(name, array.read(), config)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """An error of sizes that do not go together, as one line."""
    try:
        yield
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: its tensors and its numbers of heads do not fit together "
            f"({one_line(error)}); download it again"
        ) from error


def read_metadata(path: Path, reader: Any) -> dict[str, Any]:
    """The key-value pairs of an open file."""
    try:
        return {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:
        raise damaged(path, error) from error


def read_tensors(path: Path, reader: Any) -> dict[str, LazyArray]:
    """The tensors of an open file under its own names; float32 when they are read."""
    state, tensors = file_state(path), {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in READ:
            raise unread(path, tensor.name, kind)
        # GGUF lists the fastest dimension first.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if not shape or tensor.n_elements < 1 or shape[-1] % block_size(kind):
            raise damaged(
                path, ValueError(f"{tensor.name} has the shape {shape}, of {kind} numbers")
            )
        data = tensor.data
        place = int(tensor.data_offset), data.dtype, data.shape
        stored = functools.partial(_stored, path, state, *place)
        read = functools.partial(_dequantized, path, stored, kind, shape)
        blocks = Blocks(kind, stored) if len(shape) == 2 and block_size(kind) > 1 else None
        tensors[tensor.name] = LazyArray(shape, np.float32, read, blocks)
    return tensors


def _stored(
    path: Path, state: tuple[int, ...], start: int, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """A tensor as the file has it; of quantised ones the bytes of each row.

    It is read, not mapped as by the gguf package: pages of a mapped file that have been looked at
    count as the process's memory.
    """
    try:
        with open(path, "rb") as handle:
            values = np.fromfile(handle, dtype, int(np.prod(shape)), "", start)
    except OSError as error:
        raise os_error("read", path, error) from error
    check_unchanged(path, state)
    return values.reshape(shape)


def _dequantized(
    path: Path, stored: Callable[[], np.ndarray], kind: str, shape: tuple[int, ...]
) -> np.ndarray:
    """The numbers of a tensor."""
    data = stored()
    try:
        with np.errstate(all="ignore"):  # NaN and infinity come from the file
            return np.asarray(dequantize(data, kind)).reshape(shape)
    except Exception as error:
        raise damaged(path, error) from error


def open_gguf(path: Path) -> Any:
    """The gguf package's reader of a file, with checks that the package lacks.

    Raises:
        UserError: the file cannot be read, is not GGUF, or is damaged.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        entries = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            # The package reads past the end of the file without an error, and can loop forever.
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,} of {end:,}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            start = int(orig_offs)
            kind, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
            scalar = self.gguf_scalar_to_np.get(int(kind[0]))
            if scalar is not None:
                # The package makes two objects for every number; this makes one array of all.
                values = self._get(start + 12, scalar, count[0])
                types = [GGUFValueType.ARRAY, GGUFValueType(int(kind[0]))]
                return 12 + values.nbytes, [kind, count, values], [2], types
            self.entries += int(count[0])
            if self.entries > MOST_ENTRIES:
                raise ValueError(f"its metadata have over {MOST_ENTRIES:,} texts")
            return super()._get_field_parts(orig_offs, raw_type)

        def _get_tensor_info_field(self, orig_offs):
            field = super()._get_tensor_info_field(orig_offs)
            kind = int(field.parts[4][0])
            if kind not in set(GGMLQuantizationType):  # of a newer llama.cpp, or withdrawn
                raise unread(path, field.name, f"type {kind}")
            return field

    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
            check_no_pointer(head, path)
            if head[:4] != b"GGUF":
                raise UserError(f"{path}: not a GGUF file (it does not begin with `GGUF`)")
        reader = Reader(path)
        if sum(int(tensor.n_bytes) for tensor in reader.tensors) > len(reader.data):
            raise ValueError("its tensors overlap")
    except OSError as error:
        raise os_error("read", path, error) from error
    except UserError:
        raise
    except Exception as error:  # the reader indexes into the file without checks
        raise damaged(path, error) from error
    return reader


def unread(path: Path, name: str, kind: str) -> UserError:
    """The error for a tensor of a type that is not dequantized here."""
    return UserError(
        f"{path}: tensor {name} is quantized as {kind}; only {', '.join(READ)} are read: take a "
        "file of one of these kinds"
    )


def main_kind(path: Path) -> str:
    """The type of most numbers in a GGUF file, such as Q4_1."""
    sizes: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def damaged(path: Path, error: BaseException) -> UserError:
    """The error for a file that the gguf package cannot read."""
    return UserError(
        f"{path}: a damaged or incomplete GGUF file ({one_line(error)[:200]}); download it again"
    )


def rename(path: Path, raw: dict[str, LazyArray], own: Architecture) -> dict[str, LazyArray]:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    tensors = {}
    for name, array in raw.items():
        parts = name.split(".")
        middle = ""
        if parts[0] == "blk" and len(parts) == 4 and parts[1].isdecimal():
            middle = f"{own.blocks}.{parts[1]}."
            parts = parts[2:]
        if len(parts) != 2 or parts[0] not in own.names:
            raise UserError(
                f"{path}: tensor {name} has no place in this architecture (mixtures of experts and "
                "other variants are not supported)"
            )
        tensors[f"{middle}{own.names[parts[0]]}.{parts[1]}"] = array
    return tensors


def check_metadata(path: Path, own: Architecture, metadata: Mapping[str, Any]) -> None:
    """Refuse settings that change results and are not supported.

    Raises:
        UserError: one of `NEUTRAL` has another value, a sliding window is shorter than the context,
            or one of `COUNTS` is not a number, but for example a list with one for each layer.
    """

    def get(key: str) -> Any:
        return metadata.get(f"{own.name}.{key}")

    wrong = [
        key for key, fine in NEUTRAL.items()
        if key not in own.computed and get(key) is not None and get(key) not in fine
    ]  # fmt: skip
    window = get("attention.sliding_window")
    if not own.windows[0] and window and window < (get("context_length") or 0):
        wrong.append("attention.sliding_window")
    head = get("attention.key_length") or 0
    same = ("attention.value_length", *(() if own.part_turned else ("rope.dimension_count",)))
    for key in same:
        if head and get(key) is not None and get(key) != head:
            wrong.append(key)
    wrong += [k for k in COUNTS if get(k) is not None and (type(get(k)) is not int or get(k) < 1)]
    if wrong:
        raise UserError(
            f"{path}: {own.name}.{wrong[0]} is {get(wrong[0])!r}, which is not supported; take "
            "another model"
        )
