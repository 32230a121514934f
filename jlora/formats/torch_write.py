"""Numpy arrays -> a .pt file that ``torch.load(path, weights_only=True)`` reads; no PyTorch here.

The layout is torch.save's zip archive: a pickle that describes each tensor as a view of a storage,
and the storages as raw bytes. Python's pickler cannot refer to classes of a package that is not
installed, so the few pickle operations are written directly.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.system.files import atomic_path

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOAT_STORAGE = b"ctorch\nFloatStorage\n"
NO_HOOKS = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def write_torch(
    path: str | Path, tensors: Mapping[str, np.ndarray], nested: str | None = None
) -> None:
    """Write a state dict of float32 tensors, atomically.

    Args:
        nested: store it in a dict under this key, such as ``"model_state_dict"``.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in tensors.items()}
    items = [plain(name) + tensor(i, array) for i, (name, array) in enumerate(arrays.items())]
    state = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    if nested is not None:
        state = pickle.EMPTY_DICT + plain(nested) + state + pickle.SETITEM
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\2" + state + pickle.STOP)
        archive.writestr("archive/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{number}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def tensor(number: int, array: np.ndarray) -> bytes:
    """The call ``_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)``."""
    storage = plain("storage") + FLOAT_STORAGE + plain(str(number)) + plain("cpu")
    storage = pickle.MARK + storage + plain(array.size) + pickle.TUPLE + pickle.BINPERSID
    strides = tuple(step // array.itemsize for step in array.strides)
    view = plain(0) + plain(array.shape) + plain(strides) + pickle.NEWFALSE
    return REBUILD + pickle.MARK + storage + view + NO_HOOKS + pickle.TUPLE + pickle.REDUCE


def plain(value: Any) -> bytes:
    """The pickle operations for a string, a number or a tuple of numbers."""
    return pickle.dumps(value, 2)[2:-1]  # between the protocol number and the final stop
