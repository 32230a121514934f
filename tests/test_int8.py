"""int8 weights against the same arithmetic in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_products
from test_kernels import assert_close, random, results
from test_trained import loss_and_gradients
from tiny_models import round_bf16, wide_llama

from jlora import LoraConfig, engine, get_peft_model
from jlora.kernels.packed_linear import PackedWeight
from jlora.layers import assign, set_trainable
from jlora.models.hub import build_model
from jlora.system.runtime import jt

pytestmark = needs_products("int8")

SIZES = [(64, 32), (35, 19), (1, 7), (96, 2500), (130, 70)]


def quantised(x):
    """Rows of x in steps of their largest number / 127, but for up to 8 far larger ones."""
    result = np.empty_like(x)
    for row, kept in zip(x, result):
        apart = np.flatnonzero(np.abs(row) > 12 * np.abs(row).mean())[:8]
        rest = np.delete(np.arange(len(row)), apart)
        inverse = np.float32(127) / np.abs(row[rest]).max()
        kept[:] = row
        scaled = row[rest] * inverse
        kept[rest] = np.trunc(scaled + np.copysign(0.5, scaled)) / inverse
    return result


def rows_with_outliers(rows, columns, seed):
    x = random(rows, columns, seed=seed)
    if columns > 30 and rows > 2:
        x[::3, 5] = 300.0
        x[1::3, [2, columns - 1]] = [-900.0, 80.0]
        x[2] = 0.01
        x[2, 3:15] = 50.0  # more of them than are kept apart
    return round_bf16(x)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("kind", ["int8", "int8-both"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product(size, kind, transposed):
    n, k = size
    w = random(n, k, seed=4) * np.linspace(0.1, 3, n, dtype="f")[:, None]
    packed = PackedWeight(jt.array(w.T.copy() if transposed else w), transposed, kind)
    kept = packed.unpack(transposed)
    kept = kept.T if transposed else kept
    assert (np.abs(kept - w) <= np.abs(w).max(1, keepdims=True) / 127 * 0.501).all()
    for rows in (1, 33, 700):
        x, dy = rows_with_outliers(rows, k, rows), rows_with_outliers(rows, n, rows + 1)
        y, dx = results(packed, [x], dy)
        expected = quantised(x) @ kept.T
        # A number halfway between two steps may go to either; those rows alone differ, by a step.
        differs = np.abs(y - expected).max(1) > 1e-4 * np.abs(expected).max()
        assert differs.mean() < 0.05
        assert_close(y, expected, 1e-2)
        steps = np.abs(kept).max(1) / 127
        back = quantised(dy * steps) / steps if kind == "int8-both" else dy
        assert_close(dx, back @ kept, 2e-3 if kind == "int8-both" else 1e-2)
        assert_close(y, x @ w.T, 3e-2)


def test_what_is_not_finite_stays_in_its_row():
    packed = PackedWeight(jt.array(random(45, 70)), False, "int8")
    x = random(40, 70, seed=2)
    expected = packed(jt.array(x)).numpy()
    x[7, 60], x[9, 5] = np.nan, np.inf
    found = packed(jt.array(x)).numpy()
    assert np.isnan(found[[7, 9]]).all()
    others = np.delete(np.arange(40), [7, 9])
    np.testing.assert_array_equal(found[others], expected[others])


@pytest.mark.parametrize("kind", ["int8", "int8-both", "int4"])
def test_a_weight_that_is_not_finite_is_not_lost(kind):
    """Scales say it, since the numbers cannot: of its own output alone."""
    w, x = random(45, 70), jt.array(random(3, 70, seed=2))
    expected = PackedWeight(jt.array(w), False, kind)(x).numpy()
    w[7, 60], w[20, 5] = np.nan, np.inf
    found = PackedWeight(jt.array(w), False, kind)(x).numpy()
    assert np.isnan(found[:, [7, 20]]).all()
    others = np.delete(np.arange(45), [7, 20])
    np.testing.assert_array_equal(found[:, others], expected[:, others])


SHAPES = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2},
    "llama": {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


def adapted(kind):
    """A model with random adapters, and what gives its loss and their gradient."""
    jt.set_global_seed(0)
    names = ["c_attn", "c_proj", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    base = build_model({**SHAPES[kind], "vocab_size": 96})
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=names))
    for name, parameter in model.trainable_parameters():
        assign(parameter, jt.array(0.2 * random(*parameter.shape, seed=len(name))))
    ids = jt.array(np.random.default_rng(1).integers(0, 96, (2, 9)).astype(np.int32))
    targets = jt.array(np.random.default_rng(2).integers(0, 96, 18).astype(np.int32))
    parameters = [parameter for _, parameter in model.trainable_parameters()]

    def loss_and_gradient():
        hidden = model.hidden_states(ids).reshape(18, -1)
        loss = model.target_losses(hidden, targets, 0.1).mean()
        gradients = jt.grad(loss, parameters)
        return loss.item(), np.concatenate([g.numpy().ravel() for g in gradients])

    return model, loss_and_gradient


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("precision", ["int8", "int8-both"])
@pytest.mark.parametrize("keep_weights", [True, False])
def test_engine(kind, precision, keep_weights):
    """Whole blocks, with and without the float32 weights."""
    model, loss_and_gradient = adapted(kind)
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    plain_loss, plain = loss_and_gradient()
    sizes = model.get_nb_trainable_parameters()
    engine.prepare(model, precision, keep_weights=keep_weights)
    loss, gradient = loss_and_gradient()
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    assert np.linalg.norm(gradient - plain) < 0.12 * np.linalg.norm(plain)  # narrow models
    assert np.linalg.norm(gradient - plain) > 1e-4 * np.linalg.norm(plain)  # it was int8
    assert model.get_nb_trainable_parameters() == sizes
    engine.restore(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, weight in before.items():
        # Weights that were let go come back as they were kept: int8, the embedding bf16.
        limit = 0.0 if keep_weights or weight.ndim == 1 else np.abs(weight).max() / 127
        assert np.abs(after[name].numpy() - weight).max() <= limit, name


@pytest.mark.parametrize(
    ("precision", "trained"),
    [("int8-both", "input_layernorm"), ("int8", "k_proj"), ("int8-both", "q_proj"),
     ("int4", "v_proj"), ("int4", "gate_proj")],
)  # fmt: skip
def test_layers_that_read_the_same_rows(precision, trained):
    """Of 32 and 96 outputs, no multiples of int8's 64; one that is trained is in bf16."""
    model = wide_llama(num_key_value_heads=1)
    names = [n for n, _ in model.named_parameters() if ".0." in n and f".{trained}." in n]
    set_trainable(model, names)
    engine.prepare(model, precision, keep_weights=False)
    loss, gradients = loss_and_gradients(model, names)
    engine.restore(model)  # rounded, now
    plain_loss, plain = loss_and_gradients(model, names)
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    for name, gradient in plain.items():
        off = np.linalg.norm(gradients[name] - gradient)
        assert off < 0.2 * np.linalg.norm(gradient)
