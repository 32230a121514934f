"""int4 weights against the same arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from needs import needs_products
from test_int8 import SHAPES, adapted
from test_kernels import assert_close, random, results
from tiny_models import round_bf16

from jlora import engine
from jlora.kernels.packed_linear import PackedWeight, packed_bytes
from jlora.system.runtime import jt

pytestmark = needs_products("int4")

SIZES = [(64, 32), (35, 19), (1, 7), (96, 2500), (130, 70)]


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size, transposed):
    n, k = size
    w = random(n, k, seed=4) * np.linspace(0.1, 3, n, dtype="f")[:, None]
    packed = PackedWeight(jt.array(w.T.copy() if transposed else w), transposed, "int4")
    kept = packed.unpack(transposed)
    kept = kept.T if transposed else kept
    for first in range(0, k, 32):  # a group is at least as near as steps of a 15th of its range
        group, off = w[:, first : first + 32], (kept - w)[:, first : first + 32]
        low, high = group.min(1), group.max(1)
        if k - first < 32:  # filled up with zeros
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        step = (high - low)[:, None] / 15
        assert (np.square(off).sum(1) <= 32 * np.square(0.51 * step[:, 0]) + 1e-9).all()
    for rows in (1, 33, 700):
        x, dy = round_bf16(random(rows, k, seed=rows)), round_bf16(random(rows, n, seed=rows + 1))
        y, dx = results(packed, [x], dy)
        assert_close(y, x @ round_bf16(kept).T, 2e-5)
        assert_close(dx, dy @ round_bf16(kept), 1e-2)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_numbers_of_four_bits_come_back_as_they_were(kind):
    """Weights of a GGUF file: no second rounding, whatever part of the 16 steps a block uses."""
    w = random(64, 96, seed=1) * np.linspace(0.01, 1, 64, dtype="f")[:, None]
    w[3, :32] = 0.5  # one number alone
    w[5, 32:64] = np.where(np.arange(32) < 16, -0.25, 0.25)  # two
    given = quants.dequantize(
        quants.quantize(w, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]
    )
    kept = PackedWeight(jt.array(given), False, "int4").unpack(False)
    np.testing.assert_allclose(kept, given, rtol=0, atol=2e-3 * np.abs(given).max(1).max())
    apart = np.abs(kept - given) > 1e-3 * np.abs(given).max(1, keepdims=True)
    assert apart.mean() == 0


def test_size():
    """5 bits a number: four, and 32 bits of a scale and a minimum for 32 of them."""
    assert packed_bytes(4096, 4096, "int4") == 4096 * 4096 * 5 // 8


@pytest.mark.parametrize("kind", SHAPES)
def test_engine(kind):
    """Whole blocks against the plain layers with the numbers that are kept."""
    model, loss_and_gradient = adapted(kind)
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    engine.prepare(model, "int4", keep_weights=False)
    loss, gradient = loss_and_gradient()
    engine.restore(model)  # rounded, now
    plain_loss, plain = loss_and_gradient()
    assert loss == pytest.approx(plain_loss, rel=5e-3)
    assert np.linalg.norm(gradient - plain) < 0.03 * np.linalg.norm(plain)
    changed = [
        name for name, p in model.named_parameters()
        if np.abs(p.numpy() - before[name]).max() > np.abs(before[name]).max() / 64
    ]  # fmt: skip
    assert len(changed) >= 8 and all("lora" not in name for name in changed)
