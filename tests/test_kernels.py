"""Each fused operator against its plain twin: results and gradients."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jlora.kernels import elementwise, native
from jlora.kernels.attention import causal_attention
from jlora.models import gemma, gpt2, llama, rope
from jlora.models.attention import CausalAttention, KeyRange, Stream
from jlora.system import machine
from jlora.system.errors import UserError
from jlora.system.runtime import jt, set_seed


def random(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed + len(shape)).standard_normal(shape)).astype("f")


def results(function, inputs, factor):
    """The value of ``function`` and the gradients of ``sum(value * factor)``."""
    variables = [jt.array(x) for x in inputs]
    y = function(*variables)
    gradients = jt.grad((y * jt.array(factor)).sum(), variables)
    return [y.numpy(), *(g.numpy() for g in gradients)]


def assert_close(actual, expected, tolerance, least=1e-30):
    """Relative to the largest value, which is what float32 sums are exact to.

    ``least`` is the size of the terms of a sum whose result may be smaller.
    """
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert abs(actual - expected).max() <= tolerance * max(abs(expected).max(), least)


def assert_twins(fused, plain, inputs, tolerance=2e-6, factor=None):
    if factor is None:
        factor = random(*plain(*map(jt.array, inputs)).shape, seed=9)
    pairs = zip(results(fused, inputs, factor), results(plain, inputs, factor))
    for actual, expected in pairs:
        assert_close(actual, expected, tolerance)


# --- attention ---

NO_PADDING = None
LEFT = [5, 0, 16]
RIGHT = [0, 12, 1]


def mask_of(side, S):
    mask = np.ones((3, S), dtype=np.int32)
    for row, count in enumerate(LEFT if side == "left" else RIGHT):
        if side == "left":
            mask[row, :count] = 0
        else:
            mask[row, S - count :] = 0
    return mask


@pytest.mark.parametrize(
    ("T", "S", "H", "G", "D", "side"),
    [
        (17, 17, 4, 4, 8, None),
        (17, 17, 6, 2, 8, "left"),
        (17, 17, 6, 2, 8, "right"),
        (17, 17, 3, 1, 5, "left"),  # a head size that is no multiple of 4
        (1, 17, 6, 2, 8, "left"),  # one query against a cache
        (4, 17, 6, 6, 8, "left"),
        (1, 1, 2, 1, 3, None),
        (300, 300, 4, 2, 32, "left"),
        (1024, 1024, 2, 1, 64, None),
    ],
)
def test_attention(T, S, H, G, D, side):
    q, k, v = random(3, T, H, D), random(3, S, G, D, seed=1), random(3, S, G, D, seed=2)
    keys, factor = None, random(3, T, H, D, seed=3)
    if side:
        mask = mask_of(side, S)
        keys = KeyRange.from_mask(mask)
        factor *= mask[:, S - T :, None, None]  # nobody uses what padding computes
    fused = results(lambda *qkv: causal_attention(*qkv, keys), [q, k, v], factor)
    plain = results(lambda *qkv: CausalAttention()(*qkv, keys), [q, k, v], factor)
    fused[0], plain[0] = fused[0] * (factor != 0), plain[0] * (factor != 0)
    for actual, expected in zip(fused, plain):
        assert_close(actual, expected, 5e-6)


@pytest.mark.parametrize(
    ("T", "S", "side", "window", "cap"),
    [
        (17, 17, None, 5, None),
        (17, 17, "left", 1, None),
        (4, 17, "right", 3, 0.7),
        (1, 17, "left", 6, None),
        (100, 100, "left", 40, 2.0),
        (100, 100, None, 100, 0.5),
    ],
)
def test_attention_with_windows_and_caps(T, S, side, window, cap):
    q, k, v = random(3, T, 6, 8), random(3, S, 2, 8, seed=1), random(3, S, 2, 8, seed=2)
    keys, factor = None, random(3, T, 6, 8, seed=3)
    if side:
        mask = mask_of(side, S)
        keys = KeyRange.from_mask(mask)
        factor *= mask[:, S - T :, None, None]
    plain = CausalAttention(0.9, window, cap)
    fused = results(lambda *qkv: causal_attention(*qkv, keys, 0.9, window, cap), [q, k, v], factor)
    expected = results(lambda *qkv: plain(*qkv, keys), [q, k, v], factor)
    fused[0], expected[0] = fused[0] * (factor != 0), expected[0] * (factor != 0)
    for actual, wanted in zip(fused, expected):
        assert_close(actual, wanted, 5e-6, least=1.0)  # one key alone has no gradient


@pytest.mark.parametrize("lengths", [[1, 33, 64], [5], [1, 1, 1]], ids=str)
def test_attention_over_a_stream(lengths):
    T, keys = sum(lengths), Stream(lengths)
    q, k, v = random(1, T, 6, 8), random(1, T, 2, 8, seed=1), random(1, T, 2, 8, seed=2)
    factor = random(1, T, 6, 8, seed=3)
    fused = results(lambda *qkv: causal_attention(*qkv, keys), [q, k, v], factor)
    plain = results(lambda *qkv: CausalAttention()(*qkv, keys), [q, k, v], factor)
    for actual, expected in zip(fused, plain):
        assert_close(actual, expected, 5e-6, least=1.0)  # one token alone has no gradient


def test_attention_over_wholly_padded_rows_is_finite():
    mask = np.zeros((2, 5), dtype=np.int32)
    mask[0, 3:] = 1
    q, k, v = (random(2, 5, 2, 4, seed=i) for i in range(3))
    keys = KeyRange.from_mask(mask)
    y, *gradients = results(lambda *x: causal_attention(*x, keys), [q, k, v], np.ones_like(q))
    assert np.isfinite(y).all() and not y[1].any()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[1].any()


def test_attention_with_large_scores():
    """Differences of a thousand: softmax picks one key, nothing overflows."""
    q, k, v = (random(1, 6, 2, 4, seed=i, scale=30) for i in range(3))
    fused = results(causal_attention, [q, k, v], np.ones_like(q))
    plain = results(CausalAttention(), [q, k, v], np.ones_like(q))
    # Float32 scores of 1,000 are exact to 1e-4, and the exponential makes that relative.
    for actual, expected in zip(fused, plain):
        assert_close(actual, expected, 1e-3, least=1.0)  # gradients cancel to 0 from terms of 100


# --- norms, activations, rotary ---


@pytest.mark.parametrize("size", [40, 7])
def test_rms_norm(size):
    layer = llama.RMSNorm(size, 1e-5)
    layer.weight = jt.array(random(size)).stop_grad()
    fused = lambda x: elementwise.rms_norm(x, layer.weight, 1e-5)  # noqa: E731
    assert_twins(fused, layer, [random(3, 5, size)])
    assert_twins(fused, layer, [random(3, 5, size, scale=1e-4)])  # where eps counts
    layer.offset = 1.0
    fused = lambda x: elementwise.rms_norm(x, layer.weight, 1e-5, 1.0)  # noqa: E731
    assert_twins(fused, layer, [random(3, 5, size)])


@pytest.mark.parametrize("size", [40, 7])
def test_layer_norm(size):
    layer = gpt2.LayerNorm(size, 1e-5)
    layer.weight, layer.bias = (jt.array(random(size, seed=i)).stop_grad() for i in (0, 1))
    fused = lambda x: elementwise.layer_norm(x, layer.weight, layer.bias, 1e-5)  # noqa: E731
    assert_twins(fused, layer, [random(3, 5, size)])
    assert_twins(fused, layer, [random(3, 5, size) + 30], 2e-5)  # far from zero


def test_swiglu_and_gelu():
    assert_twins(elementwise.swiglu, llama.SwiGLU(), [random(3, 5, 7), random(3, 5, 7, seed=1)])
    assert_twins(elementwise.geglu, gemma.GEGLU(), [random(3, 5, 7), random(3, 5, 7, seed=1)])
    assert_twins(elementwise.gelu, gpt2.GELU(), [random(3, 5, 7, scale=2)])


@pytest.mark.parametrize("plain", [rope.Rotary(), rope.InterleavedRotary()])
@pytest.mark.parametrize("half", [4, 3])  # all of a head, and a part
def test_rotary(plain, half):
    angle = random(3, 5, half)
    cos, sin = jt.array(np.cos(angle)), jt.array(np.sin(angle))
    neighbours = isinstance(plain, rope.InterleavedRotary)
    assert_twins(
        lambda x: elementwise.rotary(x, cos, sin, neighbours),
        lambda x: plain(x, cos, sin),
        [random(3, 5, 2, 8)],
    )


def test_fast_exponential():
    """Through swiglu(x, 1) = x sigmoid(x), from no rounding error to the ends of the range."""
    x = np.concatenate([np.linspace(-100, 100, 4001), [0.0, -0.0, 1e-30, -500, 500, 3e38]])
    x = x.astype(np.float32)
    actual = elementwise.swiglu(jt.array(x), jt.array(np.ones_like(x))).numpy()
    wide = x.astype(np.float64)
    expected = wide * np.exp(-np.logaddexp(0, -wide))
    near = x > -80
    np.testing.assert_allclose(actual[near], expected[near], rtol=5e-7)
    assert abs(actual[~near]).max() < 1e-32
    gradient = results(elementwise.gelu, [x[:-1]], np.ones(len(x) - 1, dtype="f"))[1]
    assert np.isfinite(gradient).all()
    assert abs(gradient[:1000]).max() < 1e-30
    np.testing.assert_array_equal(gradient[3001:4001], 1)


def test_not_a_number_stays_one():
    bad = np.array([np.nan, 1.0], dtype=np.float32)
    for y in (
        elementwise.gelu(jt.array(bad)),
        elementwise.swiglu(jt.array(bad), jt.array(np.ones(2, dtype="f"))),
    ):
        assert np.isnan(y.numpy()).tolist() == [True, False]


# --- dropout ---


def drop(x, p=0.25):
    layer = elementwise.FusedDropout(p, is_train=True)
    return layer(x)


def test_dropout_keeps_the_right_share_and_scales_it():
    set_seed(1)
    y = drop(jt.array(np.ones((200, 500), dtype="f"))).numpy()
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    # Standard deviation of the share: 0.0014 over all, 0.02 and 0.03 along an axis.
    assert abs((y > 0).mean() - 0.75) < 0.006
    assert abs((y > 0).mean(0) - 0.75).max() < 0.16
    assert abs((y > 0).mean(1) - 0.75).max() < 0.1
    neighbours = ((y[:, 1:] > 0) & (y[:, :-1] > 0)).mean()
    assert abs(neighbours - 0.75**2) < 0.01


def test_dropout_drops_the_same_in_the_backward_pass():
    x = random(50, 40)
    y, gradient = results(drop, [x], np.ones_like(x))
    np.testing.assert_allclose(y, gradient * x, rtol=1e-6)


def test_dropout_follows_the_seed():
    x = jt.array(np.ones(4000, dtype="f"))
    masks = []
    for seed in (1, 1, 2):
        set_seed(seed)
        masks += [drop(x).numpy() > 0, drop(x).numpy() > 0]
    assert (masks[0] == masks[2]).all() and (masks[1] == masks[3]).all()
    for other in (masks[1], masks[4]):  # the next call, another seed: agree by chance alone
        assert abs((masks[0] == other).mean() - (0.75**2 + 0.25**2)) < 0.04


def test_dropout_does_nothing_outside_training():
    x = jt.array(random(5, 4))
    layer = elementwise.FusedDropout(0.5, is_train=False)
    assert layer(x) is x
    assert drop(x, p=0.0) is x


# --- compiling ---


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param("x86-64", marks=pytest.mark.slow),
        "x86-64-v3",
        pytest.param("x86-64-v4", marks=pytest.mark.slow),
    ],
)
def test_operators_compiled_for_other_processors(arch):
    """Vectors of 4, 8 and 16 floats, as far as this processor has them."""
    features = machine.cpu_features()
    if platform.machine() != "x86_64" or (arch == "x86-64-v4" and "AVX-512" not in features):
        pytest.skip(f"this processor does not run {arch}")
    run_tests_on(arch, "test_kernels.py::test_attention", "test_kernels.py::test_swiglu_and_gelu")


def run_tests_on(arch, *tests, **environment):
    """Tests of this folder with the operators compiled for another processor."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *(str(folder / test) for test in tests)], capture_output=True, text=True,
        env={**os.environ, "JLORA_ARCH": arch, **environment}, cwd=folder.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout.splitlines()[-1]


def test_a_failing_compiler_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    path = tmp_path / "operators.so"
    command = [machine.compiler(), "-shared", str(tmp_path / "no_such_file.cc")]
    with pytest.raises(UserError, match="could not compile jlora's operators .*no_such_file") as e:
        native._compile(command, path)
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_no_value_has_the_number_of_one_before():
    """What is kept under a value's number would be taken for another value's."""
    seen = []
    kept = jt.array([1.0])
    for number in range(200):
        gone = jt.array(np.full(3, number, np.float32))
        gone.sync()
        seen.append(native.value_number(gone))
        del gone
        kept.update(jt.array([float(number)]))
        seen.append(native.value_number(kept))
        kept.numpy()
        assert native.value_number(kept) == seen[-1]
    assert len(set(seen)) == len(seen)
