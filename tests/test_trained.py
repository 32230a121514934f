"""Training a model's own parameters under the engine, against plain twins."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from needs import needs, needs_bf16
from test_kernels import assert_close, assert_twins, random, results, run_tests_on
from tiny_models import ids_of, round_bf16, tiny_llama, wide_gpt2, wide_llama

import jlora.training.loop
from jlora import engine
from jlora.data.batches import TokenExample
from jlora.decoding.beam import BeamConfig, beam_search
from jlora.decoding.native_weights import native_model
from jlora.engine.products import TrainedProduct
from jlora.kernels import elementwise, packed_linear
from jlora.kernels.block import _Block
from jlora.kernels.packed_linear import TrainedWeight
from jlora.kernels.target_loss import trained_target_loss
from jlora.layers import assign, set_trainable
from jlora.models import gpt2, llama
from jlora.models.attention import Stream
from jlora.models.head import LanguageHead
from jlora.system import machine
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.training import adamw
from jlora.training.adamw import AdamW, OptimConfig
from jlora.training.loggers import read_metrics
from jlora.training.loop import TrainConfig, train

needs_tiles = needs(
    lambda: packed_linear.tiles() is not None, "trained weights are multiplied by tiles alone"
)


# --- operators ---


@needs_tiles
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(48, 32), (35, 19), (1, 7), (1500, 70), (70, 1500)], ids=str)
def test_trained_product(size, bias, transposed):
    """Everything is the product of factors rounded to bf16, summed in float32."""
    (n, k), w = size, random(*size, seed=4)
    for rows in (1, 33, 1100):  # 1100: more than 32 steps of 32 rows
        x, dy, b = random(rows, k, seed=rows), random(rows, n, seed=rows + 1), random(n, seed=5)

        def product(x, w, *b):
            return TrainedWeight(w, transposed)(x, *b)

        inputs = [x, w.T.copy() if transposed else w] + ([b] if bias else [])
        y, dx, dw, *db = results(product, inputs, dy)
        x, dy, kept = round_bf16(x), round_bf16(dy), round_bf16(w)
        assert_close(y, x @ kept.T + (b if bias else 0), 1e-5)
        assert_close(dx, dy @ kept, 1e-5)
        expected = dy.astype(np.float64).T @ x
        assert_close(dw, expected.T if transposed else expected, 1e-5)
        for gradient in db:
            assert_close(gradient, dy.sum(0, dtype=np.float64), 1e-5)


@needs_tiles
def test_a_trained_weight_follows_its_parameter():
    w, x = jt.array(random(40, 50)), jt.array(random(3, 50))
    trained = TrainedWeight(w, False)
    before = trained(x)  # not computed yet
    copy = trained.packed()
    assert trained.packed() is copy
    assign(w, w * 2)
    after = trained(x).numpy()
    np.testing.assert_array_equal(after, 2 * before.numpy())


@needs_tiles
def test_what_is_not_finite_stays_in_its_column():
    """A gradient that overflows spoils one row of dW; nothing of an earlier call is read."""
    n, k, rows = 45, 70, 33

    def gradients(dy):
        return results(lambda x, w: TrainedWeight(w, False)(x), [random(rows, k), random(n, k)], dy)

    dy = random(rows, n)
    expected = gradients(dy)[2]
    bad = dy.copy()
    bad[3, 7] = np.nan
    assert np.isnan(gradients(bad)[2]).all(1).nonzero()[0].tolist() == [7]
    rows = 64  # fills the tiles' last rows with what must not be read
    gradients(np.full((64, n), np.nan, "f"))
    rows = 33
    np.testing.assert_array_equal(gradients(dy)[2], expected)


@needs_tiles
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape", [(5, 8, 23), (300, 12, 1031), (600, 64, 70), (9, 32, 9000)], ids=str
)
def test_trained_target_loss(shape, smoothing):
    N, C, V = shape
    hidden, w = random(N, C), random(V, C, seed=1, scale=0.5)
    ids = jt.array(np.random.default_rng(2).integers(0, V, N).astype(np.int32))
    factor = random(N, seed=3)

    def fused(hidden, w):
        return trained_target_loss(hidden, TrainedWeight(w, False), ids, smoothing)

    def plain(hidden, w):
        return LanguageHead().losses(hidden, w, ids, smoothing)

    found = results(fused, [hidden, w], factor)
    expected = results(plain, [round_bf16(hidden), round_bf16(w)], factor)
    assert_close(found[0], expected[0], 5e-6, least=1.0)
    for gradient, wanted in zip(found[1:], expected[1:]):  # d logits are rounded to bf16
        assert np.linalg.norm(gradient - wanted) < 3e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [40, 7])
def test_norms_with_trained_weights(size):
    x, w, b = random(3, 70, size), random(size, seed=1), random(size, seed=2)

    def plain_rms(x, w):
        layer = llama.RMSNorm(size, 1e-5)
        layer.weight = w
        return layer(x)

    def plain_layer(x, w, b):
        layer = gpt2.LayerNorm(size, 1e-5)
        layer.weight, layer.bias = w, b
        return layer(x)

    assert_twins(lambda x, w: elementwise.rms_norm(x, w, 1e-5), plain_rms, [x, w])
    assert_twins(
        lambda x, w, b: elementwise.layer_norm(x, w, b, 1e-5), plain_layer, [x, w, b], 5e-6
    )


@pytest.mark.parametrize("width", [12, 64, 70])
def test_embedding(width):
    ids = jt.array(ids_of((3, 50)))
    assert_twins(lambda w: elementwise.embedding(w, ids), lambda w: w[ids], [random(23, width)])


# --- AdamW ---


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("variant", ["torch", "loralib"])
def test_compiled_adamw_is_numpy_s_bit_for_bit(monkeypatch, variant, max_grad_norm):
    config = OptimConfig(variant=variant, max_grad_norm=max_grad_norm, weight_decay=0.1)
    shapes, found = [(100, 333), (77,), (5, 4, 3)], []
    for large in (1 << 40, 0):
        monkeypatch.setattr(adamw, "LARGE", large)
        parameters = [jt.array(random(*shape)) for shape in shapes]
        shared = parameters[0].clone()  # Jittor's clones share memory
        optimizer, draw = AdamW(parameters, config), np.random.default_rng(1)
        for step in range(5):
            before = [parameter.numpy() for parameter in parameters]
            scale = 10.0 ** draw.integers(-12, 3)
            gradients = [(scale * draw.standard_normal(s)).astype("f") for s in shapes]
            optimizer.step(gradients, 1e-2 * step)
        np.testing.assert_array_equal(shared.numpy(), random(*shapes[0]))
        assert all(not parameter.is_stop_grad() for parameter in parameters)
        found.append([*(p.numpy() for p in parameters), optimizer.m.copy(), optimizer.v.copy()])
        assert optimizer.undo(1e-2 * step)
        for parameter, wanted in zip(parameters, before):
            np.testing.assert_allclose(parameter.numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert optimizer._update == optimizer._update_compiled
    for plain, compiled in zip(*found):
        np.testing.assert_array_equal(compiled, plain)


# --- whole models ---

IDS, TARGETS, STREAM = ids_of((1, 50)), ids_of((30,), seed=1), [20, 30]
MODELS = {
    "gpt2": wide_gpt2,
    "llama": wide_llama,
    "tied": lambda: wide_llama(tie_word_embeddings=True),
    "qwen2": lambda: wide_llama(model_type="qwen2"),
}


def names_of(model, which):
    names = [name for name, _ in model.named_parameters()]
    chosen = {
        "all": names,
        "biases": [n for n in names if n.endswith("bias")],
        "norms": [n for n in names if "norm" in n or ".ln_" in n],
        "top": [n for n in names if ".1." in n],
        "one": [n for n in names if "0.attn.c_proj.weight" in n or "0.mlp.up_proj.weight" in n],
    }[which]
    assert chosen
    return chosen


def loss_and_gradients(model, names):
    hidden = model.hidden_states(jt.array(IDS), Stream(STREAM)).reshape(50, -1)
    picked = hidden[jt.array(np.arange(10, 40, dtype=np.int32))]
    loss = model.target_losses(picked, jt.array(TARGETS), 0.1).mean()
    parameters = dict(model.named_parameters())
    gradients = jt.grad(loss, [parameters[name] for name in names])
    return loss.item(), {name: g.numpy() for name, g in zip(names, gradients)}


@needs_bf16
@pytest.mark.parametrize(
    ("kind", "which"),
    [
        *((kind, "all") for kind in MODELS),
        ("gpt2", "biases"), ("qwen2", "biases"), ("llama", "norms"),
        ("gpt2", "top"), ("llama", "top"),
        ("gpt2", "one"), ("llama", "one"),
    ],
)  # fmt: skip
def test_gradients_are_the_plain_model_s(kind, which, monkeypatch):
    model = MODELS[kind]()
    names = names_of(model, which)
    set_trainable(model, names)
    model.train()
    plain_loss, plain = loss_and_gradients(model, names)
    engine.prepare(model, "bf16")
    calls = []
    back = _Block.grad
    monkeypatch.setattr(_Block, "grad", lambda self, dy: calls.append(0) or back(self, dy))
    loss, fused = loss_and_gradients(model, names)
    assert abs(loss - plain_loss) < 5e-3 * plain_loss
    for name, gradient in plain.items():
        if np.linalg.norm(gradient) > 1e-5:  # a bias on keys has no gradient but rounding
            difference = np.linalg.norm(fused[name] - gradient) / np.linalg.norm(gradient)
            assert difference < 5e-2, name
    if packed_linear.tiles() is not None or which in ("biases", "norms"):
        # One block operator for each block above the lowest trained parameter, none below.
        assert len(calls) == (1 if which == "top" else 2)
    engine.restore(model)
    loss, again = loss_and_gradients(model, names)
    assert loss == plain_loss
    for name, gradient in plain.items():
        np.testing.assert_array_equal(again[name], gradient)


@needs_tiles
def test_no_tile_fits_and_layers_run_one_by_one():
    """Heads of 4 numbers: no block operator, but packed products."""
    model = tiny_llama(scale=0.15)
    names = names_of(model, "all")
    set_trainable(model, names)
    _, plain = loss_and_gradients(model, names)
    engine.prepare(model, "bf16")
    assert sum(isinstance(vars(m).get("_packed"), TrainedProduct) for m in model.modules()) == 15
    _, fused = loss_and_gradients(model, names)
    both = [np.concatenate([g.ravel() for g in gradients.values()]) for gradients in (fused, plain)]
    assert np.linalg.norm(both[0] - both[1]) < 5e-2 * np.linalg.norm(both[1])
    before = model(jt.array(IDS)).numpy()
    parameter = model.model.layers[0].mlp.up_proj.weight
    assign(parameter, parameter * 2)
    assert abs(model(jt.array(IDS)).numpy() - before).max() > 0.01  # no stale copy


@needs_bf16
def test_checkpointed_activations_give_the_same_gradients():
    model, found = wide_gpt2(), []
    names = names_of(model, "all")
    set_trainable(model, names)
    for checkpoint in (False, True):
        if checkpoint and packed_linear.tiles() is None:
            break
        engine.prepare(model, "bf16", checkpoint_activations=checkpoint)
        found.append(loss_and_gradients(model, names))
    for name, gradient in found[0][1].items():
        np.testing.assert_array_equal(found[-1][1][name], gradient)


@needs_tiles
@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_decoding_reads_the_weights_of_the_moment(kind):
    """With everything trained as with everything frozen, before and after an update."""
    model, prompts = MODELS[kind](), [[3, 1, 4, 1, 5], [2]]

    def answers(names):
        set_trainable(model, names)
        engine.prepare(model, "bf16")
        model.eval()
        assert native_model(model) is not None
        return beam_search(model, prompts, BeamConfig((22,), num_beams=3, max_new_tokens=6))

    names, found = names_of(model, "all"), []
    for factor in (1.0, 1.1):
        for parameter in model.parameters():
            assign(parameter, parameter * factor)
        if factor > 1:  # the copies follow without another call of prepare
            found.append(
                beam_search(model, prompts, BeamConfig((22,), num_beams=3, max_new_tokens=6))
            )
        frozen = answers([])
        found.append(answers(names))
        assert found[-1] == frozen
    assert found[1] == found[2] != found[0]


class Whole:
    """A model that is trained itself, with what the training loop asks of an adapter."""

    def __init__(self, model, which="all"):
        self.model, self.names = model, names_of(model, which)
        set_trainable(model, self.names)

    def __getattr__(self, name):
        return getattr(self.model, name)

    def train(self):
        self.model.train()
        set_trainable(self.model, self.names)

    def trainable_parameters(self):
        return [(n, p) for n, p in self.model.named_parameters() if n in set(self.names)]

    def adapter_tensors(self):
        return {name: parameter.numpy() for name, parameter in self.trainable_parameters()}

    def set_adapter_tensors(self, tensors):
        for name, parameter in self.trainable_parameters():
            assign(parameter, jt.array(tensors[name]))

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "tensors.npz", **self.adapter_tensors())


def examples(count=40):
    """Three random tokens, then one token again and again: something that can be learnt."""
    generator = np.random.default_rng(5)
    sizes = generator.integers(4, 12, size=count)
    return [TokenExample(generator.integers(1, 23, 3).tolist() + [5] * n, 3) for n in sizes]


SETTINGS = {
    "batch_size": 8, "steps": 20, "log_every": 1, "save_every": 10,
    "optim": OptimConfig(lr=3e-3, warmup_steps=2),
}  # fmt: skip


def run(kind, precision, folder, resume=False):
    model = Whole(MODELS[kind]())
    engine.prepare(model.model, precision)
    train(model, examples(), [], TrainConfig(**SETTINGS), folder, resume=resume)
    losses = [m["loss"] for m in read_metrics(folder / "metrics.jsonl") if "loss" in m]
    return np.array(losses), model.adapter_tensors()


@needs_tiles
@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_twenty_steps_follow_the_plain_model_s(kind, tmp_path, monkeypatch):
    plain, _ = run(kind, "plain", tmp_path / "plain")
    monkeypatch.setattr(adamw, "LARGE", 0)
    fused, _ = run(kind, "bf16", tmp_path / "bf16")
    assert plain[-1] < 0.5 * plain[0]
    np.testing.assert_allclose(fused, plain, rtol=2e-2, atol=2e-2)


@needs_tiles
def test_a_resumed_run_is_bit_for_bit_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(adamw, "LARGE", 0)
    losses, whole = run("gpt2", "bf16", tmp_path / "whole")
    folder, model = tmp_path / "half", Whole(MODELS["gpt2"]())
    engine.prepare(model.model, "bf16")

    class Stop:
        def log(self, record):
            if record["step"] == 13:
                raise KeyboardInterrupt

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        train(model, examples(), [], TrainConfig(**SETTINGS), folder, lambda total, start: [Stop()])
    again, resumed = run("gpt2", "bf16", folder, resume=True)
    np.testing.assert_array_equal(again, losses)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)


def test_a_large_model_whose_loss_is_no_number_keeps_its_last_good_parameters(
    tmp_path, monkeypatch
):
    """The update that followed the last finite loss is taken back."""
    monkeypatch.setattr(adamw, "LARGE", 0)
    model, good, true_loss = Whole(wide_gpt2()), [], jlora.training.loop.batch_loss

    def loss(*args):
        good.append(model.adapter_tensors())
        return true_loss(*args) * (float("nan") if len(good) == 4 else 1.0)

    monkeypatch.setattr(jlora.training.loop, "batch_loss", loss)
    config = TrainConfig(batch_size=4, steps=6, optim=OptimConfig(lr=1e-2))
    with pytest.raises(UserError, match="loss is nan at step 4; the last good adapter is in"):
        train(model, examples(), [], config, tmp_path)
    saved = np.load(tmp_path / "adapter" / "tensors.npz")
    for name, tensor in good[2].items():
        np.testing.assert_allclose(saved[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


# --- processors without AMX ---


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["icelake-server", "cooperlake", "x86-64-v3"])
def test_on_other_processors(arch):
    lacking = {"AVX-512", "AVX512_BF16"} - set(machine.cpu_features())
    if platform.machine() != "x86_64" or lacking and arch != "x86-64-v3":
        pytest.skip(f"this processor does not run {arch}")
    tests = ["test_gradients_are_the_plain_model_s", "test_norms_with_trained_weights",
             "test_compiled_adamw_is_numpy_s_bit_for_bit", "test_trained_product",
             "test_trained_target_loss", "test_twenty_steps_follow_the_plain_model_s"]  # fmt: skip
    run_tests_on(arch, *(f"test_trained.py::{test}" for test in tests))
