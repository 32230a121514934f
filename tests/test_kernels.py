"""Each fused operator against its plain twin: results and gradients."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import round_bf16

from jlora import machine
from jlora.errors import UserError
from jlora.kernels import elementwise, native
from jlora.kernels.attention import causal_attention
from jlora.kernels.packed_linear import Branch, PackedWeight
from jlora.kernels.target_loss import target_loss
from jlora.models import gpt2, llama
from jlora.models.attention import CausalAttention, KeyRange
from jlora.models.head import LanguageHead
from jlora.runtime import find_onednn, jt, set_seed

from jittor import nn  # isort: skip

needs_onednn = pytest.mark.skipif(
    find_onednn() is None, reason="packed weights need oneDNN, which Jittor has not installed"
)


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


@pytest.mark.parametrize("size", [40, 7])
def test_layer_norm(size):
    layer = gpt2.LayerNorm(size, 1e-5)
    layer.weight, layer.bias = (jt.array(random(size, seed=i)).stop_grad() for i in (0, 1))
    fused = lambda x: elementwise.layer_norm(x, layer.weight, layer.bias, 1e-5)  # noqa: E731
    assert_twins(fused, layer, [random(3, 5, size)])
    assert_twins(fused, layer, [random(3, 5, size) + 30], 2e-5)  # far from zero


def test_swiglu_and_gelu():
    assert_twins(elementwise.swiglu, llama.SwiGLU(), [random(3, 5, 7), random(3, 5, 7, seed=1)])
    assert_twins(elementwise.gelu, gpt2.GELU(), [random(3, 5, 7, scale=2)])


def test_rotary():
    angle = random(3, 5, 4)
    cos, sin = jt.array(np.cos(angle)), jt.array(np.sin(angle))
    plain = llama.Rotary()
    assert_twins(
        lambda x: elementwise.rotary(x, cos, sin),
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


# --- packed weights ---


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("size", [(48, 32), (35, 19), (1, 7)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_product(size, transposed, precision):
    n, k = size
    w, low = random(n, k, seed=4), precision == "bf16"
    packed = PackedWeight(jt.array(w.T.copy() if transposed else w), transposed, bf16=low)
    kept = round_bf16(w) if low else w
    for rows in (1, 5, 1000):
        x, dy = random(rows, k, seed=rows), random(rows, n, seed=rows + 1)
        y, dx = results(packed, [x], dy)
        rounded = (round_bf16(x), round_bf16(dy)) if low else (x, dy)
        assert_close(y, rounded[0] @ kept.T, 1e-5)
        assert_close(dx, rounded[1] @ kept, 1e-5)
        if low:
            assert_close(y, x @ w.T, 2e-2)
            assert_close(dx, dy @ w, 2e-2)
    unpacked = packed.unpack(transposed).numpy()
    np.testing.assert_array_equal(unpacked.T if transposed else unpacked, kept)


@needs_onednn
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "enabled", [(True,), (True, False, True), (False, True), (True, True)], ids=str
)
def test_packed_product_with_a_low_rank_branch(enabled, bias, p):
    """Against the same in separate operators: the product, dropout, two thin products."""
    n, k, r, rows, blocks = 12, 7, 3, 41, len(enabled)
    w, b, x, dy = random(n, k), random(n, seed=1), random(2, rows, k, seed=2), random(2, rows, n)
    A = random(r * sum(enabled), k, seed=3)
    B = random(n // blocks * sum(enabled), r, seed=4)
    packed, offset = PackedWeight(jt.array(w), False, bf16=False), jt.array(b) if bias else None

    def fused(x, A, B):
        branch = Branch(A, B, enabled, scale=0.7, p=p, seed=11)
        return packed.with_lora(x, offset, branch)

    def apart(x, A, B):
        dropped = elementwise._Dropout.apply(x, p, 11) if p else x
        low, width, place, parts = nn.matmul_transpose(dropped, A) * 0.7, n // blocks, 0, []
        for flag in enabled:
            parts.append(jt.zeros((2, rows, width)))
            if flag:
                own = B[place * width : (place + 1) * width]
                parts[-1] = nn.matmul_transpose(low[..., place * r : (place + 1) * r], own)
                place += 1
        y = nn.matmul_transpose(x, jt.array(w)) + jt.concat(parts, dim=-1)
        return y + offset if bias else y

    found, expected = (results(f, [x, A, B], dy) for f in (fused, apart))
    for actual, wanted in zip(found, expected):
        assert_close(actual, wanted, 1e-5)
    again = results(fused, [x, A, B], dy)
    for first, second in zip(found, again):
        np.testing.assert_array_equal(first, second)


ISAS = ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX"]
CHILD = """
import sys
import numpy as np
from jlora.kernels.packed_linear import PackedWeight
from jlora.errors import UserError
from jlora.runtime import jt
rng = np.random.default_rng(0)
w, x = rng.standard_normal((70, 64)).astype("f"), rng.standard_normal((33, 64)).astype("f")
for bf16, tolerance in ((False, 1e-5), (True, 2e-2)):
    try:
        y = PackedWeight(jt.array(w), False, bf16)(jt.array(x)).numpy()
    except UserError:
        print("bf16 refused" if bf16 else "fp32 refused")
        continue
    worst = np.abs(y - x @ w.T).max() / np.abs(x @ w.T).max()
    assert worst < tolerance, (bf16, worst)
    print("bf16" if bf16 else "fp32", "right")
"""


@needs_onednn
@pytest.mark.parametrize("isa", ISAS)
def test_packed_product_on_each_instruction_set(isa):
    """Those that this processor has; oneDNN stops below one that it lacks."""
    run = run_child(CHILD, ONEDNN_MAX_CPU_ISA=isa, DNNL_MAX_CPU_ISA=isa)
    assert "fp32 right" in run
    # What AVX2 lacks is said, and not computed wrongly.
    assert "bf16 right" in run or "bf16 refused" in run


@pytest.mark.parametrize("arch", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_operators_compiled_for_other_processors(arch):
    """Vectors of 4, 8 and 16 floats, as far as this processor has them."""
    features = machine.cpu_features()
    if platform.machine() != "x86_64" or (arch == "x86-64-v4" and "AVX-512" not in features):
        pytest.skip(f"this processor does not run {arch}")
    own = Path(__file__)
    tests = [f"{own}::{name}" for name in ("test_attention", "test_swiglu_and_gelu")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    environment = {**os.environ, "JLORA_ARCH": arch}
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=own.parents[1]
    )
    assert run.returncode == 0, run.stdout[-2000:]


def run_child(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@needs_onednn
def test_packed_product_over_leading_dimensions():
    w, x = random(6, 8), random(2, 3, 8)
    y = PackedWeight(jt.array(w), False, bf16=False)(jt.array(x))
    assert y.shape == [2, 3, 6]
    assert_close(y.numpy(), x @ w.T, 1e-5)


# --- the fused loss ---


@needs_onednn
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(5, 8, 23), (1, 8, 2), (300, 12, 1031)], ids=str)
def test_target_loss(shape, smoothing):
    N, C, V = shape
    hidden, w = random(N, C), random(V, C, seed=1)
    targets = np.random.default_rng(2).integers(0, V, N).astype(np.int32)
    targets[0], targets[-1] = V - 1, 0
    check_target_loss(hidden, w, targets, smoothing)


def check_target_loss(hidden, w, targets, smoothing, low=False, tolerance=5e-6):
    packed, weight = PackedWeight(jt.array(w), False, low), jt.array(w).stop_grad()
    ids, factor = jt.array(targets), random(len(targets), seed=3)
    fused = results(lambda h: target_loss(h, packed, ids, smoothing), [hidden], factor)
    plain = results(lambda h: LanguageHead().losses(h, weight, ids, smoothing), [hidden], factor)
    for actual, expected in zip(fused, plain):
        assert_close(actual, expected, tolerance, least=1.0)


@needs_onednn
def test_target_loss_in_bf16():
    targets = np.arange(130, dtype=np.int32)
    check_target_loss(random(130, 32), random(200, 32, seed=1, scale=0.3), targets, 0.1, True, 2e-2)


@needs_onednn
def test_target_loss_with_logits_far_apart():
    targets = np.array([0, 1, 2], dtype=np.int32)
    check_target_loss(random(3, 4, scale=100), random(50, 4, scale=30), targets, 0.1)


@needs_onednn
def test_target_loss_without_gradient():
    w, hidden, targets = random(9, 4), random(3, 4, seed=1), jt.array(np.int32([1, 2, 3]))
    packed = PackedWeight(jt.array(w), False, bf16=False)
    with jt.no_grad():
        losses = target_loss(jt.array(hidden), packed, targets, 0.0).numpy()
    scores = hidden.astype(np.float64) @ w.T
    expected = np.log(np.exp(scores).sum(1)) - scores[np.arange(3), [1, 2, 3]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@needs_onednn
def test_target_outside_the_vocabulary_gives_nan_for_it_alone():
    packed = PackedWeight(jt.array(random(9, 4)), False, bf16=False)
    targets = jt.array(np.int32([1, 9, -1, 2]))
    losses = target_loss(jt.array(random(4, 4)), packed, targets, 0.0).numpy()
    assert np.isnan(losses).tolist() == [False, True, True, False]


def test_a_failing_compiler_is_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    path = tmp_path / "operators.so"
    command = [machine.compiler(), "-shared", str(tmp_path / "no_such_file.cc")]
    with pytest.raises(UserError, match="could not compile jlora's operators .*no_such_file") as e:
        native._compile(command, path)
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []
