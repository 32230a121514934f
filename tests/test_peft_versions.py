"""Configurations of every PEFT from 0.4 to 0.21, and PEFT's own answers to what they mean.

The two fixtures are made by `make_peft_configs`, which asks PEFT itself.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from make_peft_configs import FIXTURES, GPT2, INITS, LLAMA, MODELS, ON_VALUES, PATTERNS, TARGETS
from safetensors.numpy import load_file, save_file

from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.attach import ModulesToSave
from jlora.adapters.targets import is_target, pattern_value
from jlora.models.gpt2 import GPT2Config, GPT2LMHeadModel
from jlora.models.llama import LlamaConfig, LlamaForCausalLM
from jlora.system.errors import UserError
from jlora.system.runtime import jt

CONFIGS = json.loads((FIXTURES / "peft_configs.json").read_text())
PEFT = json.loads((FIXTURES / "peft_behaviour.json").read_text())
NEWEST = CONFIGS["0.21.2"]

# What jlora has itself.
OWN = {field.name for field in dataclasses.fields(LoraConfig)} - {"enable_lora"}
# On or off, a trained adapter computes the same: why.
INERT = {
    "auto_mapping": "names transformers' class of the base",
    "inference_mode": "whether PEFT freezes what it loads; is_trainable says so here",
    "megatron_core": "read only with megatron_config",
    "peft_type": "its own check",
    "peft_version": "who wrote the file",
    "qalora_group_size": "read only with use_qalora",
    "revision": "which version of the base PEFT downloads",
    "corda_config": "how init_lora_weights=corda starts; refused there",
    "eva_config": "how init_lora_weights=eva starts; the start is over",
    "loftq_config": "how init_lora_weights=loftq starts; PEFT passes over it otherwise",
    "lora_ga_config": "how init_lora_weights=lora_ga starts; the start is over",
    "ensure_weight_tying": "nothing, unless an embedding or a head is among the targets",
}
# Changes what is computed, or brings tensors that a plain adapter has not: why.
REFUSED = {
    "alora_invocation_tokens": "on only after these tokens",
    "arrow_config": "routes between adapters",
    "kasa_config": "takes singular values out of the base, a diagonal between A and B",
    "layer_replication": "another base: layers stand in it several times",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "a sampler's tensors; samples in training",
    "target_parameters": "LoRA on a parameter that is no module",
    "use_bdlora": "A or B is stored as blocks",
    "use_qalora": "A reads pooled inputs",
    "velora_config": "a buffer beside A; another backward pass",
}


def test_the_tables_name_every_field_of_every_version():
    fields = set().union(*CONFIGS.values())
    assert len(CONFIGS) == 18 and fields == (OWN | set(INERT) | set(REFUSED)) & fields
    assert set(INERT) | set(REFUSED) == (fields - OWN)
    assert set(ON_VALUES) == (fields - OWN) - {"peft_type"}


@pytest.mark.parametrize("version", CONFIGS)
def test_every_version_reads_the_same(version):
    assert LoraConfig.from_dict(CONFIGS[version]) == LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["c_attn"],
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a trained adapter as PEFT 0.21 writes it, its logits, the bare model's)."""
    folder = tmp_path_factory.mktemp("trained")
    model = get_peft_model(gpt2(), LoraConfig.from_dict(NEWEST))
    generator = np.random.default_rng(0)
    model.set_adapter_tensors(
        {
            name: generator.standard_normal(array.shape).astype(np.float32)
            for name, array in model.adapter_tensors().items()
        }
    )
    model.save_pretrained(folder)
    (folder / "jlora_adapter.json").unlink()
    return folder, logits(model.eval()), logits(gpt2())


def gpt2():
    return filled(GPT2LMHeadModel(GPT2Config.from_dict(GPT2)))


def llama():
    return filled(LlamaForCausalLM(LlamaConfig.from_dict({"model_type": "llama", **LLAMA})))


def filled(model):
    generator = np.random.default_rng(0)
    for _, var in sorted(model.named_parameters()):
        var.update(jt.array(0.3 * generator.standard_normal(var.shape).astype(np.float32)))
    return model


def logits(model):
    return model(jt.array(np.arange(1, 13, dtype=np.int32).reshape(2, 6))).numpy()


def load_with(folder, config, tmp_path):
    """The logits of the adapter in ``folder`` under another adapter_config.json."""
    save_file(
        load_file(folder / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return logits(PeftModel.from_pretrained(gpt2(), tmp_path))


@pytest.mark.parametrize("version", CONFIGS)
def test_the_same_tensors_give_the_same_logits(version, trained, tmp_path):
    folder, expected, bare = trained
    assert np.abs(expected - bare).max() > 0.1
    np.testing.assert_array_equal(load_with(folder, CONFIGS[version], tmp_path), expected)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_jlora_lacks_is_refused_by_name(name):
    for version, config in CONFIGS.items():
        if name in config:
            assert not config[name], (version, "is on by itself")
            with pytest.raises(UserError, match=rf"here: {name}="):
                LoraConfig.from_dict({**config, name: ON_VALUES[name]}, source="here")


@pytest.mark.parametrize("name", sorted(set(INERT) - {"peft_type"}))
def test_what_changes_nothing_is_accepted(name):
    assert PEFT["fields"][name] == "same"
    assert ON_VALUES[name] != NEWEST[name]
    for config in CONFIGS.values():
        if name in config:
            changed = LoraConfig.from_dict({**config, name: ON_VALUES[name]})
            assert changed == LoraConfig.from_dict(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["wte"]},
        {"target_modules": ["c_attn", "transformer.wte"]},
        {"target_modules": ".*(wte|c_attn)"},
    ],
)
def test_tying_is_refused_where_it_would_tie(settings):
    with pytest.raises(UserError, match="ensure_weight_tying=True"):
        LoraConfig.from_dict({**NEWEST, **settings, "ensure_weight_tying": True})


def test_other_methods_and_unknown_fields_are_refused():
    for name, value in (("peft_type", "IA3"), ("a_field_of_the_future", 3)):
        with pytest.raises(UserError, match=f"here: {name}"):
            LoraConfig.from_dict({**NEWEST, name: value}, source="here")


@pytest.mark.parametrize("init", INITS)
def test_an_init_is_accepted_where_peft_leaves_the_base_alone(init, trained, tmp_path):
    config = {**NEWEST, "init_lora_weights": init}
    if PEFT["inits"][str(init)] == "same":
        np.testing.assert_array_equal(load_with(trained[0], config, tmp_path), trained[1])
    else:
        with pytest.raises(UserError, match=f"init_lora_weights='{init}' changes the base"):
            load_with(trained[0], config, tmp_path)


def test_a_new_adapter_starts_only_as_jlora_can():
    for init in ("eva", "orthogonal", "pissa", "no_such"):
        with pytest.raises(UserError, match=f"init_lora_weights '{init}' is not supported"):
            LoraConfig(init_lora_weights=init)
    assert LoraConfig.from_dict({"init_lora_weights": "Gaussian"}).init_lora_weights == "gaussian"


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "expected"), list(zip(TARGETS, PEFT["targets"])))
def test_targets_are_peft_s(asked, expected):
    settings, name = asked
    assert is_target(name, LoraConfig(**settings)) is expected


@pytest.mark.parametrize(("asked", "expected"), list(zip(PATTERNS, PEFT["patterns"])))
def test_rank_and_alpha_patterns_are_peft_s(asked, expected):
    patterns, name = asked
    assert pattern_value(name, patterns, 0) == expected


@pytest.mark.parametrize(("asked", "expected"), list(zip(MODELS, PEFT["models"])))
def test_modules_ranks_and_scalings_are_peft_s(asked, expected):
    family, settings = asked
    model = get_peft_model({"gpt2": gpt2, "llama": llama}[family](), LoraConfig(**settings))
    found = {name: [layer.r, layer.scaling] for name, layer in model.lora_layers().items()}
    assert found == expected["lora"]
    modules = model.base_model.named_modules()
    assert sorted(n for n, m in modules if isinstance(m, ModulesToSave)) == expected["saved"]


def test_the_answers_are_those_to_these_questions():
    assert len(PEFT["targets"]) == len(TARGETS) and {True, False} <= set(PEFT["targets"])
    assert len(PEFT["patterns"]) == len(PATTERNS) and len(PEFT["models"]) == len(MODELS)
    assert set(PEFT["fields"]) == set(ON_VALUES)
    assert set(PEFT["inits"]) == {str(init) for init in INITS}
