"""int4 weights against the same arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from needs import needs_products
from test_int8 import SHAPES, adapted, quantised, rows_with_outliers
from test_kernels import assert_close, random, results
from tiny_models import round_bf16, tiny_gpt2, tiny_llama, weights

from jlora import engine, export_gguf, load
from jlora.formats import gguf_file
from jlora.formats.lazy import Blocks, LazyArray
from jlora.kernels.packed_linear import FORMS, PackedWeight, packed_bytes
from jlora.layers import set_trainable
from jlora.system.runtime import jt
from jlora.system.unread import unread

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
        x, dy = rows_with_outliers(rows, k, rows), round_bf16(random(rows, n, seed=rows + 1))
        y, dx = results(packed, [x], dy)  # forward in int8, weights too
        assert_close(y, quantised(x) @ kept.T, 2e-2)
        assert_close(y, x @ kept.T, 3e-2)
        assert_close(dx, dy @ round_bf16(kept), 1e-2)


def from_file(kind: str, rows: np.ndarray, shape: tuple[int, int]) -> jt.Var:
    """A weight (n, k) that nobody has read, of a GGUF file's own blocks."""

    def read():
        raise AssertionError("its numbers were read")

    return unread(LazyArray(shape, "f", read, Blocks(kind, lambda: rows)))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("kind", FORMS)
def test_blocks_of_a_gguf_file_are_taken_as_they_are(kind, transposed):
    n, k, form = 70, 512, GGMLQuantizationType[kind]
    if kind == "Q4_K":  # the package reads it only: any bytes, with scales of a usual size
        rows = np.random.default_rng(0).integers(0, 256, (n, k // 256, 144), np.uint8)
        scales = random(n, k // 256, 2, seed=3).astype(np.float16) / 64
        rows[..., :4] = scales.view(np.uint8)
        rows = rows.reshape(n, -1)
    else:
        rows = quants.quantize(random(n, k, seed=1) * np.linspace(0.01, 3, n)[:, None], form)
    given = quants.dequantize(rows, form)
    packed = PackedWeight(
        from_file(kind, rows, (k, n) if transposed else (n, k)), transposed, "int4"
    )
    assert packed.taken == kind
    kept = packed.unpack(False)
    if kind == "Q4_K":  # scales and minima, 17 bits long there, are rounded to 11
        largest = np.abs(given).reshape(n, -1, 32).max(2).repeat(32, 1)
        assert (np.abs(kept - given) <= 2.0**-9 * largest + 1e-7).all()
    else:
        np.testing.assert_array_equal(kept, given)
    # And the same as by way of float32, where that finds the scale again.
    x = round_bf16(random(5, k, seed=2))
    through = PackedWeight(jt.array(given), False, "int4")
    assert through.taken is None
    assert_close(packed(jt.array(x)).numpy(), through(jt.array(x)).numpy(), 1e-2)


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


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_gguf_file_is_packed_without_its_numbers_being_read(kind, tmp_path, monkeypatch):
    """Rows of queries and keys in our order, Conv1D's layout; the numbers are the file's."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    model = tiny_gpt2(n_embd=64, n_head=2) if kind == "gpt2" else tiny_llama(**wide)
    export_gguf(model, tmp_path / "m.gguf", "q4_0", tokenizer=False)
    expected = weights(load(tmp_path / "m.gguf"))
    loaded = load(tmp_path / "m.gguf")
    set_trainable(loaded, ())
    loaded._base_record = {}  # which hashes a few numbers
    read = []
    whole = gguf_file._dequantized
    monkeypatch.setattr(gguf_file, "_dequantized", lambda *a: read.append(a[3]) or whole(*a))
    engine.prepare(loaded, "int4", keep_weights=False)
    layers = 8 if kind == "gpt2" else 14
    assert engine.taken_forms(loaded) == {"Q4_0": layers, "": 1}  # the head is bf16
    assert read.count("Q4_0") <= 1
    engine.restore(loaded)
    for name, array in weights(loaded).items():
        if ".h." in name or ".layers." in name:
            np.testing.assert_array_equal(array, expected[name], name)


def test_size():
    """5 bits a number: four, and 32 bits of a scale and a minimum for 32 of them; and for each
    output its step in int8 and its offset, 4 bytes each."""
    assert packed_bytes(4096, 4096, "int4") == 4096 * 4096 * 5 // 8 + 4096 * 8


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
    # Of the random GPT-2, whose loss is 24, bf16's gradient is 0.11 from float32's, of the Llama
    # 0.007.
    limit = {"gpt2": 0.4, "llama": 0.04}[kind]
    assert np.linalg.norm(gradient - plain) < limit * np.linalg.norm(plain)
    changed = [
        name for name, p in model.named_parameters()
        if np.abs(p.numpy() - before[name]).max() > np.abs(before[name]).max() / 64
    ]  # fmt: skip
    assert len(changed) >= 8 and all("lora" not in name for name in changed)
