"""Full fine-tuning, BitFit and top layers: what is trained, saved and loaded again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import ids_of, randomise_adapter, tiny_gpt2, tiny_llama, weights, wide_llama

import jlora
from jlora import engine
from jlora.adapters import PartialModel, is_partial
from jlora.adapters.export_folder import write_merged
from jlora.decoding.beam import BeamConfig, beam_search
from jlora.runs.adapter_file import load_tuned
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.training.adamw import AdamW, OptimConfig

METHODS = ("full", "bitfit", "top-layers")


def logits(model) -> np.ndarray:
    return model(jt.array(ids_of((2, 7)))).numpy()


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("method", METHODS)
def test_a_new_one_computes_what_the_base_computes(make, method):
    before = logits(make())
    np.testing.assert_allclose(logits(PartialModel(make(), method, 1)), before, atol=1e-6)


def test_what_is_trained():
    gpt2 = tiny_gpt2()
    everything = {name for name, _ in gpt2.named_parameters()}
    names = {name for name, _ in PartialModel(gpt2, "full").trainable_parameters()}
    assert names == everything
    bitfit = PartialModel(tiny_gpt2(), "bitfit").trainable_parameters()
    assert {name for name, _ in bitfit} == {n for n in everything if n.endswith("bias")}
    top = {name for name, _ in PartialModel(tiny_gpt2(), "top-layers", 1).trainable_parameters()}
    assert top == {name for name in everything if ".h.1." in name}
    top = {name for name, _ in PartialModel(tiny_llama(), "top-layers", 2).trainable_parameters()}
    assert top and all(".layers." in name for name in top)


def test_bitfit_gives_a_llama_biases_and_its_config_says_so():
    model = PartialModel(tiny_llama(), "bitfit")
    names = [name for name, _ in model.trainable_parameters()]
    assert len(names) == 2 * 7 and all(name.endswith("_proj.bias") for name in names)
    assert model.config.attention_bias and model.config.mlp_bias
    with pytest.raises(UserError, match="mistral model has none"):
        PartialModel(tiny_llama(model_type="mistral"), "bitfit")
    # Qwen2 has some of its own; those are trained and no others made.
    own = PartialModel(tiny_llama(model_type="qwen2"), "bitfit").trainable_parameters()
    assert len(own) == 2 * 3


@pytest.mark.parametrize("method", METHODS)
def test_an_update_changes_what_is_trained_and_nothing_else(method):
    model = PartialModel(tiny_gpt2(), method, 1)
    before = weights(model.base_model)
    names = [name for name, _ in model.trainable_parameters()]
    parameters = [var for _, var in model.trainable_parameters()]
    model.train()
    optimizer = AdamW(parameters, OptimConfig(lr=0.1, weight_decay=0.0))
    loss = (model(jt.array(ids_of((2, 7)))) ** 2).mean()
    optimizer.step(optimizer.arrays(jt.grad(loss, parameters)), 0.1)
    after = weights(model.base_model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(names)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(make, method, tmp_path):
    model = randomise_adapter(PartialModel(make(), method, 1))
    expected = logits(model)
    model.save_pretrained(tmp_path / "tuned")
    assert is_partial(tmp_path / "tuned")
    loaded = load_tuned(make(), tmp_path / "tuned")
    np.testing.assert_array_equal(logits(loaded), expected)
    assert loaded.trainable_parameters() == []
    assert all(parameter.is_stop_grad() for parameter in loaded.parameters())


def test_another_base_is_refused(tmp_path):
    PartialModel(tiny_gpt2(), "bitfit").save_pretrained(tmp_path / "tuned")
    with pytest.raises(UserError, match="made for the base model"):
        load_tuned(tiny_gpt2(seed=5), tmp_path / "tuned")
    assert load_tuned(tiny_gpt2(seed=5), tmp_path / "tuned", force=True)


def test_bad_files_and_settings(tmp_path):
    with pytest.raises(UserError, match="method 'half' is not one of"):
        PartialModel(tiny_gpt2(), "half")
    with pytest.raises(UserError, match="top_layers is 3; this model has 2"):
        PartialModel(tiny_gpt2(), "top-layers", 3)
    PartialModel(tiny_gpt2(), "bitfit").save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "tuned.json").write_text(json.dumps({"method": "bitfit"}))
    with pytest.raises(UserError, match="damaged"):
        load_tuned(tiny_gpt2(), tmp_path / "tuned")


@pytest.mark.parametrize("method", METHODS)
def test_merged_it_is_a_plain_model(method, tmp_path):
    model = randomise_adapter(PartialModel(tiny_llama(), method, 1))
    expected = logits(model)
    write_merged(model, tmp_path / "merged")
    np.testing.assert_allclose(logits(jlora.load(tmp_path / "merged")), expected, atol=1e-6)


@needs_bf16
def test_the_engine_packs_a_tuned_model_with_its_biases():
    model = randomise_adapter(PartialModel(wide_llama(), "bitfit"), scale=0.1)
    model.freeze()
    plain = logits(model)
    prompts = [[1, 2, 3], [4, 5]]
    config = BeamConfig(eos_token_ids=(0,), num_beams=3, max_new_tokens=6)
    beams = beam_search(model, prompts, config)
    engine.prepare(model, "bf16", keep_weights=False)
    assert np.abs(logits(model) - plain).max() < 0.02 * np.abs(plain).max()
    for fast, slow in zip(beam_search(model, prompts, config), beams):
        assert fast[0].logprob == pytest.approx(slow[0].logprob, rel=0.02)
