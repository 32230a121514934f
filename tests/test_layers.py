"""The LoRA layers against the formulas in numpy, and what merging and freezing must keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jlora import layers
from jlora.layers import Conv1D, Embedding, Linear, MergedLinear
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn

PATTERNS = list(itertools.product([False, True], repeat=3))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_lora(layer, rng) -> tuple[np.ndarray, np.ndarray]:
    """Give A and B random values (B would be zero) and return them."""
    arrays = [rng.standard_normal(v.shape).astype("f") for v in (layer.lora_A, layer.lora_B)]
    for var, array in zip((layer.lora_A, layer.lora_B), arrays):
        var.update(jt.array(array))
    return tuple(arrays)


def effective_weight(layer) -> np.ndarray:
    """The (out, in) matrix the layer stands for, by the formula, in float64."""
    weight = layer.weight.numpy().astype(np.float64)
    weight = weight.T if layer.fan_in_fan_out else weight
    if not layer.has_adapter:
        return weight
    A, B = layer.lora_A.numpy().astype(np.float64), layer.lora_B.numpy().astype(np.float64)
    scaling = layer.lora_alpha / layer.r
    if isinstance(layer, Linear):
        return weight + scaling * B @ A
    weight, r = weight.copy(), layer.r
    size = weight.shape[0] // len(layer.enable_lora)
    enabled = [i for i, flag in enumerate(layer.enable_lora) if flag]
    for place, block in enumerate(enabled):
        change = B[place * size : (place + 1) * size] @ A[place * r : (place + 1) * r]
        weight[block * size : (block + 1) * size] += scaling * change
    return weight


def make(kind, r, fan_in_fan_out, enable_lora=None, **kwargs):
    kwargs = {"r": r, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out, **kwargs}
    if kind is MergedLinear:
        kwargs["enable_lora"] = enable_lora
    return kind(5, 6, **kwargs)


CASES = [(Linear, None), *[(MergedLinear, pattern) for pattern in PATTERNS]]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize(("kind", "enable_lora"), CASES)
def test_forward_gradients_and_merge(kind, enable_lora, r, fan_in_fan_out, rng):
    layer = make(kind, r, fan_in_fan_out, enable_lora)
    if layer.has_adapter:
        random_lora(layer, rng)
    x, c = rng.standard_normal((2, 3, 5)).astype("f"), rng.standard_normal((2, 3, 6)).astype("f")
    X, W = jt.array(x), effective_weight(layer)
    expected = x @ W.T + layer.bias.numpy()
    y = layer(X)
    np.testing.assert_allclose(y.numpy(), expected, atol=2e-5)

    # d sum(c * y): dx = c W; dW = c^T x, from which dB = s dW A^T and dA = s B^T dW, blockwise.
    parameters = [layer.lora_A, layer.lora_B] if layer.has_adapter else []
    gradients = [g.numpy() for g in jt.grad((y * jt.array(c)).sum(), [X, *parameters])]
    np.testing.assert_allclose(gradients[0], c @ W, atol=5e-5)
    if layer.has_adapter:
        A, B = layer.lora_A.numpy(), layer.lora_B.numpy()
        dW = c.reshape(-1, 6).T @ x.reshape(-1, 5)
        flags = [True] if kind is Linear else enable_lora
        size, scaling = 6 // len(flags), 6 / r
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for place, block in enumerate(i for i, flag in enumerate(flags) if flag):
            rows, cols = slice(place * size, (place + 1) * size), slice(place * r, (place + 1) * r)
            part = dW[block * size : (block + 1) * size]
            dB[rows], dA[cols] = scaling * part @ A[cols].T, scaling * B[rows].T @ part
        np.testing.assert_allclose(gradients[1], dA, atol=3e-4)
        np.testing.assert_allclose(gradients[2], dB, atol=3e-4)

    start = layer.weight.numpy()
    layer.eval()
    layer.eval()
    assert layer.merged
    merged = layer.weight.numpy()
    np.testing.assert_allclose(merged.T if fan_in_fan_out else merged, W, atol=1e-5)
    np.testing.assert_allclose(layer(X).numpy(), expected, atol=3e-5)
    layer.train()
    layer.train()
    assert not layer.merged
    np.testing.assert_array_equal(layer.weight.numpy(), start)


def test_gradient_by_finite_differences(rng):
    layer = make(MergedLinear, 2, True, [True, False, True])
    random_lora(layer, rng)
    x, c = rng.standard_normal((4, 5)).astype("f"), rng.standard_normal((4, 6)).astype("f")

    def loss(name, array):
        # In float64 by the formula, which the forward test has compared with the layer.
        values = {"lora_A": layer.lora_A.numpy(), "lora_B": layer.lora_B.numpy(), name: array}
        saved = layer.lora_A, layer.lora_B
        layer.lora_A, layer.lora_B = (Values(values[n]) for n in ("lora_A", "lora_B"))
        try:
            return float((c * (x @ effective_weight(layer).T)).sum())
        finally:
            layer.lora_A, layer.lora_B = saved

    names = ["lora_A", "lora_B"]
    y = (layer(jt.array(x)) * jt.array(c)).sum()
    gradients = jt.grad(y, [getattr(layer, name) for name in names])
    for name, gradient in zip(names, gradients):
        array = getattr(layer, name).numpy().astype(np.float64)
        for index in [(0, 0), (1, 1), (2, 0), (3, 1)]:
            step = np.zeros_like(array)
            step[index] = 1e-4
            slope = (loss(name, array + step) - loss(name, array - step)) / 2e-4
            assert gradient.numpy()[index] == pytest.approx(slope, rel=1e-3, abs=1e-4)


class Values:
    """Stands in for a Var, with more digits."""

    def __init__(self, array):
        self.array = array

    def numpy(self):
        return self.array


def test_start_is_the_base_layer(rng):
    layer = Linear(5, 6, r=2)
    plain = Linear(5, 6)
    layers.assign(plain.weight, layer.weight)
    layers.assign(plain.bias, layer.bias)
    x = jt.array(rng.standard_normal((3, 5)).astype("f"))
    np.testing.assert_array_equal(layer(x).numpy(), plain(x).numpy())
    A = layer.lora_A.numpy()
    assert np.abs(A).max() <= 1 / np.sqrt(5) and np.abs(A).std() > 0.05
    assert not layer.lora_B.numpy().any()
    assert not plain.has_adapter and not plain.weight.is_stop_grad()


@pytest.mark.parametrize("kind", ["linear", "merged"])
@pytest.mark.parametrize("base_kind", [nn.Linear, Conv1D])
def test_from_base_and_back(kind, base_kind, rng):
    base = Conv1D(6, 5) if base_kind is Conv1D else nn.Linear(5, 6)
    x = jt.array(rng.standard_normal((3, 5)).astype("f"))
    before = base(x).numpy()
    if kind == "linear":
        layer = Linear.from_base(base, 2, 6)
    else:
        layer = MergedLinear.from_base(base, 2, 6, enable_lora=[True, False, True])
    assert layer.weight is base.weight and layer.bias is base.bias
    assert layer.fan_in_fan_out is (base_kind is Conv1D)
    np.testing.assert_array_equal(layer(x).numpy(), before)
    random_lora(layer, rng)
    changed = layer(x).numpy()
    assert np.abs(changed - before).max() > 0.1
    layer.eval()
    assert not layer.merged  # merging is an explicit call here
    layer.merge()
    plain = layer.to_base()
    assert type(plain) is base_kind
    np.testing.assert_allclose(plain(x).numpy(), changed, atol=2e-5)


def test_a_hundred_rounds_leave_the_weight(rng):
    layer = Linear(5, 6, r=4, lora_alpha=32)
    random_lora(layer, rng)
    start = layer.weight.numpy()
    for _ in range(100):
        layer.eval()
        layer.train()
    np.testing.assert_array_equal(layer.weight.numpy(), start)


def test_unmerge_after_the_adapter_was_replaced(rng):
    layer = Linear(5, 6, r=2)
    random_lora(layer, rng)
    start = layer.weight.numpy()
    layer.eval()
    random_lora(layer, rng)
    layer.train()
    np.testing.assert_array_equal(layer.weight.numpy(), start)


def test_weights_loaded_into_a_merged_layer_are_kept(rng):
    """A checkpoint of a merged model, loaded into a merged one, is unmerged as loralib does."""
    source, layer = Linear(5, 6, r=2), Linear(5, 6, r=2)
    random_lora(source, rng)
    plain = source.weight.numpy()
    source.eval()
    layer.eval()
    layer.load_state_dict({name: var.numpy() for name, var in source.state_dict().items()})
    layer.train()
    np.testing.assert_allclose(layer.weight.numpy(), plain, atol=1e-5)


@pytest.mark.parametrize("way", ["load", "in place"])
def test_other_weights_are_known_by_all_their_numbers(rng, way):
    """They have the same largest number as the merged ones; a small one differs."""
    layer = Linear(5, 6, r=2)
    random_lora(layer, rng)
    change = layer.delta_weight().numpy()
    layer.eval()
    other = layer.weight.numpy().copy()
    least = np.unravel_index(other.argmin(), other.shape)
    other[least] -= 1.0
    if way == "load":
        layer.load_state_dict({"weight": other})
    else:
        layer.weight.data[least] -= 1.0
    layer.train()
    np.testing.assert_allclose(layer.weight.numpy(), other - change, atol=1e-6)


def test_a_restarted_gradient_is_no_other_weight(rng):
    """start_grad() gives a Var another id; unmerging leaves no rounding error even so."""
    layer = Linear(5, 6, r=2)
    random_lora(layer, rng)
    start = layer.weight.numpy()
    layer.eval()
    layer.weight.start_grad()
    layer.train()
    np.testing.assert_array_equal(layer.weight.numpy(), start)


class Model(nn.Module):
    def __init__(self, merge_weights=True):
        self.first = nn.Linear(5, 5)
        self.blocks = nn.Sequential(Linear(5, 5, r=2, merge_weights=merge_weights), nn.Linear(5, 4))

    def execute(self, x):
        return self.blocks(self.first(x))


def trainable(model) -> set[str]:
    return {name for name, var in model.named_parameters() if not var.is_stop_grad()}


def test_merging_goes_through_a_model():
    model = Model()
    model.eval()
    assert model.blocks[0].merged
    model.train()
    assert not model.blocks[0].merged
    model = Model(merge_weights=False)
    model.eval()
    assert not model.blocks[0].merged


@pytest.mark.parametrize("order", ["te", "et", "eett", "etet", "tet"])
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_base_stays_frozen(order, evaluated_before, rng):
    model = Model()
    if evaluated_before:
        # Jittor notes now that everything is trainable, and train() would restart it all.
        model.eval()
    layers.mark_only_lora_as_trainable(model)
    random_lora(model.blocks[0], rng)
    lora = {"blocks.0.lora_A", "blocks.0.lora_B"}
    if model.blocks[0].merged:
        model.train()
    start = {n: v.numpy() for n, v in model.named_parameters() if n not in lora}
    assert trainable(model) == lora
    for step in order:
        model.train() if step == "t" else model.eval()
    model.train()
    assert trainable(model) == lora
    optimiser = nn.SGD([v for n, v in model.named_parameters() if n in lora], lr=0.1)
    before = model.blocks[0].lora_B.numpy()
    optimiser.step(model(jt.ones((2, 5))).sum())
    assert np.abs(model.blocks[0].lora_B.numpy() - before).max() > 0
    for name, var in model.named_parameters():
        if name in start:
            np.testing.assert_array_equal(var.numpy(), start[name])


def test_frozen_weight_has_no_gradient_even_when_jittor_restarts_it():
    layer = Linear(5, 6, r=2)
    layer.weight.start_grad()
    y = layer(jt.ones((2, 5))).sum()
    assert layer.weight.is_stop_grad()
    assert not jt.grad(y, [layer.weight])[0].numpy().any()


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ("none", {"blocks.0.lora_A", "blocks.0.lora_B"}),
        ("lora_only", {"blocks.0.lora_A", "blocks.0.lora_B", "blocks.0.bias"}),
        (
            "all",
            {"blocks.0.lora_A", "blocks.0.lora_B", "blocks.0.bias", "first.bias", "blocks.1.bias"},
        ),
    ],
)
def test_biases(bias, names):
    model = Model()
    layers.mark_only_lora_as_trainable(model, bias)
    assert trainable(model) == names
    assert set(layers.lora_state_dict(model, bias)) == names


def test_only_parameters_are_saved():
    layer = MergedLinear(5, 6, r=2, lora_dropout=0.1, enable_lora=[True, False, True])
    names = ["weight", "bias", "lora_A", "lora_B"]
    assert list(layer.state_dict()) == names
    layer.eval()
    assert list(layer.state_dict()) == names
    assert layer.lora_A.shape == [4, 5] and layer.lora_B.shape == [4, 2]


def test_dropout_is_on_the_lora_branch_only(rng):
    layer = Linear(5, 6, r=2, lora_dropout=0.5, merge_weights=False)
    A, B = random_lora(layer, rng)
    x = rng.standard_normal((3, 5)).astype("f")
    mask = (rng.random((3, 5)) > 0.5).astype("f") * 2
    base = x @ layer.weight.numpy().T + layer.bias.numpy()
    layer.lora_dropout, dropout = (lambda v: v * jt.array(mask)), layer.lora_dropout
    expected = base + (x * mask) @ A.T @ B.T / 2
    np.testing.assert_allclose(layer(jt.array(x)).numpy(), expected, atol=1e-5)
    layer.lora_dropout = dropout
    assert dropout.is_train
    layer.eval()
    assert not dropout.is_train
    np.testing.assert_allclose(layer(jt.array(x)).numpy(), base + x @ A.T @ B.T / 2, atol=1e-5)


def test_engine_replaces_the_frozen_product_while_unmerged(rng):
    layer = Linear(5, 6, r=2)
    A, B = random_lora(layer, rng)
    x = rng.standard_normal((3, 5)).astype("f")

    class Engine:
        whole = None

        def __call__(self, x):
            return jt.ones((3, 6))

        def with_lora(self, x, layer):
            return self.whole

    layer._engine = Engine()
    np.testing.assert_allclose(layer(jt.array(x)).numpy(), 1 + x @ A.T @ B.T / 2, atol=1e-5)
    layer._engine.whole = jt.full((3, 6), 7.0)
    np.testing.assert_array_equal(layer(jt.array(x)).numpy(), np.full((3, 6), 7))
    layer.eval()
    expected = x @ layer.weight.numpy().T + layer.bias.numpy()
    np.testing.assert_allclose(layer(jt.array(x)).numpy(), expected, atol=1e-5)


def test_embedding(rng):
    layer = Embedding(7, 4, r=2, lora_alpha=3, padding_idx=1)
    assert not layer.lora_A.numpy().any() and layer.lora_B.numpy().std() > 0.1
    A, B = random_lora(layer, rng)
    ids = np.array([[0, 3, 1], [6, 3, 3]], np.int32)
    table = layer.weight.numpy() + 1.5 * (B @ A).T
    y = layer(jt.array(ids))
    np.testing.assert_allclose(y.numpy(), table[ids], atol=1e-5)
    c = rng.standard_normal((2, 3, 4)).astype("f")
    dA, dB = jt.grad((y * jt.array(c)).sum(), [layer.lora_A, layer.lora_B])
    expected = np.zeros((7, 4))
    np.add.at(expected, ids, c)
    np.testing.assert_allclose(dB.numpy(), 1.5 * (A @ expected).T, atol=1e-4)
    np.testing.assert_allclose(dA.numpy(), 1.5 * (kept(expected) @ B).T, atol=1e-4)
    layer.eval()
    np.testing.assert_allclose(layer(jt.array(ids)).numpy(), table[ids], atol=1e-5)
    layer.train()
    np.testing.assert_allclose(layer.to_base()(jt.array([0])).numpy(), layer.weight.numpy()[:1])


def kept(table: np.ndarray) -> np.ndarray:
    """Without the padding row, which learns nothing in A."""
    table = table.copy()
    table[1] = 0
    return table


@pytest.mark.parametrize(
    ("kind", "plain", "shape", "lora_B", "settings"),
    [
        (layers.Conv1d, nn.Conv1d, (2, 4, 9), (6, 6), {"stride": 2, "padding": 1}),
        (layers.Conv2d, nn.Conv2d, (2, 4, 7, 6), (18, 6), {"padding": 1, "bias": False}),
        (layers.Conv2d, nn.Conv2d, (2, 4, 7, 6), (9, 6), {"groups": 2, "stride": 2}),
        (layers.Conv3d, nn.Conv3d, (1, 4, 5, 4, 4), (54, 6), {"padding": 1}),
    ],
)
def test_convolutions(kind, plain, shape, lora_B, settings, rng):
    layer = kind(4, 6, 3, r=2, lora_alpha=5, **settings)
    assert tuple(layer.lora_A.shape) == (6, 12) and tuple(layer.lora_B.shape) == lora_B
    x = jt.array(rng.standard_normal(shape).astype("f"))
    twin = plain(4, 6, 3, **settings)
    twin.weight.update(layer.weight)
    if twin.bias is not None:
        twin.bias.update(layer.bias)
    np.testing.assert_allclose(layer(x).numpy(), twin(x).numpy(), atol=1e-5)
    A, B = random_lora(layer, rng)
    start = layer.weight.numpy()
    twin.weight.update(jt.array(start + 2.5 * (B @ A).reshape(start.shape)))
    expected = twin(x).numpy()
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-3, rtol=1e-4)
    layer.eval()
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-3, rtol=1e-4)
    layer.train()
    np.testing.assert_array_equal(layer.weight.numpy(), start)
    names = {"conv.weight", "lora_A", "lora_B"} | (
        {"conv.bias"} if layer.bias is not None else set()
    )
    assert set(layer.state_dict()) == names
    layers.mark_only_lora_as_trainable(layer, "lora_only")
    assert trainable(layer) == names - {"conv.weight"}


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: Linear(5, 6, r=-1), "r must be a whole number"),
        (lambda: Linear(5, 6, r=1.5), "r must be a whole number"),
        (lambda: Linear(5, 6, r=2, lora_dropout=1.0), "lora_dropout must be"),
        (lambda: MergedLinear(5, 7, r=2, enable_lora=[True, False, True]), "do not divide"),
        (lambda: MergedLinear(5, 6, r=2, enable_lora=[]), "do not divide"),
        (lambda: layers.Conv2d(4, 4, (3, 3), r=2), "kernel_size must be one whole number"),
        (lambda: Linear.from_base(nn.Embedding(3, 4), 2), "cannot put LoRA around a Embedding"),
        (lambda: Linear.from_base(Linear(5, 6, r=1), 2), "cannot put LoRA around a Linear"),
        (lambda: layers.lora_state_dict(nn.Linear(2, 2), "some"), "bias must be"),
        (lambda: layers.mark_only_lora_as_trainable(nn.Linear(2, 2), "some"), "bias must be"),
    ],
)
def test_errors(make_layer, message):
    with pytest.raises(UserError, match=message):
        make_layer()
