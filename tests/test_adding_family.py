"""The family of docs/adding, in somebody's own package: loads, trains, decodes, GGUF."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import tiny
from needs import needs_bf16
from tiny_models import ids_of, randomise, randomise_adapter

import jlora
from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.adapters.export_gguf import export_gguf
from jlora.cli import main
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.engine.blocks import BLOCKS
from jlora.formats.safetensors_file import write_safetensors
from jlora.models import families, llama
from jlora.models.hub import build_model
from jlora.system import plugins
from jlora.system.errors import UserError
from jlora.system.runtime import jt

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding.md"
CONFIG = {
    "model_type": "hunyuan_v1_dense", "vocab_size": 23, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "rope_theta": 100.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def code() -> str:
    """The code blocks of the section "A model family"."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("\n## A model family\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The documented code as a package outside; gone, and its family with it, after the test."""
    folder = tmp_path / "packages" / "my_models"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "hunyuan.py").write_text(code())
    monkeypatch.syspath_prepend(str(folder.parent))
    before = dict(families.FAMILIES)
    import my_models.hunyuan

    yield my_models.hunyuan
    families.FAMILIES.clear()
    families.FAMILIES.update(before)
    for name in ("my_models", "my_models.hunyuan"):
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path, package):
    model = randomise(build_model(CONFIG), 0, 0.15)
    tensors = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


# transformers 5.23's HunYuanDenseV1ForCausalLM with the same weights and ids.
LOGITS = {
    (0, 8): [-0.9854916334152222, -0.8676274418830872, -0.265835314989090, -0.2734620571136475],
    (1, 4): [-0.2382072061300278, 0.0720372349023819, 0.2729765176773071, -2.107459783554077],
}
GREEDY = [16, 16, 16, 16, 16, 16]


def test_it_loads_and_computes_what_transformers_computes(folder):
    model = jlora.load(folder)
    ids = jt.array(ids_of((2, 9)))
    logits = model(ids).numpy()
    for (row, token), expected in LOGITS.items():
        np.testing.assert_allclose(logits[row, token, :4], expected, atol=1e-4)
    config = GenerateConfig(max_new_tokens=6, eos_token_ids=[], temperature=0.0)
    prompt = [int(i) for i in ids_of((2, 9))[0, :5]]
    assert generate(model, [prompt], config)[0].ids == GREEDY


@needs_bf16
def test_its_blocks_run_layer_by_layer_where_others_are_fused(folder):
    model = jlora.load(folder)
    ids = jt.array(ids_of((2, 9)))
    plain = model(ids).numpy()
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.05)):
        assert engine.prepare(model, precision) == precision
        assert type(decoder_of(model)) is Decoder
        assert np.abs(model(ids).numpy() - plain).max() < bound
    # Norms that change the numbers are not passed over.
    model.model.layers[0].self_attn.query_layernorm.weight *= 3
    assert np.abs(model(ids).numpy() - plain).max() > 0.1
    engine.prepare(model, "plain")


def test_its_adapter_and_its_way_through_gguf(tmp_path, folder):
    model = get_peft_model(jlora.load(folder), LoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in model.lora_layers()} == {"q_proj", "v_proj"}
    randomise_adapter(model)
    ids = jt.array(ids_of((2, 9)))
    adapted = model(ids).numpy()
    export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
    again = jlora.load(tmp_path / "m.gguf")
    assert again.config.to_dict()["architectures"] == ["HunYuanDenseV1ForCausalLM"]
    np.testing.assert_allclose(again(ids).numpy(), adapted, atol=1e-4)


def test_a_field_that_is_not_computed_is_refused(package):
    with pytest.raises(UserError, match="use_sliding_window true is not computed"):
        build_model({**CONFIG, "use_sliding_window": True})
    with pytest.raises(UserError, match="rope_scaling .*dynamic.* is not supported"):
        build_model({**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}})


def test_the_command_line_trains_and_answers(tmp_path, package, capsys):
    tokenizer = tiny.train_tokenizer()
    config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0}
    model = randomise(build_model(config), 0, 0.15)
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    tensors = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    write_safetensors(base / "model.safetensors", tensors)
    (base / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(base / "tokenizer.json"))
    code = main(
        f"finetune --model {base} --task restaurants --rank 2 --lr 1e-2 --batch-size 2 --steps 1 "
        f"--precision plain --set data.train_limit=4 --set data.valid_stride=99 --out {run}".split()
    )
    assert code == 0
    capsys.readouterr()
    question = "--prompt x --beams 2 --max-new-tokens 3 --precision plain".split()
    assert main(["generate", "--adapter", str(run), *question]) == 0
    assert capsys.readouterr().out


@needs_bf16
def test_a_family_with_parts_is_fused_and_decoded_as_llama_is(package):
    """Classes of its own, of a kind that the operators compute."""

    class Block(llama.Block):
        pass

    class Backbone(llama.LlamaModel):
        block = Block

    class Model(llama.LlamaForCausalLM):
        backbone = Backbone

    class Config(llama.LlamaConfig):
        architectures = {"mine": "MineForCausalLM"}

    own, known = families.LLAMA_PARTS, families.LLAMA_PARTS.modules
    modules = {**known, Block: known[llama.Block], Backbone: known[llama.LlamaModel]}
    parts = replace(own, block=Block, modules=modules)
    entry = replace(families.FAMILIES["llama"], model_type="mine", config=Config, model=Model)
    families.register_family(replace(entry, parts=parts))
    results = []
    for model_type in ("llama", "mine"):
        model = randomise(build_model({**CONFIG, "model_type": model_type}), 0, 0.15)
        engine.prepare(model, "bf16")
        assert type(decoder_of(model)) is NativeDecoder
        assert {type(b) for b in model.model.layers} & set(BLOCKS.values())
        results.append(model(jt.array(ids_of((2, 9)))).numpy())
    np.testing.assert_array_equal(*results)
    engine.restore(model)
    assert {type(block) for block in model.model.layers} == {Block}


def test_an_entry_point_makes_it_known(package, monkeypatch):
    del families.FAMILIES["hunyuan_v1_dense"]
    point = EntryPoint("hunyuan_v1_dense", "my_models.hunyuan:HUNYUAN", "jlora.families")
    monkeypatch.setattr(plugins, "plugins", lambda group: {"hunyuan_v1_dense": point})
    assert build_model(CONFIG).family is package.HUNYUAN
    del families.FAMILIES["hunyuan_v1_dense"]
    wrong = EntryPoint("hunyuan_v1_dense", "my_models.hunyuan:Block", "jlora.families")
    monkeypatch.setattr(plugins, "plugins", lambda group: {"hunyuan_v1_dense": wrong})
    with pytest.raises(UserError, match="jlora.families, my_models.hunyuan:Block. is no Family"):
        build_model(CONFIG)


def test_without_its_package_the_type_is_named():
    with pytest.raises(UserError, match="'hunyuan_v1_dense' is not supported; only gpt2, llama"):
        build_model(CONFIG)
