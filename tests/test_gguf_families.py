"""Every family's way through a GGUF file, and what llama.cpp would not compute."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import GGUFReader
from test_formats import LLAMA, keyed, llama_tensors, write_gguf
from tiny_models import randomise, weights

from jlora.adapters.export_gguf import export_gguf
from jlora.formats.gguf_architectures import ARCHITECTURES
from jlora.formats.gguf_file import read_gguf
from jlora.formats.gguf_llama import FULL, SLIDING, period_of, window_types
from jlora.models.families import FAMILIES
from jlora.models.hub import build_model, load_weights
from jlora.system.errors import UserError

BASE = {
    "vocab_size": 23, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.5, 2.0, 4.0, 7.0],
}  # fmt: skip
WINDOW = {"sliding_window": 7}
USED = {**WINDOW, "use_sliding_window": True}
TIED = {"tie_word_embeddings": True}
#: name -> what its config.json has beside `BASE`.
CONFIGS = {
    "mistral, window": {"model_type": "mistral", "head_dim": 8, **WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {"model_type": "qwen2", **USED, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **TIED},
    "qwen3, window": {"model_type": "qwen3", **USED, "layer_types": [FULL, SLIDING] * 2},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True},
    "smollm3": {"model_type": "smollm3"},
    "olmo2": {"model_type": "olmo2"},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, **TIED,
               **WINDOW, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma2, all short": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8,
                            **TIED, "layer_types": [SLIDING] * 4},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, **TIED,
               **WINDOW, "rope_local_base_freq": 100.0, "num_hidden_layers": 7,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3, every third": {"model_type": "gemma3_text", "head_dim": 8, **TIED, **WINDOW,
                            "query_pre_attn_scalar": 8, "sliding_window_pattern": 3,
                            "final_logit_softcapping": 9.0},
    "phi3": {"model_type": "phi3", **WINDOW, "num_key_value_heads": 4},
    "phi3, longrope": {"model_type": "phi3", "rope_scaling": LONGROPE, "sliding_window": None,
                       "original_max_position_embeddings": 64},
    "phi4-mini": {"model_type": "phi3", "hidden_size": 64, "partial_rotary_factor": 0.5, **TIED,
                  "original_max_position_embeddings": 64, "sliding_window": None,
                  "rope_scaling": {**LONGROPE, "attention_factor": 1.5}},
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm4": {"model_type": "glm4", "head_dim": 16, "partial_rotary_factor": 0.25},
    "internlm2": {"model_type": "internlm2", "bias": False,
                  "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm2, biases": {"model_type": "internlm2", "bias": True},
    "internlm3": {"model_type": "internlm3", "head_dim": 16, "qkv_bias": True, "bias": True},
}  # fmt: skip
#: Fields in which the same model may be said in two ways.
OTHERWISE = {"internlm3": {"model_type", "architectures", "qkv_bias", "bias"}}


def model_of(name: str, **changes):
    return randomise(build_model({**BASE, **CONFIGS[name], **changes}), seed=3, scale=0.3)


def test_every_family_has_its_form():
    tested = {config["model_type"] for config in CONFIGS.values()}
    assert tested | {"gpt2", "llama"} == set(FAMILIES)
    assert {family.gguf.name for family in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_settings_come_back(tmp_path, name):
    model = model_of(name)
    export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
    found = read_gguf(tmp_path / "m.gguf")
    again = build_model(found.config)
    load_weights(again, found.tensors)
    norms = 2e-7 if name.startswith("gemma") else 0  # the file has 1 + w
    for key, array in weights(model).items():
        np.testing.assert_allclose(weights(again)[key], array, rtol=0, atol=norms, err_msg=key)
    one, two = again.config.to_dict(), model.config.to_dict()
    for key in OTHERWISE.get(name, set()):
        one.pop(key, None), two.pop(key, None)
    assert one == two
    for read in (again.config, model.config):
        assert read.windows == model.config.windows and read.layer_ropes == model.config.layer_ropes
    for a, b in zip(again.config.ropes(), model.config.ropes()):
        np.testing.assert_allclose(a.frequencies, b.frequencies, rtol=1e-6)
        assert (a.limit, a.amplitude) == (b.limit, pytest.approx(b.amplitude))


def metadata_of(tmp_path, name):
    written = export_gguf(model_of(name), tmp_path / "m.gguf", tokenizer=False)
    reader = GGUFReader(tmp_path / "m.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    return values, {tensor.name: tensor.data for tensor in reader.tensors}, written


def test_what_llama_cpp_is_told(tmp_path):
    """Keys as its converter writes them; the values by hand."""
    (tmp_path / "g").mkdir()
    values, _, _ = metadata_of(tmp_path / "g", "gemma3, every third")
    assert values["gemma3.attention.sliding_window"] == 7
    assert values["gemma3.attention.sliding_window_pattern"] == 3
    assert values["gemma3.rope.freq_base"] == 1000 and values["gemma3.rope.freq_base_swa"] == 10000
    assert values["gemma3.final_logit_softcapping"] == 9
    (tmp_path / "p").mkdir()
    values, tensors, written = metadata_of(tmp_path / "p", "phi4-mini")
    assert values["phi3.rope.dimension_count"] == 8  # half of a head of 16
    assert values["phi3.rope.scaling.original_context_length"] == 64
    assert values["phi3.rope.scaling.attn_factor"] == 1.5
    assert values["phi3.attention.sliding_window"] == 0
    np.testing.assert_allclose(tensors["rope_factors_long.weight"], LONGROPE["long_factor"])
    np.testing.assert_allclose(tensors["rope_factors_short.weight"], LONGROPE["short_factor"])
    assert "window" not in str(written)


def test_internlm2_s_rows_by_hand(tmp_path):
    """Of each of 2 groups: 2 queries, a key, a value, of 8 rows each."""
    model = model_of("internlm2")
    rows = weights(model)["model.layers.0.attention.wqkv.weight"]
    _, tensors, _ = metadata_of(tmp_path, "internlm2")
    np.testing.assert_array_equal(
        tensors["blk.0.attn_v.weight"], rows[[*range(24, 32), *range(56, 64)]]
    )
    key = rows[[*range(16, 24), *range(48, 56)]].reshape(2, 2, 4, 32)  # halves of 4 pairs
    np.testing.assert_array_equal(
        tensors["blk.0.attn_k.weight"], key.swapaxes(1, 2).reshape(16, 32)
    )


NOT_THERE = {
    "a scale": ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
    "no windows": ("gemma2", {"layer_types": [FULL] * 4}, "no layer of this Gemma 2 has a window"),
    "no caps": ("gemma2", {"attn_logit_softcapping": None}, "without both soft caps"),
    "no period": ("gemma3", {"layer_types": [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]},
                  "layer_types have no period"),
    "other layers": ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers are not"),
    "a head of its own": ("gemma2", {"tie_word_embeddings": False}, "lm_head.weight has no place"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_THERE)
def test_what_gguf_has_no_form_for_is_refused(tmp_path, name):
    family, changes, message = NOT_THERE[name]
    with pytest.raises(UserError, match=message):
        export_gguf(model_of(family, **changes), tmp_path / "m.gguf", tokenizer=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n in CONFIGS if "window" in n] + ["phi3"])
def test_a_window_that_llama_cpp_leaves_out_is_said(tmp_path, name):
    _, _, written = metadata_of(tmp_path, name)
    assert "llama.cpp does not compute the window of 7 tokens" in str(written)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3, biases", {}, r"does not load .* qwen3 with model.layers.0.self_attn.o_proj.bias"),
        ("internlm2, biases", {}, r"internlm2 with model.layers.0.attention.wo.bias; jlora does"),
        ("smollm3", {"mlp_bias": True}, r"smollm3 with model.layers.0.mlp.(down|up)_proj.bias"),
        ("olmo2", TIED, "olmo2 without a head of their own; jlora does"),
    ],
)
def test_what_llama_cpp_does_not_load_is_said(tmp_path, name, changes, message):
    """Each as llama.cpp said it, of October 2026."""
    model = model_of(name, **changes)
    written = export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
    assert re.search(message, "\n".join(written.notes))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2", "internlm3", "glm", "internlm2"])
def test_nothing_is_said_without_need(tmp_path, name):
    assert metadata_of(tmp_path, name)[2].notes == ()


def test_windows_of_every_period():
    for layers in (1, 4, 7):
        for period in range(layers + 1):
            assert window_types(period_of(window_types(period, layers)), layers) == window_types(
                period, layers
            )
    assert window_types(3, 6) == [SLIDING, SLIDING, FULL] * 2
    assert window_types(0, 2) == [SLIDING] * 2 and window_types(1, 2) == [FULL] * 2
    assert period_of([FULL, SLIDING]) is None


def test_a_llama_file_with_a_window_is_mistral(tmp_path):
    for window, kind in ((64, "llama"), (32, "mistral")):
        values = keyed("llama", {**LLAMA, "attention.sliding_window": window})
        path = write_gguf(tmp_path / f"{window}.gguf", "llama", values, llama_tensors())
        config = read_gguf(path).config
        assert config["model_type"] == kind
        assert config.get("sliding_window") == (32 if kind == "mistral" else None)


def test_windows_where_none_are_computed_are_refused(tmp_path):
    values = keyed("olmo2", {**LLAMA, "attention.sliding_window": 32})
    tensors = {"token_embd.weight": llama_tensors()["token_embd.weight"]}
    path = write_gguf(tmp_path / "m.gguf", "olmo2", values, tensors)
    with pytest.raises(UserError, match="olmo2.attention.sliding_window is 32, which is not"):
        read_gguf(path)


def test_parts_that_do_not_fit_together_are_one_line(tmp_path):
    tensors = llama_tensors()
    for name, rows in (("attn_q", 32), ("attn_k", 15), ("attn_v", 16)):
        tensors[f"blk.0.{name}.weight"] = np.zeros((rows, 32), "f")
    path = write_gguf(tmp_path / "m.gguf", "internlm2", keyed("internlm2", LLAMA), tensors)
    with pytest.raises(UserError, match="m.gguf: its tensors and its numbers of heads do not"):
        read_gguf(path)
    del tensors["blk.0.attn_k.weight"]
    path = write_gguf(tmp_path / "n.gguf", "internlm2", keyed("internlm2", LLAMA), tensors)
    with pytest.raises(UserError, match="do not fit together"):
        read_gguf(path)


def test_a_part_of_a_model_is_refused_with_the_way_out(tmp_path):
    values = {**keyed("llama", LLAMA), "split.count": 3}
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", "llama", values, llama_tensors())
    with pytest.raises(UserError, match="one of 3 parts of a model; put them together first"):
        read_gguf(path)
