"""Adapters on tiny models: targets, training flags, PEFT's files, merging, wrong pairs."""

from __future__ import annotations

import contextlib
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import round_bf16

from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.base_model import check_family
from jlora.adapters.storage import block_matrix, find_blocks, from_block_matrix, from_peft_key
from jlora.adapters.targets import is_target
from jlora.layers import Linear, MergedLinear
from jlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jlora.models.llama import LlamaConfig, LlamaForCausalLM
from jlora.system.errors import UserError
from jlora.system.runtime import jt

TINY = {"vocab_size": 97, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 2}
QV = [True, False, True]
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    return filled(GPT2LMHeadModel(GPT2Config(**TINY)), seed)


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 97, "hidden_size": 12, "intermediate_size": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return filled(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), 0)


def filled(model, seed):
    rng = np.random.default_rng(seed)
    for _, var in model.named_parameters():
        var.update(jt.array(0.2 * rng.standard_normal(var.shape).astype("f")))
    return model


def randomise(model: PeftModel) -> None:
    """Random adapter tensors: B would be zero and hide every mistake."""
    rng = np.random.default_rng(1)
    tensors = model.adapter_tensors()
    draw = {n: 0.3 * rng.standard_normal(a.shape).astype("f") for n, a in tensors.items()}
    model.set_adapter_tensors(draw)


def logits(model) -> np.ndarray:
    return model(jt.array(IDS)).numpy()


def trainable(model) -> set[str]:
    return {name for name, var in model.base_model.named_parameters() if not var.is_stop_grad()}


VARIANTS = {
    "query-value": {"r": 4, "lora_alpha": 32, "enable_lora": QV},
    "mixed": {"target_modules": ["c_attn", "c_proj"], "enable_lora": [True, True, False], "r": 2},
    "patterns": {
        "target_modules": ["c_attn", "c_proj", "wte"],
        "r": 2,
        "rank_pattern": {"attn.c_proj": 3},
        "alpha_pattern": {"c_attn": 5},
        "use_rslora": True,
    },
    "all biases": {"bias": "all", "r": 2},
    "lora biases and a module": {"bias": "lora_only", "modules_to_save": ["wpe"], "r": 2},
    "tied module": {
        "layers_to_transform": [1],
        "target_modules": ["c_attn"],
        "modules_to_save": ["wte"],
    },
    "all-linear": {"target_modules": "all-linear", "r": 1, "init_lora_weights": False},
}  # fmt: skip


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_life_of_an_adapter(settings, tmp_path):
    base = gpt2()
    names = [name for name, _ in base.named_parameters()]
    weights = {name: var.numpy() for name, var in base.named_parameters()}
    before = logits(base)
    model = get_peft_model(base, LoraConfig(**settings))
    assert trainable(model) == {name for name, _ in model.trainable_parameters()}
    randomise(model)
    after = logits(model)
    assert np.abs(after - before).max() > 0.05
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model), before)
    np.testing.assert_array_equal(logits(model), after)
    assert trainable(model) == {name for name, _ in model.trainable_parameters()}

    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    for notes in (True, False):
        if not notes:
            (folder / "jlora_adapter.json").unlink()
        loaded = PeftModel.from_pretrained(gpt2(), folder)
        np.testing.assert_array_equal(logits(loaded), after)
        kinds = {name: type(layer) for name, layer in model.lora_layers().items()}
        assert {name: type(layer) for name, layer in loaded.lora_layers().items()} == kinds
        assert loaded.trainable_parameters() == [] and not loaded.is_training()
    loaded = PeftModel.from_pretrained(gpt2(), folder, is_trainable=True)
    assert trainable(loaded) == trainable(model)

    if "wte" in [*(settings.get("modules_to_save") or []), *settings.get("target_modules", [])]:
        with pytest.raises(UserError, match="is the output head as well"):
            loaded.merge_and_unload()
    else:
        plain = loaded.merge_and_unload(quiet=True)
        np.testing.assert_allclose(logits(plain), after, atol=2e-6)
        assert [name for name, _ in plain.named_parameters()] == names
    plain = model.unload()
    np.testing.assert_array_equal(logits(plain), before)
    assert [name for name, _ in plain.named_parameters()] == names
    for name, var in plain.named_parameters():
        np.testing.assert_array_equal(var.numpy(), weights[name])


def test_start_and_counts(capsys):
    base = gpt2()
    before, total = logits(base), sum(v.numel() for _, v in base.named_parameters())
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, enable_lora=QV))
    np.testing.assert_array_equal(logits(model), before)
    count = 2 * (8 * 12 + 24 * 4)
    assert model.get_nb_trainable_parameters() == (count, total + count)
    model.print_trainable_parameters()
    assert (
        f"trainable params: {count:,} || all params: {total + count:,}" in capsys.readouterr().out
    )
    assert [name for name, _ in model.trainable_parameters()][:2] == [
        "transformer.h.0.attn.c_attn.lora_A",
        "transformer.h.0.attn.c_attn.lora_B",
    ]
    assert model.config.n_embd == 12 and model.hidden_states(jt.array(IDS)).shape == [2, 6, 12]
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


@pytest.mark.parametrize("order", ["t", "et", "tet", "eett"])
def test_only_the_adapter_trains_after_train_and_eval(order):
    base = gpt2()
    base.eval()  # Jittor would restart all of this model's gradients at the next train()
    model = get_peft_model(base, LoraConfig(r=2))
    for step in order:
        model.train() if step == "t" else model.eval()
    assert trainable(model) == {name for name, _ in model.trainable_parameters()}
    assert all("lora_" in name for name in trainable(model))


def test_peft_files_of_a_fused_layer(tmp_path):
    model = get_peft_model(gpt2(), LoraConfig(r=4, lora_alpha=32, enable_lora=QV))
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 64)
    assert config["fan_in_fan_out"] is True and "enable_lora" not in config
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    A, B = tensors[key.format("A")], tensors[key.format("B")]
    own = model.adapter_tensors()
    np.testing.assert_array_equal(A, own["transformer.h.0.attn.c_attn.lora_A"])
    half = own["transformer.h.0.attn.c_attn.lora_B"]
    expected = np.zeros((36, 8), "f")
    expected[:12, :4], expected[24:, 4:] = half[:12], half[12:]
    np.testing.assert_array_equal(B, expected)


def test_rslora_keeps_the_scaling_of_fused_layers(tmp_path):
    settings = {"r": 4, "lora_alpha": 32, "enable_lora": QV, "use_rslora": True}
    model = get_peft_model(gpt2(), LoraConfig(**settings))
    assert all(layer.scaling == 16 for layer in model.lora_layers().values())
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] ** 0.5 == pytest.approx(16)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "a")
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)


@pytest.mark.parametrize("pattern", [QV, [True, False, False], [False, True, True], [True] * 3])
def test_block_matrices(pattern):
    B = np.random.default_rng(0).standard_normal((4 * sum(pattern), 2))
    full = block_matrix(B, pattern, 2)
    assert full.shape == (12, 2 * sum(pattern))
    assert find_blocks(full, 3) == pattern
    np.testing.assert_array_equal(from_block_matrix(full, pattern), B)
    full[0, :] = full[4, :] = 1
    assert find_blocks(full, 3) is None and from_block_matrix(full, QV) is None


def test_an_ordinary_peft_adapter_stays_linear(tmp_path):
    model = get_peft_model(gpt2(), LoraConfig(r=2))
    model.save_pretrained(tmp_path / "zero")  # B all zero has no blocks to find
    for name in ("zero", "random"):
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "zero")
        assert all(type(layer) is Linear for layer in loaded.lora_layers().values()), name
        randomise(model)
        model.save_pretrained(tmp_path / "zero")


def test_untrained_fused_adapter_keeps_its_kind(tmp_path):
    get_peft_model(gpt2(), LoraConfig(r=2, enable_lora=QV)).save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "a")
    assert all(type(layer) is MergedLinear for layer in loaded.lora_layers().values())


def test_merge_adapter_and_back():
    model = get_peft_model(gpt2(), LoraConfig(r=2, enable_lora=QV))
    randomise(model)
    after = logits(model)
    layer = model.lora_layers()["transformer.h.0.attn.c_attn"]
    start, change = layer.weight.numpy(), layer.delta_weight().numpy()
    report = model.merge_adapter()
    largest = max(abs(x.delta_weight().numpy()).max() for x in model.lora_layers().values())
    assert report.layers == 2 and report.rounding_error == 0
    assert report.largest_change == pytest.approx(largest, rel=1e-5)
    np.testing.assert_allclose(layer.weight.numpy(), start + change, atol=1e-6)
    np.testing.assert_allclose(logits(model), after, atol=2e-6)
    assert model.merge_adapter().layers == 0
    with model.disable_adapter():
        np.testing.assert_array_equal(layer.weight.numpy(), start)
    assert layer.merged
    model.unmerge_adapter()
    np.testing.assert_array_equal(layer.weight.numpy(), start)
    np.testing.assert_array_equal(logits(model), after)


def test_merging_into_a_narrow_type_says_what_is_lost():
    base = gpt2()
    weight = base.transformer.h[0].attn.c_attn.weight
    base.transformer.h[0].attn.c_attn.weight = weight.float16()
    settings = {"target_modules": ["c_attn"], "layers_to_transform": 0}
    model = get_peft_model(base, LoraConfig(**settings))
    randomise(model)
    report = model.merge_adapter()
    assert 1e-6 < report.rounding_error < 1e-2
    assert "lost by rounding" in str(report)


def test_merge_and_unload_only_once(capsys, tmp_path):
    model = get_peft_model(gpt2(), LoraConfig(r=2))
    randomise(model)
    model.merge_and_unload()
    assert "merged 2 layers in float32; largest change" in capsys.readouterr().out
    for again in (model.merge_and_unload, model.unload, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(UserError, match="merged or unloaded already"):
            again()
    assert model.trainable_parameters() == []


def test_llama_targets():
    model = get_peft_model(llama(), LoraConfig(r=2))
    ends = {name.rpartition(".")[2] for name in model.lora_layers()}
    assert ends == {"q_proj", "v_proj"}
    linear = get_peft_model(
        llama(), LoraConfig(target_modules="all-linear", exclude_modules=["up_proj"])
    )
    ends = {name.rpartition(".")[2] for name in linear.lora_layers()}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    with pytest.raises(UserError, match="no target layer has 3 times as many"):
        get_peft_model(llama(), LoraConfig(enable_lora=QV))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("h.3.attn.c_attn", {"target_modules": ["c_attn"]}, True),
        ("h.3.attn.c_attn", {"target_modules": ["attn"]}, False),
        ("h.3.attn.c_attn", {"target_modules": r".*\.3\..*attn"}, True),
        ("h.3.attn.c_attn", {"target_modules": r"c_attn"}, False),
        ("h.3.attn.c_attn", {"target_modules": ["c_attn"], "exclude_modules": r"h\.3.*"}, False),
        ("h.3.attn.c_attn", {"target_modules": ["c_attn"], "modules_to_save": ["attn"]}, False),
        ("t.h.3.attn.c_attn", {"target_modules": ["c_attn"], "layers_to_transform": [3]}, True),
        ("t.h.3.attn.c_attn", {"target_modules": ["c_attn"], "layers_to_transform": 4}, False),
        ("t.h.3.attn.c_attn", {"target_modules": ["c_attn"], "layers_to_transform": []}, True),
        (
            "t.h.3.x.4.c",
            {"target_modules": ["c"], "layers_to_transform": [4], "layers_pattern": "x"},
            True,
        ),
    ],
)
def test_matching_names(name, settings, expected):
    assert is_target(name, LoraConfig(**settings)) is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["c_atn"]}, r"fits no module .*nearest: c_attn"),
        ({"target_modules": ["attn"]}, "is a Attention module"),
        ({"target_modules": "("}, "no regular expression"),
        ({"modules_to_save": ["score"]}, r"modules_to_save \['score'\] fits no module"),
        ({"r": 0}, "r must be"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern"),
        ({"lora_alpha": "16"}, "lora_alpha must be"),
        ({"lora_dropout": 1}, "lora_dropout must be"),
        ({"bias": "some"}, "bias must be"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"target_modules": 3}, "target_modules must be"),
        ({"modules_to_save": "wte"}, "modules_to_save must be"),
        ({"target_modules": "x", "layers_to_transform": 1}, "layers_to_transform needs"),
        # Patterns without effect: in training a slip.
        ({"target_modules": ["c_attn", "c_fcc"]}, r"'c_fcc' fits no module .*nearest: c_fc"),
        ({"target_modules": ["c_attn", "mpl.c_fc"]}, r"'mpl.c_fc' .*nearest: mlp.c_fc"),
        (
            {"target_modules": ["c_attn"], "alpha_pattern": {"^c_attn": 100}},
            r"alpha_pattern '\^c_attn' fits none of the modules with LoRA; nearest: c_attn",
        ),
        (
            {"target_modules": ["c_attn"], "rank_pattern": {"c_attn": 2, "c_fc": 4}},
            "rank_pattern 'c_fc' fits none of the modules with LoRA",
        ),
        (
            {"rank_pattern": {"c_attn": 2, r"h\.1\.attn\.c_attn": 4}},
            "has no effect: patterns before it fit all its modules; put it first",
        ),
        ({"exclude_modules": ["mlp.c_porj"]}, r"'mlp.c_porj' .*nearest: mlp.c_proj"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform 2 is no layer .* they are 0 to 1"),
        # jlora's own inner modules are none to train or to name.
        ({"modules_to_save": ["act"]}, r"modules_to_save \['act'\] fits no module"),
        # GPT-2's head is its embedding.
        (
            {"target_modules": ["c_attn", "lm_head"]},
            "output head of this model is tied to transformer.wte.weight and no module; leave it",
        ),
        ({"modules_to_save": ["head"]}, r"\['head'\]: the output head of this model is tied"),
        ({"modules_to_save": ["lm_head"]}, r"\['lm_head'\]: the output head .* is tied"),
    ],
)
def test_wrong_settings(settings, message):
    base = gpt2()
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(UserError, match=message):
        get_peft_model(base, LoraConfig(**settings))
    assert [name for name, _ in base.named_parameters()] == names


def test_inner_modules_are_never_offered():
    with pytest.raises(UserError) as caught:
        get_peft_model(llama(), LoraConfig(modules_to_save=["hed"]))
    assert str(caught.value).endswith("nearest: lm_head")
    with pytest.raises(UserError) as caught:
        get_peft_model(llama(), LoraConfig(modules_to_save=["zzz"]))
    offered = str(caught.value).rpartition(": ")[2].split(", ")
    assert "lm_head" in offered and not {"head", "act", "rotary", "attention"} & set(offered)


def test_patterns_are_passed_over_when_an_adapter_is_loaded(folder):
    """PEFT does so: the adapter computes what it computed there."""
    path = folder / "adapter_config.json"
    expected = logits(PeftModel.from_pretrained(gpt2(), folder))
    config = json.loads(path.read_text())
    config.update(rank_pattern={"v_proj": 3}, alpha_pattern={"^c_attn": 100})
    config.update(target_modules=["c_attn", "q_proj"], exclude_modules=["nothing"])
    path.write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(PeftModel.from_pretrained(gpt2(), folder)), expected)


PEFT_0_21 = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "X"}, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False,
    "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 8, "rank_pattern": None, "revision": "main",
    "target_modules": ["c_attn"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def test_config_of_peft():
    config = LoraConfig.from_dict(PEFT_0_21)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (8, 16, {})
    assert LoraConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["experts"]),
        ("layer_replication", [[0, 4]]),
        ("a_field_of_the_future", 3),
    ],
)
def test_config_that_asks_for_more_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"somewhere: {field}"):
        LoraConfig.from_dict({**PEFT_0_21, field: value}, source="somewhere")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "alpha",
            16,
            r"somewhere: alpha=16 is no setting .*\(nearest: lora_alpha\), and",
        ),
        ("lora_rank", 4, "somewhere: lora_rank=4 is no setting"),
        ("a_field_of_the_future", 3, "or upgrade jlora if a newer PEFT wrote it"),
        ("use_qalora", True, "asks for something jlora lacks; merge this adapter"),
        ("enable_lora", 3, "enable_lora must be a list of true and false, not 3"),
    ],
)
def test_a_field_that_peft_does_not_have_is_told_apart(field, value, message):
    with pytest.raises(UserError, match=message):
        LoraConfig.from_dict({**PEFT_0_21, field: value}, source="somewhere")


def test_every_field_of_peft_is_known():
    """PEFT 0.21's fields, each of which `from_dict` reads, passes over or refuses by its name."""
    for field in PEFT_0_21:
        with contextlib.suppress(UserError):
            LoraConfig.from_dict({**PEFT_0_21, field: "x"}, source="somewhere")
            continue
        with pytest.raises(UserError) as caught:
            LoraConfig.from_dict({**PEFT_0_21, field: "x"}, source="somewhere")
        assert "is no setting" not in str(caught.value), field


def test_an_adapter_of_peft_0_2(tmp_path):
    """Fused layers as loralib has them, their B a convolution of width 1, and merge_weights."""
    model = get_peft_model(gpt2(), LoraConfig(r=2, lora_alpha=4, enable_lora=QV))
    randomise(model)
    model.save_pretrained(tmp_path)
    config = {
        "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["c_attn"], "bias": "none",
        "merge_weights": True, "enable_lora": QV, "fan_in_fan_out": True, "peft_type": "LORA",
        "modules_to_save": None, "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2",
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "jlora_adapter.json").unlink()
    tensors = {
        f"base_model.model.{name}.weight": array[..., None] if name.endswith("B") else array
        for name, array in model.adapter_tensors().items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path)
    np.testing.assert_array_equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("_orig_mod.base_model.model.h.0.q.lora_A.weight", "h.0.q.lora_A"),
        ("module.base_model.model.h.0.q.lora_A.weight", "h.0.q.lora_A"),
        ("module._orig_mod.base_model.model.h.0.q.lora_A.default.weight", "h.0.q.lora_A"),
        ("base_model.model._orig_mod.h.0.q.lora_A.weight", "h.0.q.lora_A"),
        ("base_model.model.module.h.0.q.lora_A.weight", "h.0.q.lora_A"),
        ("model.layers.0.module.lora_A.weight", "model.layers.0.module.lora_A"),
        ("base_model.model.h.0.q.lora_A.weight", "h.0.q.lora_A"),
        ("base_model.model.h.0.q.lora_B.default.weight", "h.0.q.lora_B"),
        ("base_model.model.wte.lora_embedding_A", "wte.lora_A"),
        ("base_model.model.wte.lora_embedding_B.default", "wte.lora_B"),
        ("base_model.model.h.0.q.base_layer.bias", "h.0.q.bias"),
        ("base_model.model.score.modules_to_save.weight", "score.weight"),
    ],
)
def test_peft_keys(key, name):
    assert from_peft_key(key) == name


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(gpt2(), LoraConfig(r=2))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "missing: transformer.h.1.attn.c_attn.lora_A"),
        (lambda t: t.update({"base_model.model.x": t[KEY]}), "unexpected: x"),
        (
            lambda t: t.update({KEY: t[KEY][:1].copy()}),
            r"misshapen: .* \(1, 12\) instead of \(2, 12\)",
        ),
        (
            lambda t: [t.update({f"base_model.model.other.{k}": t.pop(k)}) for k in list(t)],
            "fits no module of the model",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.wte.weight": np.ones((97, 12), "f")}),
            "brings its own transformer.wte.weight, which differs",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.wte.weight": np.ones((99, 12), "f")}),
            "brings its own transformer.wte.weight of 99 rows, and the base model's has 97; merge",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.wte.weight": np.ones((97, 8), "f")}),
            r"of shape \(97, 8\), and the base model's has \(97, 12\)",
        ),
        (
            lambda t: t.update({f"module.{KEY}": t[KEY]}),
            f"{KEY} and module.{KEY} are both transformer.h.1.attn.c_attn.lora_A",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[KEY]}),
            "changes lm_head: the output head of this model is tied to transformer.wte.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    edit(folder, change)
    base = gpt2()
    before, names = logits(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert [name for name, _ in base.named_parameters()] == names
    np.testing.assert_array_equal(logits(base), before)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_the_bases_own_embedding_in_a_narrower_type_is_no_other(folder, name, kind):
    own = gpt2().transformer.wte.weight.numpy()
    stored = round_bf16(own) if kind == "bfloat16" else own.astype(kind)
    assert kind == "float32" or not np.array_equal(stored, own)
    expected = logits(PeftModel.from_pretrained(gpt2(), folder))
    edit(folder, lambda t: t.update({f"base_model.model.{name}": stored}))
    np.testing.assert_array_equal(logits(PeftModel.from_pretrained(gpt2(), folder)), expected)
    stored[5, 7] *= 1.25
    edit(folder, lambda t: t.update({f"base_model.model.{name}": stored}))
    with pytest.raises(UserError, match=f"brings its own {name}, which differs"):
        PeftModel.from_pretrained(gpt2(), folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json:1: not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object, but a list"),
        (lambda f: (f / "adapter_config.json").write_text("null"), "not a JSON object, but null"),
        (lambda f: (f / "jlora_adapter.json").write_text('{"base_model": 3}'), "damaged"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "holds neither"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 9), "adapter_model"),
    ],
)
def test_damaged_folders(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(gpt2(), folder)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        PeftModel.from_pretrained(gpt2(), tmp_path / "nowhere")


def test_another_base_is_refused(folder):
    with pytest.raises(UserError, match=r"made for the base model .* differ; load it on its own"):
        PeftModel.from_pretrained(gpt2(seed=1), folder)
    PeftModel.from_pretrained(gpt2(seed=1), folder, force=True)
    with pytest.raises(UserError, match="this one is of type llama"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize(
    ("named", "model_type", "name", "expected"),
    [
        ("google/gemma-2b", "llama", "TinyLlama-1.1B", "refused"),
        ("models--google--gemma-2b/snapshots/9cf48e52b224239de00d483ec8eb84fb8d0f3a3a", "llama",
         "x", "refused"),
        ("meta-llama/Llama-2-7b-hf", "gpt2", "gpt2", "refused"),
        ("Qwen/Qwen2.5-0.5B", "llama", "x", "refused"),
        ("gpt2-medium", "llama", "smollm2-135m", "refused"),
        ("mistralai/Mistral-7B-v0.1", "llama", "TinyLlama-1.1B", "warned"),
        ("HuggingFaceTB/SmolLM2-135M", "llama", "TinyLlama-1.1B", "warned"),
        ("mistralai/Mistral-7B-v0.1", "llama", "/models/mistral.gguf", "silent"),
        ("mistralai/Mistral-7B-v0.1", "llama", "/models/mine.gguf", "silent"),
        ("HuggingFaceTB/SmolLM2-135M", "llama", "smollm2-135m", "silent"),
        ("/data/LLaMA-Factory/bases/mine", "qwen2", "Qwen2.5-0.5B", "silent"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2", None, "silent"),
        ("cognitivecomputations/dolphin-2.9", "llama", "x", "silent"),
        ("openai-community/gpt2", "gpt2", "/my/other/path", "silent"),
        ("", "gpt2", "gpt2", "silent"),
        (None, "gpt2", "gpt2", "silent"),
        (["gemma"], "gpt2", "gpt2", "silent"),
    ],
)  # fmt: skip
def test_the_family_that_an_adapter_names(named, model_type, name, expected, caplog):
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type), name_or_path=name)
    if expected == "refused":
        with pytest.raises(UserError, match=r"adapter: its settings name .*--force"):
            check_family(named, model, "adapter")
        return
    with caplog.at_level(logging.WARNING):
        check_family(named, model, "adapter")
    assert ("are they one?" in caplog.text) == (expected == "warned")


def test_an_adapter_of_another_family_needs_force(folder):
    (folder / "jlora_adapter.json").unlink()  # PEFT's own folders have no record of the base
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "google/gemma-2b"}
    path.write_text(json.dumps(config))
    base = gpt2()
    before = logits(base)
    with pytest.raises(UserError, match="name the base model google/gemma-2b, and this is a model"):
        PeftModel.from_pretrained(base, folder)
    np.testing.assert_array_equal(logits(base), before)
    assert np.abs(logits(PeftModel.from_pretrained(base, folder, force=True)) - before).max() > 0.05


def test_the_base_in_another_type_is_the_same_base(folder):
    base = gpt2()
    for block in base.transformer.h:
        block.mlp.c_fc.weight = block.mlp.c_fc.weight.float16()
        block.attn.c_attn.weight = block.attn.c_attn.weight.float16()
    PeftModel.from_pretrained(base, folder)


def test_saving_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    model = PeftModel.from_pretrained(gpt2(), folder)
    model.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list(folder.iterdir())) == 4


def test_two_adapters_on_one_model():
    model = get_peft_model(gpt2(), LoraConfig(r=2))
    for base in (model, model.base_model):
        with pytest.raises(UserError, match="has LoRA layers already"):
            get_peft_model(base, LoraConfig(r=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2_c_attn_c_proj", "gpt2_flag_false", "gpt2_sequence_classifier"]
)
def test_adapters_from_elsewhere(shared_data, name, caplog):
    folder = shared_data / "adapters" / name
    base = GPT2LMHeadModel(GPT2Config())
    with caplog.at_level(logging.WARNING):
        model = PeftModel.from_pretrained(base, folder)
    assert ("score.weight left out" in caplog.text) == (name == "gpt2_sequence_classifier")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    key = "base_model.model.transformer.h.11.attn.c_attn"
    A, B = (tensors[f"{key}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    layer = model.lora_layers()["transformer.h.11.attn.c_attn"]
    change = config["lora_alpha"] / config["r"] * (B @ A).T
    np.testing.assert_allclose(layer.delta_weight().numpy(), change, atol=1e-6)
    assert len(model.lora_layers()) == (36 if "c_proj" in name else 12)
