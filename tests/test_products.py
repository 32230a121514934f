"""Products with packed weights, their low-rank branches and the fused loss, against numpy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plain_block
import pytest
from needs import needs_bf16, needs_tiles
from test_kernels import assert_close, random, results, run_tests_on
from tiny_models import round_bf16

from jlora.kernels.packed_linear import LINE, PIECE, Branch, PackedWeight, memory_for
from jlora.kernels.target_loss import target_loss
from jlora.models.head import LanguageHead
from jlora.system import machine
from jlora.system.runtime import jt

# Widths that fill up no tile, one of more than 32 steps of 32 numbers, and the other way round.
SIZES = [(48, 32), (35, 19), (1, 7), (96, 1500), (1500, 70)]


@needs_bf16
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_product(size, transposed):
    n, k = size
    w, bias = random(n, k, seed=4), random(n, seed=5)
    packed = PackedWeight(jt.array(w.T.copy() if transposed else w), transposed)
    kept, offset = round_bf16(w), jt.array(bias).stop_grad()
    for rows in (1, 33, 700):
        x, dy = random(rows, k, seed=rows), random(rows, n, seed=rows + 1)
        y, dx = results(lambda x: packed(x, offset), [x], dy)
        assert_close(y, round_bf16(x) @ kept.T + bias, 1e-5)
        assert_close(dx, round_bf16(dy) @ kept, 1e-5)
    unpacked = packed.unpack(transposed)
    np.testing.assert_array_equal(unpacked.T if transposed else unpacked, kept)


@needs_bf16
def test_packed_product_over_leading_dimensions():
    w, x = random(6, 8), random(2, 3, 8)
    y = PackedWeight(jt.array(w), False)(jt.array(x))
    assert y.shape == [2, 3, 6]
    assert_close(y.numpy(), round_bf16(x) @ round_bf16(w).T, 1e-5)


@needs_bf16
@pytest.mark.parametrize("way", ["forward", "back"])
def test_what_is_not_finite_stays_in_its_row(way):
    n, k, rows = 45, 70, 40
    packed, w = PackedWeight(jt.array(random(n, k)), False), round_bf16(random(n, k))

    def product(x):
        if way == "forward":
            return packed(jt.array(x)).numpy()
        return results(packed, [np.zeros((rows, k), "f")], x)[1]

    x = random(rows, k if way == "forward" else n, seed=2)
    expected = product(x)
    x[7, 3], x[9, 5] = np.nan, np.inf
    found = product(x)
    assert np.isnan(found[7]).all()
    np.testing.assert_array_equal(found[9], np.inf * (w[:, 5] if way == "forward" else w[5]))
    others = np.delete(np.arange(rows), [7, 9])
    np.testing.assert_array_equal(found[others], expected[others])


@needs_bf16
@pytest.mark.parametrize("scale", [1e18, 1e-14])
def test_large_and_small_numbers(scale):
    w, x, dy = random(40, 50, scale=scale), random(3, 50, scale=scale), random(3, 40, scale=scale)
    y, dx = results(PackedWeight(jt.array(w), False), [x], dy)
    assert_close(y, round_bf16(x) @ round_bf16(w).T, 1e-5)
    assert_close(dx, round_bf16(dy) @ round_bf16(w), 1e-5)


@needs_bf16
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(12, 7), (96, 1100)], ids=str)
@pytest.mark.parametrize(
    "enabled", [(True,), (True, False, True), (False, True), (True, True)], ids=str
)
def test_low_rank_branch(enabled, size, bias, p):
    """The branch reads x and dy rounded as the frozen product does; its own sums are not."""
    (n, k), r, rows, blocks = size, 3, 41, len(enabled)
    w, b, x, dy = random(n, k), random(n, seed=1), random(2, rows, k, seed=2), random(2, rows, n)
    A = random(r * sum(enabled), k, seed=3)
    B = random(n // blocks * sum(enabled), r, seed=4)
    packed, offset = PackedWeight(jt.array(w), False), jt.array(b) if bias else None

    def fused(x, A, B):
        branch = Branch(A, B, enabled, scale=0.7, p=p, seed=11)
        return packed.with_lora(x, offset, branch)

    found = results(fused, [x, A, B], dy)
    layer = SimpleNamespace(
        weight=jt.array(w), bias=offset, fan_in_fan_out=False, adapter_enabled=True, scaling=0.7,
        lora_A=jt.array(A), lora_B=jt.array(B), lora_dropout=SimpleNamespace(p=p),
        enable_lora=enabled,
    )  # fmt: skip
    twin = plain_block.Linear(layer, plain_block.rounded)
    twin.seed = 11
    y = twin.forward(plain_block.rounded(x.reshape(-1, k))).reshape(dy.shape)
    dx = twin.backward(plain_block.rounded(dy.reshape(-1, n))).reshape(x.shape)
    for actual, wanted in zip(found, [y, dx, twin.dA, twin.dB]):
        assert_close(actual, wanted, 1e-5)
    for first, second in zip(found, results(fused, [x, A, B], dy)):
        np.testing.assert_array_equal(first, second)


# --- the fused loss ---


def loss_and_gradient(hidden, w, targets, smoothing, factor):
    """What target_loss.h computes, of float64 logits of rounded numbers."""
    hidden, w = plain_block.rounded(hidden), plain_block.rounded(w)
    rows, logits = np.arange(len(targets)), hidden @ w.T
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    losses = -(1 - smoothing) * log_p[rows, targets] - smoothing * log_p.mean(1)
    slope = np.exp(log_p) - smoothing / len(w)
    slope[rows, targets] -= 1 - smoothing
    return losses, factor[:, None] * (plain_block.rounded(slope) @ w)


@needs_bf16
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(5, 8, 23), (1, 8, 2), (300, 12, 1031), (600, 64, 70), (9, 32, 9000)], ids=str
)
def test_target_loss(shape, smoothing):
    N, C, V = shape
    hidden, w = random(N, C), random(V, C, seed=1, scale=0.5)
    targets = np.random.default_rng(2).integers(0, V, N).astype(np.int32)
    targets[0], targets[-1] = V - 1, 0
    packed, ids, factor = PackedWeight(jt.array(w), False), jt.array(targets), random(N, seed=3)
    losses, gradient = results(lambda h: target_loss(h, packed, ids, smoothing), [hidden], factor)
    wanted, slope = loss_and_gradient(hidden, w, targets, smoothing, factor)
    assert_close(losses, wanted, 5e-6, least=1.0)
    # Where a slope lies between two bf16 numbers, float32 logits may decide for the other one.
    assert np.linalg.norm(gradient - slope) < 5e-4 * np.linalg.norm(slope)
    h, weight = jt.array(round_bf16(hidden)), jt.array(round_bf16(w))
    assert_close(losses, LanguageHead().losses(h, weight, ids, smoothing).numpy(), 5e-6, least=1.0)


@needs_bf16
def test_target_loss_with_logits_far_apart():
    hidden, w, targets = random(3, 4, scale=100), random(50, 4, scale=30), np.int32([0, 1, 2])
    packed, ids, factor = PackedWeight(jt.array(w), False), jt.array(targets), random(3, seed=3)
    losses, gradient = results(lambda h: target_loss(h, packed, ids, 0.1), [hidden], factor)
    wanted, slope = loss_and_gradient(hidden, w, targets, 0.1, factor)
    assert_close(losses, wanted, 5e-6)
    assert_close(gradient, slope, 1e-2)


@needs_bf16
def test_target_loss_with_the_rest_behind_a_likely_word():
    """50,000 unlikely words together weigh something; one float32 sum would lose them."""
    hidden, w, targets = np.ones((3, 1), "f"), np.zeros((50000, 1), "f"), np.int32([7, 7, 9])
    w[7] = 22.0
    packed, factor = PackedWeight(jt.array(w), False), np.ones(3, "f")
    losses, gradient = results(
        lambda h: target_loss(h, packed, jt.array(targets), 0.0), [hidden], factor
    )
    wanted, slope = loss_and_gradient(hidden, w, targets, 0.0, factor)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6, atol=3e-8)  # two of them are 1.4e-5
    # 22 plus something is exact to 1e-6 in float32, and so are probabilities.
    np.testing.assert_allclose(gradient, slope, rtol=1e-2, atol=22 * 2e-6)


@needs_bf16
def test_target_loss_without_gradient():
    w, hidden, targets = random(9, 4), random(3, 4, seed=1), np.int32([1, 2, 3])
    packed = PackedWeight(jt.array(w), False)
    with jt.no_grad():
        losses = target_loss(jt.array(hidden), packed, jt.array(targets), 0.0).numpy()
    expected, _ = loss_and_gradient(hidden, w, targets, 0.0, np.ones(3))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@needs_bf16
def test_target_outside_the_vocabulary_gives_nan_for_it_alone():
    packed, factor = PackedWeight(jt.array(random(9, 4)), False), np.ones(4, "f")
    targets = jt.array(np.int32([1, 9, -1, 2]))
    losses, gradient = results(
        lambda h: target_loss(h, packed, targets, 0.0), [random(4, 4)], factor
    )
    assert np.isnan(losses).tolist() == [False, True, True, False]
    assert np.isnan(gradient).all(1).tolist() == np.isnan(gradient).any(1).tolist()
    assert np.isnan(gradient).any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_tiles(kind)) for kind in ("bf16", "int8", "int4")]
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_few_rows_get_what_they_get_beside_others(kind, size):
    n, k = size
    packed, x = PackedWeight(jt.array(random(n, k, seed=4)), False, kind), random(40, k, seed=5)
    bias = jt.array(random(n, seed=6)).stop_grad()
    for offset in (None, bias):
        together = packed(jt.array(x), offset).numpy()
        for count in (1, 2, 3, 4, 5):
            assert np.array_equal(packed(jt.array(x[:count]), offset).numpy(), together[:count])


def test_weights_share_pieces_of_memory():
    def check():
        first, second, third = memory_for(100), memory_for(LINE), memory_for(1)
        piece = weakref.ref(first.base)
        assert first.base is second.base is third.base and len(first) == 100
        places = [part.ctypes.data for part in (first, second, third)]
        assert places[0] % LINE == 0 and np.diff(places).tolist() == [2 * LINE, LINE]
        large = memory_for(PIECE)  # has its own
        assert large.base is not third.base is memory_for(1).base
        del first, second, third
        assert piece() is None
        assert memory_for(1).ctypes.data % LINE == 0

    with ThreadPoolExecutor(1) as new_thread:  # with no piece yet
        new_thread.submit(check).result()


# --- processors without AMX ---

# AVX-512's VNNI without bf16, both, AVX2, and nothing of it; and what multiplies there.
OTHERS = {
    "icelake-server": "AVX2",
    "cooperlake": "AVX-512",
    "x86-64-v3": "AVX2",
    "x86-64-v2": None,
}
SAME_TESTS = [
    "test_products.py::test_packed_product",
    "test_products.py::test_what_is_not_finite_stays_in_its_row",
    "test_products.py::test_low_rank_branch",
    "test_products.py::test_target_loss",
    "test_block.py::test_block_equals_its_twin",
    "test_block.py::test_dropout_drops_what_its_hash_says",
    "test_engine.py::test_bf16_engine_differs_by_the_rounding_alone",
    "test_families.py::test_fused_blocks_train_as_plain_ones_do",
    "test_families.py::test_native_decoding_is_the_plain_models",
]


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("arch", OTHERS)
def test_products_on_other_processors(arch):
    lacking = {"AVX-512", "AVX512_BF16"} - set(machine.cpu_features())
    if platform.machine() != "x86_64" or lacking and not arch.startswith("x86-64"):
        pytest.skip(f"this processor does not run {arch}")
    code = "from jlora.kernels.packed_linear import *; print(available('bf16'), tiles())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "JLORA_ARCH": arch}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.stdout.splitlines()[-1] == f"True {OTHERS[arch]}", run.stderr[-2000:]
    by_tiles = ["test_int8.py", "test_int4.py", "test_tile_attention.py"]
    by_tiles += ["test_products.py::test_few_rows_get_what_they_get_beside_others"]
    by_tiles += [
        "test_topk.py::test_a_rows_words_and_their_log_probabilities_do_not_depend_on_the_others"
    ]
    more = by_tiles if OTHERS[arch] else []
    run_tests_on(arch, *SAME_TESTS, *more)


CHILD = """
import sys
from jlora.kernels import native
if sys.argv[1] == "without":
    native.find_onednn = lambda: None
sys.path.insert(0, sys.argv[2])
from tiny_models import tiny_gpt2
from jlora import engine
from jlora.system.errors import UserError
model = tiny_gpt2()
try:
    print(engine.prepare(model, "bf16"))
except UserError as error:
    print("refused:", error)
print(engine.prepare(model), engine.choose_precision())
"""


@pytest.mark.slow
@pytest.mark.parametrize("onednn", ["with", "without"])
def test_where_nothing_multiplies_bf16_it_is_refused(onednn):
    """Without AVX2 there are no tiles, and oneDNN held to it has no such product."""
    if platform.machine() != "x86_64":
        pytest.skip("oneDNN and g++ have these names for x86-64 processors alone")
    limits = {"JLORA_ARCH": "x86-64-v2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}
    folder = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", CHILD, onednn, str(folder)], capture_output=True, text=True,
        env={**os.environ, **limits}, cwd=folder.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    refused, chosen = run.stdout.splitlines()[-2:]
    assert refused.startswith("refused: precision bf16 needs") and "jlora doctor" in refused
    assert chosen.startswith("fp32 ")


@needs_bf16
def test_equal_losses_give_equal_bits():
    """However the threads are scheduled: sums are of the same words in the same order."""
    generator = np.random.default_rng(4)
    head = generator.standard_normal((9_000, 64)).astype(np.float32) * 0.3
    hidden = jt.array(generator.standard_normal((70, 64)).astype(np.float32))
    ids = jt.array(generator.integers(0, 9_000, 70).astype(np.int32))
    packed = PackedWeight(jt.array(head), False)
    bits = set()
    for _ in range(40):
        losses = target_loss(hidden, packed, ids, 0.1)
        gradient = jt.grad(losses.sum(), hidden)
        bits.add(losses.numpy().tobytes() + gradient.numpy().tobytes())
    assert len(bits) == 1
