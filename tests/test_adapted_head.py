"""LoRA on the output head of a model that has one of its own, by every way through the engine."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import ids_of, randomise_adapter, tiny_llama, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.export_folder import write_merged
from jlora.adapters.export_gguf import export_gguf
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.formats.gguf_file import read_gguf
from jlora.formats.peft_file import read_peft
from jlora.layers import Linear
from jlora.models.hub import load
from jlora.system.errors import UserError
from jlora.system.runtime import jt

IDS, TARGETS = ids_of((2, 9)), ids_of((18,), seed=1)


def adapted(base=wide_llama, **settings):
    jt.set_global_seed(0)
    names = settings.pop("target_modules", ["q_proj", "lm_head"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, **settings)
    return randomise_adapter(get_peft_model(base(), config), scale=0.3)


def logits(model):
    return model(jt.array(IDS)).numpy()


def loss_and_gradients(model):
    model.train()
    hidden = model.hidden_states(jt.array(IDS)).reshape(18, -1)
    loss = model.target_losses(hidden, jt.array(TARGETS), 0.1).mean()
    names, parameters = zip(*model.trainable_parameters())
    return loss.item(), {n: g.numpy() for n, g in zip(names, jt.grad(loss, list(parameters)))}


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_head_is_a_layer_like_the_others(tmp_path):
    model = adapted()
    assert type(model.lora_layers()["lm_head"]) is Linear
    hidden = model.hidden_states(jt.array(IDS)).numpy()
    tensors = {name: var.numpy() for name, var in model.base_model.named_parameters()}
    A, B = tensors["lm_head.lora_A"], tensors["lm_head.lora_B"]
    expected = hidden @ (tensors["lm_head.weight"] + 2 * B @ A).T
    np.testing.assert_allclose(logits(model), expected, atol=2e-5)
    with model.disable_adapter():
        plain = logits(model)
    np.testing.assert_array_equal(plain, logits(wide_llama()))

    model.save_pretrained(tmp_path / "adapter")
    keys = read_peft(tmp_path / "adapter").tensors
    np.testing.assert_array_equal(keys["base_model.model.lm_head.lora_A.weight"], A)
    loaded = PeftModel.from_pretrained(wide_llama(), tmp_path / "adapter")
    np.testing.assert_array_equal(logits(loaded), logits(model))
    merged = loaded.merge_and_unload(quiet=True)
    np.testing.assert_allclose(logits(merged), expected, atol=2e-5)
    np.testing.assert_array_equal(logits(model.unload()), plain)


def test_the_loss_is_that_of_the_logits():
    model = adapted()
    loss, gradients = loss_and_gradients(model)
    rows = logits(model).reshape(18, -1).astype(np.float64)
    log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    expected = -(0.9 * log_p[np.arange(18), TARGETS] + 0.1 * log_p.mean(1)).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(np.abs(gradient).max() > 1e-5 for gradient in gradients.values())


@needs_bf16
@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_every_precision_trains_and_decodes_it(precision, tolerance, keep_weights):
    model = adapted()
    loss, gradients = loss_and_gradients(model)
    model.eval()
    right = logits(model)
    decoder = Decoder(model)
    decoder.enter([[3, 1, 4]])
    best = decoder.best(5)
    engine.prepare(model, precision, keep_weights=keep_weights)
    fast_loss, fast = loss_and_gradients(model)
    assert abs(fast_loss - loss) < tolerance * loss
    for name, gradient in gradients.items():
        assert difference(fast[name], gradient) < 2 * tolerance, name
    model.eval()
    assert difference(logits(model), right) < tolerance
    native = decoder_of(model)
    assert type(native) is not Decoder
    native.enter([[3, 1, 4]])
    found = native.best(5)
    np.testing.assert_allclose(np.array(found[0]), np.array(best[0]), atol=20 * tolerance)
    with model.disable_adapter():
        assert difference(logits(model), right) > 0.1  # the head's own change shows
    engine.restore(model)
    assert difference(logits(model), right) < (1e-6 if keep_weights else tolerance)


@needs_bf16
def test_an_adapter_that_comes_after_the_head_was_packed():
    """The native decoder has the head's packed weight then, without the adapter's change."""
    right = logits(adapted())
    base = wide_llama()
    engine.prepare(base, "bf16")
    model = adapted(lambda: base)
    assert difference(logits(model), right) < 3e-2
    decoder = decoder_of(model)
    decoder.enter([IDS[0].tolist()])
    values, ids = (np.array(found)[0] for found in decoder.best(23))
    log_p = right[0, -1] - np.log(np.exp(right[0, -1]).sum())
    np.testing.assert_allclose(values, log_p[ids], atol=0.2)  # without the change: 3 and more


@needs_bf16
def test_merging_after_the_weights_were_packed():
    model = adapted()
    right = logits(model)
    engine.prepare(model, "bf16", keep_weights=False)
    merged = model.merge_and_unload(quiet=True)
    engine.restore(merged)
    assert difference(logits(merged), right) < 2e-2


def test_export(tmp_path):
    model = adapted()
    write_merged(model, tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_allclose(logits(loaded), logits(model), atol=2e-5)
    export_gguf(model, tmp_path / "merged.gguf", tokenizer=False)
    file = read_gguf(tmp_path / "merged.gguf")
    assert file.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(file.tensors["lm_head.weight"], loaded.lm_head.weight.numpy())


@needs_bf16
def test_a_model_without_its_weights_is_not_exported(tmp_path):
    model = adapted()
    engine.prepare(model, "bf16", keep_weights=False)
    for write in (lambda: write_merged(model, tmp_path / "a"), lambda: export_gguf(
        model, tmp_path / "a.gguf", tokenizer=False
    )):  # fmt: skip
        with pytest.raises(UserError, match="kept in packed form alone.*engine.restore"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_together_with_what_else_may_be_trained():
    model = adapted(base=tiny_llama, bias="all", modules_to_save=["norm"])
    assert {"lm_head.lora_A", "model.norm.modules_to_save.weight"} <= {
        name for name, _ in model.trainable_parameters()
    }
    whole = get_peft_model(tiny_llama(), LoraConfig(r=2, modules_to_save=["head"]))  # as PEFT: ends
    names = {name for name, _ in whole.trainable_parameters()}
    assert "lm_head.modules_to_save.weight" in names and not any("original" in n for n in names)
    linear = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert "lm_head" not in linear.lora_layers()


@needs_bf16
def test_a_head_that_is_packed_alone_takes_no_adapter():
    base = wide_llama()
    for parameter in base.parameters():
        parameter.stop_grad()
    engine.prepare(base, "bf16", keep_weights=False)
    config = LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"lm_head is kept in packed form alone.*engine.restore"):
        get_peft_model(base, config)
    engine.restore(base)
    get_peft_model(base, config)


def test_a_tied_llama_is_told_the_way_out():
    for settings in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(UserError, match="tied to model.embed_tokens.weight .*tie_word_embed"):
            get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(r=2, **settings))
