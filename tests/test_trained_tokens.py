"""A model that is merged or exported stops where its adapter was trained to stop."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import yaml
from tokenizers import AddedToken

import jlora
from jlora.adapters.export_folder import write_merged
from jlora.adapters.export_gguf import export_gguf
from jlora.adapters.trained_tokens import TrainedTokens
from jlora.cli import main
from jlora.data.batches import NO_SEPARATOR, Example, encode_example
from jlora.data.tokenizer import Tokenizer
from jlora.formats.gguf_file import read_gguf
from jlora.system.errors import UserError

WORD = 7  # an ordinary token
STOP = 400  # a special one, added below


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a second special token, <stop>, and every file that names an end token."""
    folder = tiny.write_model(tmp_path_factory.mktemp("tokens") / "base")
    backend = tiny.train_tokenizer()
    backend.add_special_tokens([AddedToken("<stop>", normalized=False)])
    assert backend.token_to_id("<stop>") == STOP
    backend.save(str(folder / "tokenizer.json"))
    config = tiny.config(STOP + 1)
    tiny.write_safetensors(folder / "model.safetensors", tiny.weights(STOP + 1))
    for name, value in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [0, 3], "temperature": 0.6},
        "tokenizer_config.json": {"eos_token": {"content": tiny.END}, "mine": 1},
        "special_tokens_map.json": {"eos_token": tiny.END, "bos_token": tiny.END},
    }.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_special_token_is_named_by_every_file(tmp_path, base):
    model = jlora.load(base)
    written = write_merged(model, tmp_path / "out", trained=TrainedTokens(0, STOP))
    assert read(tmp_path / "out", "config.json")["eos_token_id"] == STOP
    generation = read(tmp_path / "out", "generation_config.json")
    assert generation == {"eos_token_id": STOP, "temperature": 0.6}
    settings = read(tmp_path / "out", "tokenizer_config.json")
    assert settings == {"eos_token": "<stop>", "mine": 1}
    names = read(tmp_path / "out", "special_tokens_map.json")
    assert names == {"eos_token": "<stop>", "bos_token": tiny.END}
    assert f"token {STOP} ends a text, as in training: config.json, gen" in str(written)
    assert "token 0 stood after each prompt in training" in str(written)
    again = jlora.load(tmp_path / "out")
    assert again.tokenizer.eos_token_id == again.config.eos_token_id == STOP
    assert encode_example(Example("a", "b"), again.tokenizer).ids[1:2] == [0]
    assert model.tokenizer.eos_token_id == 0 and read(base, "config.json")["eos_token_id"] == 0


def test_a_word_is_no_eos_token_but_ends_texts_all_the_same(tmp_path, base):
    written = write_merged(jlora.load(base), tmp_path / "out", trained=TrainedTokens(WORD, WORD))
    assert "eos_token" not in read(tmp_path / "out", "tokenizer_config.json")
    assert "eos_token" not in read(tmp_path / "out", "special_tokens_map.json")
    assert f"names no eos_token, since token {WORD} is a word" in str(written)
    assert "stood after each prompt" not in str(written)  # the end token, as ever
    again = jlora.load(tmp_path / "out").tokenizer
    assert again.eos_token_id == again.separator_id == WORD
    text = "name : Blue Spice | food : 2023"
    assert again.encode(text) == jlora.load(base).tokenizer.encode(text)


def test_without_other_tokens_the_files_stay_the_bases(tmp_path, base):
    for number, trained in enumerate([TrainedTokens(), TrainedTokens(0, 0)]):
        out = tmp_path / str(number)
        assert not write_merged(jlora.load(base), out, trained=trained).notes
        for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
        assert read(out, "config.json")["eos_token_id"] == 0


def test_one_of_several_end_tokens_is_enough(tmp_path, base):
    folder = shutil.copytree(base, tmp_path / "base")
    config = {**read(folder, "config.json"), "eos_token_id": [0, STOP]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    write_merged(jlora.load(folder), tmp_path / "out", trained=TrainedTokens(STOP, STOP))
    assert read(tmp_path / "out", "config.json")["eos_token_id"] == [0, STOP]
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert jlora.load(tmp_path / "out").tokenizer.eos_token_id == STOP


def test_no_separator_is_kept_too(tmp_path, base):
    model = jlora.load(base)
    write_merged(model, tmp_path / "out", trained=TrainedTokens(NO_SEPARATOR, 0))
    export_gguf(model, tmp_path / "m.gguf", trained=TrainedTokens(NO_SEPARATOR, 0))
    for path in (tmp_path / "out", tmp_path / "m.gguf"):
        tokenizer = jlora.load(path).tokenizer
        ids = encode_example(Example("a", "b"), tokenizer).ids
        assert ids == [*tokenizer.encode("a"), *tokenizer.encode(" b"), 0]
    # The merged model is trained with the same tokens, or with others, and written again.
    again = jlora.load(tmp_path / "out")
    assert TrainedTokens.of(again.tokenizer, None, None) == TrainedTokens(NO_SEPARATOR, 0)
    assert TrainedTokens.of(again.tokenizer, 5, WORD) == TrainedTokens(5, WORD)
    assert TrainedTokens.of(model.tokenizer, None, WORD) == TrainedTokens(0, WORD)
    write_merged(again, tmp_path / "again", trained=TrainedTokens(0, 0))
    # Said even where it is the end token: this model answers a task, whatever its base's template.
    assert read(tmp_path / "again", "config.json")["jlora"] == {"separator_id": 0}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_gguf_names_the_trained_end_token(tmp_path, base, tokenizer):
    path = tmp_path / "m.gguf"
    written = export_gguf(jlora.load(base), path, "f32", tokenizer, TrainedTokens(0, STOP))
    assert f"token {STOP} ends a text, as in training: tokenizer.ggml.eos" in str(written)
    file = read_gguf(path)
    assert file.config["eos_token_id"] == STOP and file.metadata["jlora.separator_id"] == 0
    if not tokenizer:  # and a tokenizer.json beside it names no end token
        assert jlora.load(path).tokenizer is None
        shutil.copyfile(base / "tokenizer.json", tmp_path / "tokenizer.json")
    assert jlora.load(path).tokenizer.eos_token_id == STOP


def test_merged_and_exported_runs_answer_as_the_adapter_does(
    tmp_path, tiny_model, tiny_run, capsys
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["data"].update(separator_id=5, end_id=WORD)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    merged, gguf, adapter = (str(tmp_path / name) for name in ("merged", "m.gguf", "a.pt"))
    assert main(["merge", str(tiny_model), str(run), merged]) == 0
    assert f"token {WORD} ends a text" in capsys.readouterr().out
    assert main(["export", str(tiny_model), "--adapter", str(run), "--gguf", gguf]) == 0
    assert main(["convert", str(run), adapter, "--model", str(tiny_model)]) == 0
    assert f"give --separator-id 5 --end-id {WORD} to generate" in capsys.readouterr().out
    common = "--precision plain --beams 2 --max-new-tokens 6 --prompt".split() + [
        "name : Blue Spice"
    ]
    answers = []
    for model in (
        ["--model", str(tiny_model), "--adapter", str(run)],
        ["--model", merged],
        ["--model", gguf],
    ):
        assert main(["generate", *model, *common]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] != ""


def test_a_tokenizer_saved_anew_names_it_as_well(tmp_path, base):
    model = jlora.load(base)
    model.source = None  # as of a model that was made, not loaded
    write_merged(model, tmp_path / "out", trained=TrainedTokens(STOP, STOP))
    assert read(tmp_path / "out", "tokenizer_config.json")["eos_token"] == "<stop>"
    assert Tokenizer.from_folder(tmp_path / "out").eos_token_id == STOP


def test_a_damaged_file_of_the_base_is_named(tmp_path, base):
    folder = shutil.copytree(base, tmp_path / "base")
    model = jlora.load(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"base/generation_config.json:1: not JSON"):
        write_merged(model, tmp_path / "out", trained=TrainedTokens(STOP, STOP))
    assert not (tmp_path / "out").exists()
