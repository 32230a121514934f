"""The kernel of docs/adding: its code blocks are compiled and compared with their twin."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jlora.kernels import native
from jlora.system import machine
from jlora.system.runtime import jt

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding.md"


def blocks() -> list[str]:
    """The code blocks of the section "A kernel": header, operators, Python."""
    section = PAGE.read_text(encoding="utf-8").split("\n## A kernel\n")[1].split("\n## ")[0]
    return re.findall(r"^```(?:cpp|python)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def softcap(tmp_path_factory):
    """The names of the documented Python module; its operators are in a library of their own."""
    header, operators, python = blocks()
    folder = tmp_path_factory.mktemp("kernel")
    # The real library takes a minute to compile; what the example needs of it is this header.
    (folder / "softcap.h").write_text(header)
    (folder / "library.cc").write_text(
        '#include "operator.h"\nusing namespace jlora;\n' + operators
    )
    command = [machine.compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-Wall"]
    command += ["-Werror", f"-I{native.FOLDER}", str(folder / "library.cc")]
    subprocess.run([*command, "-o", str(folder / "library.so")], check=True)
    own = ctypes.CDLL(str(folder / "library.so"))
    names: dict[str, object] = {}
    exec(python, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: own)
        yield names


def test_the_documented_operator_equals_its_twin(softcap):
    x = np.random.default_rng(0).standard_normal((3, 7, 5)).astype("f") * 40
    results = []
    for function in (softcap["softcap"], softcap["softcap_plain"]):
        var = jt.array(x)
        y = function(var, 30.0)
        results.append((y.numpy(), jt.grad((y * y).sum(), var).numpy()))
    for fast, plain in zip(*results):
        assert fast.shape == x.shape
        np.testing.assert_allclose(fast, plain, rtol=2e-5, atol=1e-6)
    assert np.abs(results[0][0]).max() < 30 < np.abs(x).max()
