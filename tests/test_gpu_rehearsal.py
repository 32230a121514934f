"""The emulated card: its compiler, and Jittor on it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cuda_emulator.jittor import nvcc

from benchmarks.sides import ROOT


@pytest.mark.parametrize(
    ("cuda", "expected"),
    [
        ("k<<<1,2>>>(a, f(b));", "emulator::Launch(1,2)([&] { k(a, f(b)); });"),
        (
            "if (x) ns::k<T, sizeof(U<3>)><<<grid, n, 0, s>>> (a);",
            "if (x) emulator::Launch(grid, n, 0, s)([&] { ns::k<T, sizeof(U<3>)>(a); });",
        ),
        ("a<<<1,1>>>(); b<<<2,2>>>();", "emulator::Launch(1,1)([&] { a(); }); "
         "emulator::Launch(2,2)([&] { b(); });"),
        ("x << 1; y >> 2; v<w<int>> z;", "x << 1; y >> 2; v<w<int>> z;"),
    ],
)  # fmt: skip
def test_launches_become_calls(cuda: str, expected: str):
    assert nvcc.launches(cuda) == expected


def test_a_launch_that_is_not_closed_is_an_error():
    with pytest.raises(ValueError, match="not closed"):
        nvcc.launches("k<<<1,2>>>(a;")


def test_flags_are_the_compilers():
    given = "-I/c -cudadevrt none /a.cc -std=c++17 -Xcompiler -fPIC -Xlinker -rpath=/l -shared -lx"
    given += " -x cu --cudart=shared -ccbin=/usr/bin/g++ --use_fast_math -arch=compute_90 -o /a.so"
    assert nvcc.translate(given.split()) == (
        "/usr/bin/g++",
        ["/a.cc"],
        ["-I/c", "-std=c++17", "-fPIC", "-Wl,-rpath=/l", "-shared", "-lx", "-o", "/a.so"],
    )


JITTOR = """
import numpy as np
from jlora.system.runtime import jt
x = np.arange(12, dtype="f").reshape(3, 4)
a = jt.array(x)
soft = jt.nn.softmax(a, dim=-1).numpy()
exact = np.exp(x - x.max(-1, keepdims=True))
np.testing.assert_allclose(soft, exact / exact.sum(-1, keepdims=True), rtol=1e-6)
np.testing.assert_allclose((a @ a.transpose()).numpy(), x @ x.T)
np.testing.assert_allclose(a.sum(0).numpy(), x.sum(0))
assert jt.argmax(a, 1)[0].numpy().tolist() == [3, 3, 3]
assert jt.argsort(-a, 1)[0].numpy().tolist() == 3 * [[3, 2, 1, 0]]
np.testing.assert_allclose(jt.cumsum(a, 1).numpy(), x.cumsum(1))
assert [i.numpy().tolist() for i in jt.where(a > 8)] == [[2, 2, 2], [1, 2, 3]]
print("on the card:", jt.flags.use_cuda)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv-cuda" / ".installed").exists(),
    reason="no headers of CUDA; make .venv-cuda/.installed fetches them",
)
def test_jittor_computes_on_the_emulated_card():
    command = [sys.executable, "-m", "benchmarks.gpu_rehearsal", "--", sys.executable, "-c", JITTOR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "on the card: 1" in done.stdout, done.stderr
