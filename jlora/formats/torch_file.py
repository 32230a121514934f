"""PyTorch's .bin and .pt files -> numpy arrays, without PyTorch and without running anything.

Such a file is a pickle, a program that may call any function. `TensorUnpickler` allows only the few
names that saved tensors need. Both layouts are read: the zip archive (torch 1.6 and later) and the
older stream of pickles that starts with a magic number, which GPT-2's original checkpoints have.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jlora.formats.lazy import LazyArray
from jlora.formats.safetensors_file import (
    bfloat16_to_float32,
    check_unchanged,
    file_state,
    one_line,
    read_sharded,
)
from jlora.system.errors import UserError
from jlora.system.files import os_error
from jlora.system.text import check_no_pointer

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
#: Storage class -> dtype of its bytes; bfloat16 is read as bit patterns and converted to float32.
STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
DTYPE_NAMES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
#: Keys under which training programs store the weights, besides optimizer states and the like.
NESTED_KEYS = ("model_state_dict", "state_dict")


class Sealed:
    """A pickle can set the attributes of objects that it creates, but not of these."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes what it has made")


@dataclass(frozen=True)
class StorageType(Sealed):
    """A torch storage class, as the pickle names it."""

    name: str


@dataclass
class Storage(Sealed):
    """A flat array; ``read`` gives its values, which in the older layout follow the pickle."""

    kind: str
    count: int
    read: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class LazyTensor(Sealed):
    """A strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def check(self) -> None:
        """Raises: ValueError: the view does not lie inside its storage."""
        if self.storage.read is None:
            raise ValueError("its data is not in the file")
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or any(n < 0 for n in numbers):
            raise ValueError(f"shape {self.shape} with strides {self.stride}")
        if 0 in self.shape:
            return
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        elements = 1
        for n in self.shape:
            elements *= n
        # Views may repeat elements (stride 0), but a saved parameter is never larger than its
        # storage.
        if last >= self.storage.count or elements > self.storage.count:
            raise ValueError(
                f"shape {self.shape} at offset {self.offset} reaches past its storage of "
                f"{self.storage.count} values"
            )

    def numpy(self) -> np.ndarray:
        """A contiguous copy of a view that was checked, in the machine's own order of bytes."""
        values = self.storage.read()
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        if 0 in self.shape:
            return np.zeros(self.shape, values.dtype)
        size = values.dtype.itemsize
        steps = tuple(step * size for step in self.stride)
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps))


def rebuild_tensor(storage, offset, shape, stride, *_autograd) -> LazyTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return LazyTensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))


def rebuild_parameter(data, *_autograd) -> LazyTensor:
    """torch._utils._rebuild_parameter: the tensor itself."""
    return data


def shape_tuple(values=()) -> tuple:
    """torch.Size."""
    return tuple(values)


#: The callables that a file may use.
ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch", "Size"): shape_tuple,
}


class TensorUnpickler(pickle.Unpickler):
    """An unpickler for saved tensors and plain containers only."""

    def __init__(self, handle: BinaryIO, path: Path, find_storage):
        super().__init__(handle, encoding="utf-8")
        self.path, self.find_storage = path, find_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in ALLOWED:
            function = ALLOWED[module, name]
            # Each file gets functions of its own, because a pickle can set a function's attributes.
            return lambda *arguments: function(*arguments)
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return StorageType(name)
        if module == "torch" and name in DTYPE_NAMES:
            return name
        raise UserError(
            f"{self.path}: refused, because it asks to load {module}.{name}, which is no tensor "
            "and could run code; save only the weights (torch.save(model.state_dict(), ...)) or "
            "take a safetensors file"
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, count = pid[:5]
        # Only text is shown: the repr of another value may be larger than memory.
        if kind != "storage" or not isinstance(storage_type, StorageType):
            raise ValueError("an unknown reference")
        if not isinstance(key, (str, int)):
            raise ValueError("a storage whose key is no text")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage that is a view of another (torch before 0.4)")
        return self.find_storage(storage_type.name, str(key), int(count))


class BoundedFile:
    """A file whose reads are limited to its size, whatever lengths it contains."""

    def __init__(self, handle: BinaryIO):
        self.handle = handle
        self.size = handle.seek(0, os.SEEK_END)
        handle.seek(0)

    def read(self, count: int = -1) -> bytes:
        rest = self.size - self.handle.tell()
        return self.handle.read(rest if count < 0 else min(count, rest))

    def readline(self) -> bytes:
        return self.handle.readline()

    def tell(self) -> int:
        return self.handle.tell()

    def load(self, path: Path, find_storage) -> Any:
        """Unpickle the next value.

        Python's unpickler allocates the lengths that a file announces, and a table as long as the
        largest memo number; therefore the file is scanned for such numbers first.
        """
        start = self.handle.tell()
        for opcode, argument, position in pickletools.genops(self):
            if opcode.name.endswith("PUT") and int(argument) > position - start:
                raise ValueError(f"value number {argument} at byte {position}")
        self.handle.seek(start)
        return TensorUnpickler(self, path, find_storage).load()


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """`lazy_torch` with all arrays read."""
    return {name: array.read() for name, array in lazy_torch(path).items()}


def lazy_torch(path: str | Path) -> dict[str, LazyArray]:
    """The state dict of a .bin or .pt file, its arrays to be read; bfloat16 becomes float32.

    The state dict may also be under ``model_state_dict`` or ``state_dict``.

    Raises:
        UserError: the file is missing, truncated or damaged, has no tensors, or needs anything but
            tensors (which is named).
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            head = handle.read(512)
            handle.seek(0)
            check_no_pointer(head, path)
            if head[:4] == b"PK\x03\x04":
                tree = read_zip(handle, path)
            elif head[:1] == b"\x80":
                tree = read_legacy(handle, path)
            else:
                tar = head[257:262] == b"ustar"
                what = "torch 0.1's tar layout" if tar else "something else" if head else "empty"
                raise UserError(
                    f"{path}: not a file of torch.save ({what}); give a .bin, .pt or safetensors "
                    "file"
                )
        return to_arrays(tree, path, path.stat().st_size)
    except OSError as error:
        raise os_error("read", path, error) from error
    except UserError:
        raise
    # A damaged pickle can fail in any way that Python code can.
    except Exception as error:
        raise damaged(path, error) from error


def read_zip(handle: BinaryIO, path: Path) -> Any:
    """The zip layout: NAME/data.pkl and one file NAME/data/KEY for each storage."""
    with zipfile.ZipFile(handle) as archive:
        pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(
                f"{path}: a zip file without torch's data.pkl; give a file of "
                "torch.save(state_dict)"
            )
        root = pickles[0][: -len("data.pkl")]
        # torch does not compress. Compressed or overlapping entries could be of any size.
        size = handle.seek(0, os.SEEK_END)
        members = archive.infolist()
        if sum(max(m.file_size, m.compress_size) for m in members) > size:
            raise ValueError("it unpacks to more than its size")
        order = "<"
        if f"{root}byteorder" in archive.namelist():
            order = ">" if archive.read(f"{root}byteorder") == b"big" else "<"
        storages: dict[str, Storage] = {}
        state = file_state(path)

        def find_storage(kind: str, key: str, count: int) -> Storage:
            if key not in storages:
                dtype = np.dtype(STORAGES[kind]).newbyteorder(order)
                member = archive.getinfo(f"{root}data/{key}")
                if member.file_size != count * dtype.itemsize:
                    raise ValueError(
                        f"storage {key} has {member.file_size} bytes for {count} values"
                    )
                read = functools.partial(_zip_values, path, state, member.filename, dtype)
                storages[key] = Storage(kind, count, read)
            if storages[key].kind != kind:
                raise ValueError(f"storage {key} is used with two dtypes")
            return storages[key]

        return BoundedFile(io.BytesIO(archive.read(pickles[0]))).load(path, find_storage)


def read_legacy(handle: BinaryIO, path: Path) -> Any:
    """The older layout: magic number, protocol, system, tree, storage keys, then the data."""
    file = BoundedFile(handle)
    storages: dict[str, Storage] = {}

    def find_storage(kind: str, key: str, count: int) -> Storage:
        storage = storages.setdefault(key, Storage(kind, count))
        if (storage.kind, storage.count) != (kind, count):
            raise ValueError(f"storage {key} is described twice, differently")
        return storage

    def load() -> Any:
        return file.load(path, find_storage)

    if load() != LEGACY_MAGIC:
        raise UserError(
            f"{path}: a pickle, but none of torch.save; give a .bin, .pt or safetensors file"
        )
    if load() != LEGACY_PROTOCOL:
        raise UserError(f"{path}: an unknown version of torch's older layout")
    system = load()
    order = "<" if system.get("little_endian", sys.byteorder == "little") else ">"
    tree = load()
    keys, state = load(), file_state(path)
    for key in keys:
        storage = storages.get(str(key)) if isinstance(key, (str, int)) else None
        if storage is None:
            raise ValueError("data for an unknown storage")
        dtype = np.dtype(STORAGES[storage.kind]).newbyteorder(order)
        count = struct.unpack(order + "q", file.read(8))[0]
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} values instead of {storage.count}")
        begin = file.tell()
        if begin + count * dtype.itemsize > file.size:
            raise ValueError("the file ends inside its data")
        storage.read = functools.partial(_values, path, state, dtype, count, begin)
        handle.seek(begin + count * dtype.itemsize)
    return tree


def _zip_values(path: Path, state: tuple, member: str, dtype: np.dtype) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            values = np.frombuffer(archive.read(member), dtype)
    except OSError as error:
        raise os_error("read", path, error) from error
    # A wrong checksum, a flag or a form of compression that zipfile lacks: each has its own error.
    except Exception as error:
        raise damaged(path, error) from error
    check_unchanged(path, state)
    return values


def _values(path: Path, state: tuple, dtype: np.dtype, count: int, begin: int) -> np.ndarray:
    try:
        with open(path, "rb") as handle:
            values = np.fromfile(handle, dtype, count, "", begin)
    except OSError as error:
        raise os_error("read", path, error) from error
    check_unchanged(path, state)
    return values


def damaged(path: Path, error: BaseException) -> UserError:
    """The error for a file that cannot be understood."""
    return UserError(
        f"{path}: a damaged or incomplete PyTorch file ({type(error).__name__}: "
        f"{one_line(error)[:200]}); copy or download it again"
    )


def to_arrays(tree: Any, path: Path, size: int) -> dict[str, LazyArray]:
    """The state dict inside a loaded tree; ``size``: of the file."""
    found = type(tree).__name__
    tensors = {}
    if isinstance(tree, Mapping):
        inner = [tree[key] for key in NESTED_KEYS if isinstance(tree.get(key), Mapping)]
        tree = inner[0] if inner else tree
        names = [name[:40] for name in list(tree)[:5] if isinstance(name, str)]
        found = ", ".join(names) or "nothing"
        tensors = {k: v for k, v in tree.items() if isinstance(v, LazyTensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(
            f"{path}: no weights inside (found: {found}); a state dict is expected, at the top or "
            f"under {' or '.join(NESTED_KEYS)}"
        )
    arrays, total = {}, 0
    for name, tensor in tensors.items():
        try:
            tensor.check()
        except ValueError as error:
            raise UserError(f"{path}: tensor {name} is damaged: {error}") from error
        narrow = tensor.storage.kind == "BFloat16Storage"
        dtype = np.float32 if narrow else STORAGES[tensor.storage.kind]
        array = LazyArray(tensor.shape, dtype, functools.partial(_array, tensor))
        # Tied weights share a storage; thousands of views of one would fill the memory.
        total += array.nbytes
        if total > 4 * size:
            raise ValueError(f"its tensors share storages and take over {total:,} bytes")
        arrays[name] = array
    return arrays


def _array(tensor: LazyTensor) -> np.ndarray:
    array = tensor.numpy()
    return bfloat16_to_float32(array) if tensor.storage.kind == "BFloat16Storage" else array


def read_torch_sharded(index: str | Path) -> dict[str, np.ndarray]:
    """Read the files that a ``pytorch_model.bin.index.json`` names.

    Raises:
        UserError: as `read_torch`, or a file or tensor of the index is missing.
    """
    return read_sharded(index, read_torch)
