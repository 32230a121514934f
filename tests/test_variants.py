"""Variants of LoRA: those of the table, and one from outside that docs/adding.md shows."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import ids_of, randomise_adapter, tiny_gpt2, tiny_llama, wide_gpt2, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.export_folder import write_merged
from jlora.analysis.updates import read_updates
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.formats.names import is_lora_name
from jlora.formats.peft_file import read_peft
from jlora.layers import VARIANTS, LoraVariant, assign
from jlora.models.hub import load
from jlora.runs import pipeline
from jlora.runs.recipe import Recipe
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn

IDS, TARGETS = ids_of((2, 9)), ids_of((18,), seed=1)
ADDING = Path(__file__).resolve().parents[1] / "docs" / "adding.md"


class Gated(LoraVariant):
    """A variant that PEFT lacks, on every kind of layer: each rank's share is weighed."""

    parameters = ("lora_gate",)

    def init(self, layer):
        layer.lora_gate = jt.ones((1,))

    def forward(self, layer, x, y):
        return y + layer.low_rank(x) * layer.lora_gate

    def merged_weight(self, layer, weight):
        return weight + layer.delta_weight() * layer.lora_gate


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path_factory):
    """The table with two more: the class of docs/adding.md, read from a file, and `Gated`."""
    section = ADDING.read_text(encoding="utf-8").partition("## A LoRA variant")[2]
    file = tmp_path_factory.mktemp("outside") / "weighed.py"
    file.write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    spec = importlib.util.spec_from_file_location("outside_weighed", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(VARIANTS, "weighed", module.Weighed())
    monkeypatch.setitem(VARIANTS, "gated", Gated())


MODELS = {
    "gpt2": (wide_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2-blocks": (
        wide_gpt2,
        {"target_modules": ["c_attn", "c_fc"], "enable_lora": [True, False, True]},
    ),
    "llama": (wide_llama, {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
}
BUILT = ("rslora", "dora", "rsdora", "weighed", "gated")
KINDS = [(variant, kind) for variant in BUILT for kind in MODELS]
KINDS += [("lora_bias", "gpt2"), ("lora_bias", "gpt2-blocks")]


def adapted(variant, kind="llama", scale=0.1):
    jt.set_global_seed(0)
    make, settings = MODELS[kind]
    model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, variant=variant, **settings))
    # Added to the first values: magnitudes stay what they are, and B is no longer zero.
    generator = np.random.default_rng(1)
    tensors = model.adapter_tensors()
    model.set_adapter_tensors(
        {n: a + scale * generator.standard_normal(a.shape).astype("f") for n, a in tensors.items()}
    )
    model.eval()
    return model


def logits(model):
    return model(jt.array(IDS)).numpy()


def loss_of(model):
    hidden = model.hidden_states(jt.array(IDS)).reshape(18, -1)
    return model.target_losses(hidden, jt.array(TARGETS)).mean()


def gradients(model):
    model.train()
    names, parameters = zip(*model.trainable_parameters())
    found = jt.grad(loss_of(model), list(parameters))
    return dict(zip(names, (gradient.numpy() for gradient in found)))


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(("variant", "kind"), KINDS)
def test_life_of_a_variant(variant, kind, tmp_path):
    plain = logits(MODELS[kind][0]())
    untrained = adapted(variant, kind, scale=0.0)
    np.testing.assert_allclose(logits(untrained), plain, atol=1e-5)
    model = adapted(variant, kind)
    right = logits(model)
    assert difference(right, plain) > 0.05
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model), plain)
    names = {name for name, _ in model.trainable_parameters()}
    own = {name.rpartition(".")[2] for name in names} - {"lora_A", "lora_B"}
    assert own == set(VARIANTS[variant].parameters) and all(map(is_lora_name, names))

    model.save_pretrained(tmp_path / "adapter")
    for notes in (True, False):
        if not notes:
            (tmp_path / "adapter" / "jlora_adapter.json").unlink()
        loaded = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path / "adapter")
        np.testing.assert_array_equal(logits(loaded), right)
        assert loaded.peft_config.lora_variant is VARIANTS[variant]

    report = model.merge_adapter()
    assert report.layers == len(model.lora_layers())
    np.testing.assert_allclose(logits(model), right, atol=2e-5)
    model.unmerge_adapter()
    np.testing.assert_array_equal(logits(model), right)
    write_merged(model, tmp_path / "merged")
    np.testing.assert_allclose(logits(load(tmp_path / "merged")), right, atol=2e-5)
    np.testing.assert_array_equal(logits(loaded.unload()), plain)


def test_training_changes_all_of_its_parameters():
    model = adapted("dora")
    before, first = model.adapter_tensors(), loss_of(model).item()
    for _ in range(5):
        slopes = gradients(model)
        for name, parameter in model.trainable_parameters():
            assign(parameter, parameter - jt.array(slopes[name]))
    after = model.adapter_tensors()
    assert loss_of(model).item() < first - 0.01
    assert all(not np.array_equal(before[name], after[name]) for name in before)


@needs_bf16
@pytest.mark.parametrize("keep_weights", [True, False])
@pytest.mark.parametrize("variant", ["rslora", "dora", "weighed", "lora_bias"])
def test_the_engine_computes_the_variant(variant, keep_weights):
    """rsLoRA in the fused operators, which know LoRA with any scaling; the others by themselves.

    Once nothing of it is trained, they read a weight with its change in it.
    """
    model = adapted(variant)
    right, slopes = logits(model), gradients(model)
    engine.prepare(model, "bf16", keep_weights=keep_weights)
    fast = gradients(model)
    joined = [np.concatenate([g[name].ravel() for name in slopes]) for g in (fast, slopes)]
    assert difference(*joined) < 3e-2
    blocks = [m for m in model.modules() if type(m) in engine.BLOCKS.values()]
    fused = [any(vars(block).get("_plans", {}).values()) for block in blocks]
    assert fused == [VARIANTS[variant].is_plain] * 2
    model.eval()
    assert difference(logits(model), right) < 2e-2
    decoder = decoder_of(model)
    assert isinstance(decoder, NativeDecoder) == VARIANTS[variant].is_plain
    decoder.enter([[3, 1, 4]])
    plain = Decoder(model)
    plain.enter([[3, 1, 4]])
    states = np.array(plain.hidden)
    assert difference(np.array(decoder.hidden), states) < 2e-2
    model.freeze()
    assert difference(logits(model), right) < 2e-2
    assert all(any(p for p in vars(block)["_plans"].values()) for block in blocks)
    decoder = decoder_of(model)
    assert isinstance(decoder, NativeDecoder)
    decoder.enter([[3, 1, 4]])
    assert difference(np.array(decoder.hidden), states) < 2e-2
    with model.disable_adapter():
        assert difference(logits(model), logits(MODELS["llama"][0]())) < 2e-2
    tensors = model.adapter_tensors()  # what was folded follows
    model.set_adapter_tensors({name: 0.5 * array for name, array in tensors.items()})
    changed = logits(model)
    engine.restore(model)
    assert difference(changed, logits(model)) < 2e-2 < difference(changed, right)


def test_dora_is_what_its_paper_says():
    """Against numpy, on one layer in each of the two layouts."""
    names = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}
    for kind, name in names.items():
        layer = adapted("dora", kind).lora_layers()[name]
        W, A, B = (v.numpy().astype(np.float64) for v in (layer.weight, layer.lora_A, layer.lora_B))
        m = layer.lora_magnitude_vector.numpy()
        V = (W.T if layer.fan_in_fan_out else W) + 2 * B @ A
        x = np.random.default_rng(0).standard_normal((3, layer.in_features)).astype("f")
        expected = x @ (m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)).T
        if layer.bias is not None:
            expected = expected + layer.bias.numpy()
        np.testing.assert_allclose(layer(jt.array(x)).numpy(), expected, atol=1e-5)


def test_dora_drops_for_both_parts():
    """As in PEFT: V multiplies what is left of x, and W what all of x is."""

    class Doubling(nn.Dropout):
        def execute(self, x):
            return 2 * x

    layer = adapted("dora", "gpt2").lora_layers()["transformer.h.1.mlp.c_proj"]
    x = jt.array(np.random.default_rng(0).standard_normal((3, layer.in_features)).astype("f"))
    whole, bias = layer(x).numpy(), layer.bias.numpy()
    layer.adapter_enabled = False
    base = layer(x).numpy()
    layer.adapter_enabled = True
    layer.lora_dropout = Doubling(0.5, is_train=True)
    np.testing.assert_allclose(layer(x).numpy(), 2 * whole - bias - (base - bias), atol=1e-5)
    layer.lora_dropout.is_train = False
    assert not layer.drops


def test_a_bias_of_b_needs_one_of_the_base_to_be_merged():
    model = adapted("lora_bias", "llama")
    with pytest.raises(UserError, match="LoraBias: the base layer has no bias to merge into, as"):
        model.merge_adapter()
    mixed = get_peft_model(
        tiny_llama(model_type="qwen2"),
        LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_bias=True),
    )
    with pytest.raises(UserError, match="no bias to merge into"):
        mixed.merge_adapter()
    for left in (model, mixed):
        assert not any(layer.merged for layer in left.lora_layers().values())
    with pytest.raises(UserError, match="lora_bias goes on linear layers only"):
        get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["wpe"], lora_bias=True))
    with pytest.raises(UserError, match="lora_bias goes with plain LoRA alone, and not with use_d"):
        LoraConfig(lora_bias=True, use_dora=True)


def test_training_says_what_a_variant_costs(monkeypatch, tmp_path, capsys):
    class Started(Exception):
        pass

    def train(*arguments):
        raise Started

    monkeypatch.setattr(pipeline, "train", train)
    data = SimpleNamespace(train=[], valid=[])
    for settings, said in (({"use_dora": True}, True), ({"use_rslora": True}, False)):
        recipe = Recipe("m", lora=LoraConfig(target_modules=["c_attn"], **settings))
        with pytest.raises(Started):
            pipeline.finetune(
                recipe, tmp_path, get_peft_model(tiny_gpt2(), recipe.lora), data, False
            )
        found = capsys.readouterr()
        assert ("variant dora: its layers run one by one" in found.out + found.err) == said


def test_rslora_by_either_setting(tmp_path):
    for settings in ({"use_rslora": True}, {"variant": "rslora"}):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], **settings)
        model = get_peft_model(tiny_gpt2(), config)
        assert {layer.scaling for layer in model.lora_layers().values()} == {4.0}
        model.save_pretrained(tmp_path / "a")
        written = read_peft(tmp_path / "a").config
        assert written["use_rslora"] is True and written["peft_type"] == "LORA"
        assert "variant" not in written
    assert VARIANTS["rslora"].is_plain and not VARIANTS["gated"].is_plain
    # Files for PEFT count fused blocks as one: the scaling stays, and alpha is whole where it was.
    config = LoraConfig(r=4, lora_alpha=32, enable_lora=[True, False, True])
    get_peft_model(tiny_gpt2(), config).save_pretrained(tmp_path / "b")
    assert read_peft(tmp_path / "b").config["lora_alpha"] == 64


def test_files_say_the_variant(tmp_path, monkeypatch):
    adapted("dora").save_pretrained(tmp_path / "dora")
    files = read_peft(tmp_path / "dora")
    assert files.config["use_dora"] is True and files.config["peft_type"] == "LORA"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    assert files.tensors[key].shape == (128,)
    model = adapted("gated", "gpt2-blocks")
    model.save_pretrained(tmp_path / "gated")
    config = read_peft(tmp_path / "gated").config
    assert (config["peft_type"], config["variant"]) == ("JLORA", "gated")  # which PEFT refuses
    with pytest.raises(UserError, match="variant 'gated' has no place in a loralib file"):
        model.save_loralib(tmp_path / "a.pt")
    with pytest.raises(UserError, match="variant 'gated' changes the weights by more than B A"):
        read_updates(tmp_path / "gated", tmp_path / "gated")
    monkeypatch.delitem(VARIANTS, "gated")
    with pytest.raises(UserError, match=r"adapter_config.json: variant 'gated' is no variant"):
        PeftModel.from_pretrained(wide_gpt2(), tmp_path / "gated")


def test_keys_as_older_versions_of_peft_write_them(tmp_path):
    model = adapted("dora")
    model.save_pretrained(tmp_path)
    right = logits(model)
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k + ".weight" * k.endswith("vector"): a for k, a in tensors.items()}, file)
    loaded = PeftModel.from_pretrained(wide_llama(), tmp_path)
    np.testing.assert_array_equal(logits(loaded), right)


def test_a_variant_may_refuse_a_layer():
    base = tiny_gpt2()
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(UserError, match="this variant goes on linear layers only"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn", "wte"], variant="weighed"))
    assert [name for name, _ in base.named_parameters()] == names


def test_a_variant_on_an_embedding():
    model = get_peft_model(
        tiny_gpt2(), LoraConfig(r=2, target_modules=["wpe", "c_attn"], variant="gated")
    )
    right = logits(randomise_adapter(model))
    layer = model.lora_layers()["transformer.wpe"]
    change = layer.lora_gate.item() * layer.delta_weight().numpy()
    expected = layer.weight.numpy() + change
    np.testing.assert_allclose(layer(jt.array([3, 5])).numpy(), expected[[3, 5]], atol=1e-5)
    np.testing.assert_allclose(logits(model.merge_and_unload(quiet=True)), right, atol=1e-5)


def test_weights_loaded_into_a_merged_layer_of_another_variant():
    model = adapted("gated")
    model.merge_adapter()
    layer = next(iter(model.lora_layers().values()))
    layer.weight.update(layer.weight + 1)
    with pytest.raises(UserError, match="Gated: other weights were loaded into a merged layer"):
        layer.unmerge()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "rslor"}, "variant 'rslor' is no variant of LoRA here; nearest: rslora"),
        ({"variant": 3}, "variant 3 is no variant of LoRA here; there are lora, rslora"),
        ({"variant": "lora", "use_rslora": True}, "use_rslora and variant='lora' exclude"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


class Unlisted(LoraVariant):
    def init(self, layer):
        layer.lora_more = jt.ones((1,))


class Misnamed(LoraVariant):
    parameters = ("gate",)

    def init(self, layer):
        layer.gate = jt.ones((1,))


@pytest.mark.parametrize("variant", [Unlisted, Misnamed])
def test_parameters_that_would_not_be_saved_are_a_mistake(variant, monkeypatch):
    monkeypatch.setitem(VARIANTS, "wrong", variant())
    with pytest.raises(ValueError, match="both must be the same, and begin with lora_"):
        get_peft_model(tiny_gpt2(), LoraConfig(r=2, variant="wrong"))


def test_a_recipe_names_it(tmp_path):
    from jlora.runs.recipe import load_recipe

    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"model": "m", "lora": {"r": 2, "variant": "dora"}}))
    assert load_recipe(file).lora.lora_variant is VARIANTS["dora"]
