"""The structs that Python and the compiled library share."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from needs import needs_operators

from jlora.kernels import native, structs
from jlora.system.errors import UserError
from jlora.system.runtime import jt

pytestmark = needs_operators


def layouts() -> str:
    return native.library().struct_layouts().decode()


def test_the_library_says_every_struct_that_it_has():
    said = {line.split()[0] for line in layouts().strip().splitlines()}
    names = {mirror.__name__ for mirror in structs.MIRRORS}
    if not native.has("tile_products"):
        names.remove("Weight")  # oneDNN has its own, with static_assert
    assert said == names if native.has("packed_bytes") else said == {"Array", "AdamWNumbers"}


def moved(fields: list) -> list:
    return [fields[1], fields[0], *fields[2:]]


def narrower(fields: list) -> list:
    return [*fields[:-1], (fields[-1][0], ctypes.c_int16)]


@pytest.mark.parametrize("change", [moved, lambda fields: fields[:-1], narrower])
@pytest.mark.parametrize("name", ["Array", "AdamWNumbers", "BlockSpec", "Model"])
def test_a_mirror_that_is_wrong_is_refused(name, change):
    if f"\n{name} " not in layouts():
        pytest.skip(f"the library has no {name} here")
    fields = change(list(getattr(structs, name)._fields_))
    wrong = type(name, (ctypes.Structure,), {"_fields_": fields})
    with pytest.raises(UserError, match=f"do not fit together: {name} is .* in structs.py"):
        structs.check(layouts(), (wrong,))


def test_the_library_is_refused_when_a_mirror_is_wrong(monkeypatch):
    wrong = type("Array", (ctypes.Structure,), {"_fields_": [("data", ctypes.c_void_p)]})
    monkeypatch.setattr(structs.check, "__defaults__", ((wrong,),))
    # Not what another compiler would mend: none is taken, and none is remembered as one that fails.
    folder = Path(jt.flags.cache_path, "jlora")
    before = set(folder.glob("*.failed"))
    with pytest.raises(UserError, match="install jlora again"):
        native._cpu_library.__wrapped__()
    assert set(folder.glob("*.failed")) == before


@pytest.mark.parametrize("integer", [0, 7, 2**53 + 1, 2**62 + 2**31 + 1])
def test_integers_travel_whole(integer):
    halves = native._halves([integer])
    assert all(type(half) is float for half in halves.values())
    assert (int(halves["high0"]) << 32 | int(halves["low0"])) == integer


def test_arrays_are_described_as_they_are():
    array = np.zeros((2, 3, 4), np.float32)
    (described,) = native._described([array])
    assert described.data == array.ctypes.data and described.size == 24
    assert list(described.shape) == [2, 3, 4, 0, 0, 0] and described.dims == 3
