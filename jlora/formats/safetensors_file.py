"""Safetensors files <-> numpy arrays, bfloat16 and sharded files included."""

from __future__ import annotations

import functools
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.lazy import LazyArray
from jlora.formats.rounding import narrow_rows
from jlora.system.errors import UserError, one_line
from jlora.system.files import atomic_path, os_error, read_text, write_text
from jlora.system.progress import progress
from jlora.system.text import check_no_pointer

#: safetensors' dtype names that numpy has; BF16 is converted, everything else is refused.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
#: Numbers of a tensor that are read at a time where they are converted.
PIECE = 1 << 20
#: What is written, and the bytes of a number.
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def bfloat16_to_float32(raw: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns (uint16 array): their upper 16 bits."""
    bits = raw.astype(np.uint32)
    bits <<= 16  # in place: an embedding takes a gigabyte
    return bits.view(np.float32)


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file, in the file's dtypes; bfloat16 becomes float32.

    Raises:
        UserError: the file is missing, truncated or corrupt, or has a dtype numpy lacks.
    """
    return {name: array.read() for name, array in lazy_safetensors(path).items()}


def lazy_safetensors(path: str | Path) -> dict[str, LazyArray]:
    """`read_safetensors` with arrays that are read when they are asked for.

    Raises:
        UserError: as `read_safetensors`; reading an array raises it too, if the file is gone.
    """
    path = Path(path)
    header, start = read_header(path)
    state, tensors = file_state(path), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind = entry["dtype"]
        if kind not in DTYPES and kind != "BF16":
            raise UserError(
                f"{path}: tensor {name} has dtype {kind}; only {', '.join(DTYPES)} and BF16 are "
                "read"
            )
        read = functools.partial(_read_tensor, path, name, entry, start, state)
        try:
            np.broadcast_to(np.zeros(()), entry["shape"])  # takes no memory
        except ValueError as error:  # one dimension is 0, others exceed NumPy's
            raise UserError(
                f"{path}: tensor {name} has the impossible shape {entry['shape']}: {error}"
            ) from error
        tensors[name] = LazyArray(entry["shape"], DTYPES.get(kind, np.float32), read)
    return tensors


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew."""
    try:
        stat = path.stat()
    except OSError as error:
        raise os_error("read", path, error) from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def check_unchanged(path: Path, state: tuple[int, ...]) -> None:
    """Raises: UserError: the file is another than when `file_state` was asked."""
    if file_state(path) != state:
        raise UserError(f"{path}: it was changed while it was being read; load it again")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text pairs in a safetensors header (empty when there are none)."""
    header, _ = read_header(Path(path))
    return dict(header.get("__metadata__") or {})


def read_header(path: Path) -> tuple[dict, int]:
    """Return the header of a checked file and the offset of its data.

    The safetensors package, which defines the format, checks sizes, offsets, overlaps and
    truncation. It is not used for reading because its numpy reader does not support bfloat16.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
            check_no_pointer(head, path)
            handle.seek(8)
            size = path.stat().st_size
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
            if length > size - 8:
                raise UserError(
                    f"{path}: not a complete safetensors file ({size} bytes); copy or download "
                    "it again"
                )
            text = handle.read(length)
        with safe_open(str(path), framework="numpy"):
            pass
        return json.loads(text), 8 + length
    except OSError as error:
        raise os_error("read", path, error) from error
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: not a valid safetensors file ({one_line(error)}); copy or download it again"
        ) from error


def _read_tensor(path: Path, name: str, entry: dict, start: int, state: tuple) -> np.ndarray:
    """One tensor from its header entry.

    Args:
        start: where the file's data begin.
        state: the file's, see `check_unchanged`.
    """
    kind, (first, last) = entry["dtype"], entry["data_offsets"]
    stored = np.dtype(DTYPES.get(kind, "<u2"))
    count = (last - first) // stored.itemsize
    try:
        with open(path, "rb") as handle:
            handle.seek(start + first)
            if kind == "BF16":
                values, read = np.empty(count, np.float32), 0
                for at in range(0, count, PIECE):  # so that nothing as large stands beside it
                    raw = np.fromfile(handle, stored, min(PIECE, count - at))
                    values[at : at + len(raw)] = bfloat16_to_float32(raw)
                    read += len(raw)
            else:
                values = np.fromfile(handle, stored, count)
                read = len(values)
    except OSError as error:
        raise os_error("read", path, error) from error
    check_unchanged(path, state)
    assert read == count, f"{path}: tensor {name} lies beyond its end"
    return values.reshape(entry["shape"])


def read_sharded(
    index: str | Path, read: Callable[[Path], dict[str, Any]] = read_safetensors
) -> dict[str, Any]:
    """Read the files that an index (``model.safetensors.index.json``) names, each with ``read``.

    Raises:
        UserError: the index is malformed, or a file or tensor that it names is missing.
    """
    index = Path(index)
    weight_map = read_index(index)
    tensors: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        tensors.update(read(index.parent / name))
    check_shards(index, weight_map, tensors)
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """The tensor-to-file map of an ``*.index.json``; checks that every file exists."""
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        files = sorted(set(weight_map.values()))
        wrong = [f for f in files if not isinstance(f, str) or Path(f).name != f]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index}: not a checkpoint index (no usable weight_map); download it again"
        ) from error
    if wrong:
        raise UserError(f"{index}: names a file outside its folder: {wrong[0]!r}")
    absent = [f for f in files if not (index.parent / f).is_file()]
    if absent:
        raise UserError(
            f"{index.parent}: {len(absent)} of {len(files)} files named by {index.name} are "
            f"missing: {', '.join(absent[:3])}; download them"
        )
    return weight_map


def check_shards(index: Path, weight_map: Mapping[str, str], tensors: Mapping) -> None:
    """Check that the files contained every tensor of the index."""
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise UserError(
            f"{index}: {len(lost)} tensors are not in the files it names, first {lost[0]}; "
            "download the files again"
        )


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray] | Mapping[str, LazyArray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays as a safetensors file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(arrays, str(temporary), metadata=dict(metadata or {"format": "np"}))
        except SafetensorError as error:
            # The package raises its own exception for a full disk or a missing permission.
            raise UserError(
                f"cannot write {path}: {one_line(error)}; free some space or choose another folder"
            ) from error
        # The package creates files that only their owner can read, regardless of the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)


def write_narrowed(
    path: str | Path,
    tensors: Mapping[str, np.ndarray | LazyArray],
    kind: str,
    metadata: Mapping[str, str],
) -> dict[str, float]:
    """Write float32 arrays as a safetensors file of one dtype, atomically, one after the other.

    The package wants all arrays at once, and its numpy functions do not support bfloat16, so the
    file is written here: the length of the header, the header (JSON, padded to 8 bytes), the data.

    Args:
        kind: "F32", "F16" or "BF16".

    Returns:
        The norm of the rounding error (`rounding.norm`) of each tensor.

    Raises:
        UserError: the file cannot be written, or a value is too large for float16.
    """
    header: dict = {"__metadata__": dict(metadata)}
    offset, errors = 0, {}
    for name, array in tensors.items():
        end = offset + BYTES[kind] * array.size
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bar = progress(offset, f"writing {Path(path).name}", "B")
    with atomic_path(path) as temporary, open(temporary, "wb") as handle, bar:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, array in tensors.items():
            squares = 0.0
            for stored, lost in narrow_rows(name, np.asarray(array), kind):
                handle.write(np.ascontiguousarray(stored).data)
                bar.update(stored.nbytes)
                squares += lost
            errors[name] = squares**0.5
    return errors


def write_shards(
    folder: Path,
    tensors: Mapping[str, np.ndarray | LazyArray],
    kind: str,
    metadata: Mapping[str, str],
    most: int,
) -> tuple[list[Path], dict[str, float]]:
    """Write a model's tensors into a folder as Hugging Face does.

    That is one file, or where they are more than ``most`` bytes several and an index; a larger
    tensor has a file of its own.

    Returns:
        The files of weights, and what `write_narrowed` returns.
    """
    parts: list[dict] = [{}]
    room = most
    for name, array in tensors.items():
        size = BYTES[kind] * array.size
        if size > room and parts[-1]:
            parts.append({})
            room = most
        parts[-1][name] = array
        room -= size
    if len(parts) == 1:
        path = folder / "model.safetensors"
        return [path], write_narrowed(path, tensors, kind, metadata)
    files, errors, weight_map = [], {}, {}
    for number, part in enumerate(parts, 1):
        files.append(folder / f"model-{number:05}-of-{len(parts):05}.safetensors")
        errors |= write_narrowed(files[-1], part, kind, metadata)
        weight_map |= dict.fromkeys(part, files[-1].name)
    total = BYTES[kind] * sum(array.size for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return files, errors
