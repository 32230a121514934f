"""config.json of every family: read as transformers reads it, written back, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_model_configs import JSON
from tiny_families import ALL, LONGROPE, WIDE

from jlora.models.families import FAMILIES
from jlora.models.hub import build_model
from jlora.system.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


def read(name: str, **changes):
    config = {**WIDE, **ALL[name], **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    return FAMILIES[config["model_type"]].config.from_dict(config)


@pytest.mark.parametrize("name", ALL)
def test_a_config_survives_its_own_dict(name):
    config = read(name)
    again = type(config).from_dict(config.to_dict())
    assert again == config and again.windows == config.windows
    assert again.layer_ropes == config.layer_ropes
    for one, other in zip(again.ropes(), config.ropes(), strict=True):
        assert (one.frequencies == other.frequencies).all() and one.limit == other.limit


# As transformers 5.23 makes them of the same fields, layer by layer.
LAYERS = [
    ("qwen3", {"max_window_layers": 1}, [None, 4]),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 3}, [None, 3]),
    ("smollm3", {"sliding_window": 3}, [None, None]),
    ("gemma2", {"layer_types": None, "num_hidden_layers": 3}, [4, None, 4]),
    ("gemma3", {"layer_types": None, "num_hidden_layers": 7}, [4] * 5 + [None, 4]),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 2}, [4, None]),
    ("phi3", {"sliding_window": None}, [None, None]),
    ("phi3", {"sliding_window": 5}, [5, 5]),
]


@pytest.mark.parametrize(("name", "fields", "windows"), LAYERS)
def test_windows_of_each_layer(name, fields, windows):
    config = read(name, **fields)
    assert config.windows == windows
    assert type(config).from_dict(config.to_dict()).windows == windows


def test_layers_without_rotary_positions():
    assert read("smollm3", no_rope_layers=[1, 0]).layer_ropes == [0, None]
    every_fourth = read("smollm3", no_rope_layers=..., num_hidden_layers=5)
    assert every_fourth.layer_ropes == [0, 0, 0, None, 0]


def test_what_a_file_leaves_out():
    """transformers' own values, where they are not Llama's."""
    gemma2 = read("gemma2", attn_logit_softcapping=..., final_logit_softcapping=...)
    assert (gemma2.score_cap, gemma2.logit_cap) == (50.0, 30.0)
    assert read("gemma2", attn_logit_softcapping=None).score_cap is None
    assert read("gemma2", attn_logit_softcapping=None).to_dict()["attn_logit_softcapping"] is None
    gemma3 = read("gemma3", rope_local_base_freq=...)
    assert (gemma3.rope_theta, gemma3.rope_local_base_freq, gemma3.logit_cap) == (1e6, 1e4, None)
    assert read("smollm3").rope_theta == 2e6 and read("glm").rotary_size == 32
    assert read("glm").qkv_bias and not read("glm").output_bias
    assert read("internlm2").output_bias and not read("internlm2", bias=False).qkv_bias
    assert read("qwen3", head_dim=...).head_dim == 128


def test_gemma3_by_the_names_of_transformers_5():
    rope = {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
        SLIDING: {"rope_type": "default", "rope_theta": 30.0},
    }
    config = read("gemma3", rope_parameters=rope, rope_local_base_freq=...)
    assert (config.rope_theta, config.rope_local_base_freq) == (500.0, 30.0)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 500.0, "rope_scaling": rope[FULL], "rope_local_base_freq": 30.0}
    assert read("gemma3", **old) == config


def test_internlm3_by_its_own_names():
    config = read("internlm3", qkv_bias=True, bias=True)
    assert config.attention_bias and config.mlp_bias
    assert type(config).from_dict(config.to_dict()) == config


#: Family, a field and a value that is not computed, and what the message names.
REFUSED = [
    ("qwen3", {"layer_types": [FULL, "chunked_attention"]}, "layer_types .*chunked_attention"),
    ("qwen3", {"layer_types": [FULL]}, "layer_types has 1 entries, and the model 2 layers"),
    ("qwen3", {"use_sliding_window": False, "layer_types": [FULL, SLIDING]}, "use_sliding_window"),
    ("qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    ("qwen3", {"num_experts": 8}, "num_experts 8"),
    ("qwen3", {"sliding_window": True}, "sliding_window is true"),
    ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("smollm3", {"layer_types": [FULL, SLIDING], "sliding_window": 3}, "use_sliding_window"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("olmo2", {"use_sliding_window": True}, "use_sliding_window"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
    ("gemma2", {"sliding_window": None}, "sliding_window is null"),
    ("gemma2", {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern"),
    ("gemma3", {"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "linear"}}}, "of type 'lin"),
    ("gemma3", {"rope_parameters": {FULL: {}, "other": {}}}, "rope_parameters"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor has 1 numbers"),
    ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": 2.0}}, "short_factor is 2.0"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "lacks short_factor, long_factor"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias true"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("glm", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("glm4", {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    ("glm4", {"head_dim": 10}, "partial_rotary_factor 0.5 turns 5 of a head's 10 numbers"),
    ("glm", {"partial_rotary_factor": 0.001}, "partial_rotary_factor 0.001 turns 0 of"),
    ("phi3", {"partial_rotary_factor": 0.05}, "partial_rotary_factor 0.05 turns"),
    ("internlm3", {"qkv_bias": True}, "qkv_bias that is not bias"),
    ("internlm2", {"rope_scaling": {"type": "dynamic"}}, "'dynamic' lacks factor"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_a_field_that_is_not_computed_is_refused_by_its_name(name, fields, message):
    with pytest.raises(ValueError, match=message):
        read(name, **fields)


@given(
    name=st.sampled_from(sorted(ALL)),
    field=st.sampled_from(
        ["rope_scaling", "rope_parameters", "rope_local_base_freq", "no_rope_layers"]
        + ["no_rope_layer_interval", "layer_types", "sliding_window", "sliding_window_pattern"]
        + ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
        + ["partial_rotary_factor", "original_max_position_embeddings", "qkv_bias", "bias"]
        + ["hidden_activation", "use_sliding_window", "head_dim"]
    ),
    value=JSON,
)
def test_any_value_is_read_or_refused_with_a_reason(name, field, value):
    try:
        read(name, **{field: value})
    except ValueError as error:
        assert str(error)


def test_the_multimodal_gemma_3_is_refused_by_its_type():
    with pytest.raises(UserError, match="model_type 'gemma3' is not supported; only .*gemma3_text"):
        build_model({"model_type": "gemma3", "text_config": {}})


# Published files of models that need nothing new.
DISTILLED = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
    "max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "eos_token_id": [128001, 128008, 128009], "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }, "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize("file", [DISTILLED, LLAMA32], ids=["r1-distill", "llama-3.2"])
def test_published_files_of_llamas_kind_are_read(file):
    config = FAMILIES[file["model_type"]].config.from_dict(file)
    assert set(config.windows) == {None} and config.eos_token_id == file["eos_token_id"]
