"""Merged folders: the right weights in every dtype, the base's own files, the measured loss."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import ids_of, randomise_adapter, round_bf16, tiny_gpt2, tiny_llama, weights

import jlora
from jlora import engine
from jlora.adapters import LoraConfig, PeftModel, get_peft_model, merged_weights
from jlora.adapters.export_folder import write_merged
from jlora.cli import main
from jlora.formats.rounding import PrecisionLoss, precision_loss
from jlora.formats.safetensors_file import read_header, read_metadata, read_safetensors
from jlora.system.errors import UserError
from jlora.system.runtime import jt

QV = [True, False, True]
ROUNDED = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
    "bfloat16": round_bf16,
}
ADAPTERS = {
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_fc"], "enable_lora": QV, "r": 2}),
    "llama": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "r": 2}),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), {"target_modules": ["v_proj"]}),
    "dora": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "tables": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "lora_bias": (tiny_gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "more": (tiny_gpt2, {"r": 2, "bias": "all", "modules_to_save": ["wpe"]}),
}


def adapted(make, settings, seed: int = 1) -> PeftModel:
    model = get_peft_model(make(), LoraConfig(**settings))
    return randomise_adapter(model, seed)


def logits(model) -> np.ndarray:
    return model(jt.array(ids_of((2, 5)))).numpy()


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_folder_holds_the_merged_weights(tmp_path, kind, dtype):
    make, settings = ADAPTERS[kind]
    model = adapted(make, settings)
    before, after = weights(model.base_model), logits(model)
    written = write_merged(model, tmp_path / "out", dtype)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert "no tokenizer" in str(written) and str(tmp_path / "out") in str(written)

    same = weights(model.base_model)
    assert all(np.array_equal(same[name], array) for name, array in before.items())
    plain = adapted(make, settings).merge_and_unload(quiet=True)
    file = tmp_path / "out" / "model.safetensors"
    tensors = read_safetensors(file)
    assert set(tensors) == set(weights(plain)) and "lm_head.weight" in tensors or kind != "llama"
    for name, array in weights(plain).items():
        np.testing.assert_array_equal(tensors[name].astype("f"), ROUNDED[dtype](array), name)
    header, _ = read_header(file)
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {e["dtype"] for n, e in header.items() if n != "__metadata__"} == {stored}
    assert read_metadata(file) == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    if dtype == "float32":
        np.testing.assert_allclose(logits(jlora.load(tmp_path / "out")), after, atol=2e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_the_loss_is_what_numpy_says(tmp_path, merged):
    make, settings = ADAPTERS["more"]
    model = adapted(make, settings)
    base, after = weights(make()), merged_weights(adapted(make, settings)).tensors
    if merged:
        model.merge_adapter()
    written = write_merged(model, tmp_path / "out", "bfloat16")
    changed = [name for name in base if not np.array_equal(base[name], after[name])]
    assert {n for n in changed if "bias" not in n} == {
        "transformer.wpe.weight", *(f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1))
    }  # fmt: skip
    assert {n for n in changed if "bias" in n} == {n for n in base if "bias" in n}
    error = {n: np.square(round_bf16(after[n]) - after[n], dtype="d").sum() for n in changed}
    change = {n: np.square(after[n] - base[n], dtype="d").sum() for n in changed}
    shares = {n: np.sqrt(error[n] / change[n]) for n in changed}
    loss = written.loss
    assert loss.overall == pytest.approx(np.sqrt(sum(error.values()) / sum(change.values())))
    assert loss.tensor == max(shares, key=shares.get)
    assert loss.worst == pytest.approx(shares[loss.tensor])
    assert f"bfloat16 keeps {100 * (1 - loss.overall):.2f} % of the adapter's" in str(written)
    assert written.report.layers == 2 and written.report.rounding_error == 0
    assert all(layer.merged == merged for layer in model.lora_layers().values())


def test_a_change_below_the_rounding_is_said_to_be_lost():
    loss = precision_loss("q4_0", {"a": 3.0, "b": 4.0, "c": 9.0}, {"a": 0.0, "b": 2.0, "c": 9.0})
    assert loss == PrecisionLoss("q4_0", np.sqrt(97 / 85), 2.0, "b")
    assert "by 1.1 times the adapter's change (rms; worst 2.0 times, in b)" in str(loss)
    assert precision_loss("q4_0", {"a": 1.0}, {"a": 0.0}) is None
    assert precision_loss("q4_0", {"a": 1.0}, {}) is None


def test_without_a_change_nothing_is_said_to_be_lost(tmp_path):
    untrained = get_peft_model(tiny_gpt2(), LoraConfig(r=2))
    written = write_merged(untrained, tmp_path / "a", "float16")
    assert written.loss is None and written.report.layers == 2
    written = write_merged(tiny_gpt2(), tmp_path / "b", "float16")
    assert written.loss is None and written.report is None
    for name, array in weights(tiny_gpt2()).items():
        stored = read_safetensors(tmp_path / "b" / "model.safetensors")[name]
        np.testing.assert_array_equal(stored, array.astype(np.float16))


def test_the_files_of_the_base_are_kept(tmp_path, tiny_model):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.update(dtype="float32", summary_type="cls_index", architectures=["GPT2Model"])
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "mine": 1}')
    write_merged(jlora.load(base), tmp_path / "out", "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, "dtype": "bfloat16", "architectures": ["GPT2LMHeadModel"]}


def test_nothing_untrue_of_the_base_is_kept(tmp_path, tiny_model):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    untrue = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "compression_config": {},
        "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
        "_name_or_path": "somebody/base",
    }
    other = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "architectures": ["Mine"]}
    (base / "config.json").write_text(json.dumps({**config, **untrue, **other}))
    write_merged(jlora.load(base), tmp_path / "out", "float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, "dtype": "float16", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize("files", ["tokenizer.json", "old pair"])
def test_a_tokenizer_that_transformers_would_not_find_is_written_anew(tmp_path, tiny_model, files):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    if files == "old pair":  # OpenAI's names, settings beside them
        model = json.loads((base / "tokenizer.json").read_text())["model"]
        (base / "tokenizer.json").unlink()
        (base / "encoder.json").write_text(json.dumps(model["vocab"]))
        (base / "vocab.bpe").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
        (base / "tokenizer_config.json").write_text("{}")
    loaded = jlora.load(base)
    write_merged(loaded, tmp_path / "out")
    text = "name : Blue Spice | food : 2023 <|endoftext|>"
    again = jlora.load(tmp_path / "out").tokenizer
    assert again.encode(text) == loaded.tokenizer.encode(text)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"


def test_a_quantised_gguf_base_says_how_much_larger_the_folder_is(tmp_path, tiny_model):
    jlora.export_gguf(jlora.load(tiny_model), tmp_path / "base.gguf", "q8_0")
    base = jlora.load(tmp_path / "base.gguf")
    base.tokenizer.chat_template = "{{ messages }}"
    written = write_merged(base, tmp_path / "out")
    sizes = [p.stat().st_size for p in (tmp_path / "out/model.safetensors", tmp_path / "base.gguf")]
    assert "base.gguf holds Q8_0 weights, which jlora widens to float32" in str(written)
    assert f"{sizes[0] / sizes[1]:.1f} times the file" in str(written)
    again = jlora.load(tmp_path / "out")
    np.testing.assert_array_equal(logits(again), logits(base))
    assert again.tokenizer.encode("Blue Spice") == base.tokenizer.encode("Blue Spice")
    assert again.tokenizer.chat_template == "{{ messages }}"
    assert "widens" not in str(write_merged(again, tmp_path / "again"))


def test_a_large_model_is_several_files_and_an_index(tmp_path):
    model = adapted(*ADAPTERS["llama"])
    whole = write_merged(model, tmp_path / "whole", "bfloat16")
    parts = write_merged(model, tmp_path / "parts", "bfloat16", max_shard_size="1.5KB")
    assert (parts.report, parts.loss) == (whole.report, whole.loss)
    expected = read_safetensors(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == 2 * sum(a.size for a in expected.values())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    assert count > 5
    for file in files:
        found = read_safetensors(tmp_path / "parts" / file)
        assert [n for n in found if index["weight_map"][n] != file] == []
        assert len(found) == 1 or 2 * sum(a.size for a in found.values()) <= 1500
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], name)
    again, one = jlora.load(tmp_path / "parts"), jlora.load(tmp_path / "whole")
    np.testing.assert_array_equal(logits(again), logits(one))
    for size in ("9" * 400, "much", "0", "5 TB", -1):
        with pytest.raises(UserError, match=r"max_shard_size .* is no size; give one such as 5GB"):
            write_merged(model, tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


@needs_bf16
def test_after_a_merge_into_packed_weights():
    """What the layer gives back is packed alone then, until the engine is gone."""
    model = adapted(*ADAPTERS["llama"])
    engine.prepare(model, "bf16", keep_weights=False)
    model.merge_adapter()
    with pytest.raises(UserError, match=r"packed form alone, rounded; call engine.restore"):
        merged_weights(model)
    engine.restore(model)
    expected = dict(model.base_model.named_parameters())
    found = merged_weights(model)
    assert found.report.layers == 4
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(found.tensors[name], expected[name].numpy())
    model.unmerge_adapter()
    base = weights(ADAPTERS["llama"][0]())[name]
    given_back = dict(model.base_model.named_parameters())[name].numpy()
    np.testing.assert_array_equal(given_back, round_bf16(base))
    logits(model)


def test_what_write_merged_refuses(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="full is there already; remove it"):
        write_merged(tiny_gpt2(), tmp_path / "full")
    with pytest.raises(UserError, match="mine is there already"):
        write_merged(tiny_gpt2(), tmp_path / "full" / "mine")
    with pytest.raises(UserError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        write_merged(tiny_gpt2(), tmp_path / "new", "int8")
    tied = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["wte"]))
    with pytest.raises(UserError, match="is the output head as well"):
        write_merged(tied, tmp_path / "new")
    large = tiny_gpt2()
    large.transformer.h[1].ln_1.weight.assign(jt.array(np.full(12, 7e4, "f")))
    with pytest.raises(UserError, match=r"h\.1\.ln_1\.weight has values up to 7e\+04, too large"):
        write_merged(large, tmp_path / "new", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]
    write_merged(large, tmp_path / "empty", "bfloat16")


# Through the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [".", "best", "adapter"])
def test_merge_command(tmp_path, tiny_model, tiny_run, capsys, adapter):
    out = tmp_path / "out"
    argv = ["merge", tiny_model, tiny_run / adapter, out, "--dtype", "bfloat16"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "merged 2 layers in float32" in said and "bfloat16 keeps " in said
    assert said.splitlines()[-1] == f"written: {out}"
    folder = tiny_run / ("adapter" if adapter == "adapter" else "best")
    model = PeftModel.from_pretrained(jlora.load(tiny_model), folder)
    merged = merged_weights(model).tensors
    for name, array in read_safetensors(out / "model.safetensors").items():
        np.testing.assert_array_equal(array, round_bf16(merged[name]))
