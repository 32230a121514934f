"""Conversations from a file to an adapter, by the command line; `jlora data show`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
import yaml

from jlora.cli import main
from jlora.data.chat_template import find_template
from jlora.runs.chat_data import ChatData
from jlora.runs.recipe import make_recipe
from jlora.runs.run_data import load_data
from jlora.runs.show_data import histogram, pieces, view
from jlora.system.errors import UserError

CHAT = [{"role": "user", "content": "name : A"}, {"role": "assistant", "content": "A is here ."}]


def write(folder: Path, name="train.jsonl", count=4, **row) -> Path:
    rows = [row or {"messages": CHAT} for _ in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture
def jlora(capsys):
    """Runs a command; what it said on both streams."""

    def run(*argv: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == code
        return tuple(capsys.readouterr())

    return run


def recipe_of(model, **data):
    return make_recipe({"model": str(model), "data": {"task": "chat", **data}}, "test")


# Training ----------------------------------------------------------------------------------------


def test_a_file_of_messages_and_nothing_else_said(jlora, tmp_path, tiny_model):
    write(tmp_path)
    run = tmp_path / "run"
    out, said = jlora(
        "finetune", "--model", tiny_model, "--data", tmp_path / "train.jsonl", "--steps", 1,
        "--chat-template", "chatml", "--valid-split", 0.25, "--chat-template-args", '{"a": 1}',
        "--precision", "plain", "--rank", 2, "--batch-size", 2, "--out", run,
    )  # fmt: skip
    assert "3 train examples, " in said and "1 valid examples, " in said
    assert "conversations are written by chat template chatml" in said
    assert "writes <|im_start|>, which is no token of this model" in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"]["task"], config["lora"]["target_modules"]) == ("chat", "all-linear")
    assert config["data"]["valid_split"] == 0.25 and config["train"]["max_length"] == 2048
    adapter = json.loads((run / "best" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == "all-linear"
    for folder in (run, run / "best", run / "adapter"):
        template = find_template(folder)
        assert template.source == find_template(None, "chatml").source
        assert template.arguments == {"a": 1}
    jlora("merge", tiny_model, run, tmp_path / "merged")
    assert find_template(tmp_path / "merged") == replace(template, name=ANY, tokens=ANY)


def test_whole_texts_leave_no_template(jlora, tmp_path, tiny_model):
    write(tmp_path, text="A is here .")
    run = tmp_path / "run"
    _, said = jlora(
        "finetune", "--model", tiny_model, "--data", tmp_path, "--steps", 1, "--precision", "plain",
        "--target-modules", "c_attn", "--rank", 2, "--batch-size", 2, "--out", run,
    )  # fmt: skip
    assert "no validation data" in said and "template" not in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["chat_template"] == "none"
    assert config["lora"]["target_modules"] == ["c_attn"]
    assert find_template(run) is None


def test_without_a_template_there_is_no_chat(jlora, tmp_path, tiny_model):
    write(tmp_path)
    _, said = jlora("finetune", "--model", tiny_model, "--data", tmp_path, "--out",
                    tmp_path / "run", code=2)  # fmt: skip
    assert f"{tmp_path / 'train.jsonl'}:1: a conversation, and the model has no chat tem" in said
    assert "choose one with --chat-template: alpaca, chatml" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"a": "b"}, [], "train.jsonl:1: the keys fit no form (found: a); write prompt and compl"),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, ["--chat-template", "alpaca"],
         "train.jsonl:1: chat template alpaca refuses this: alpaca has no role tool"),
        ({"text": "a"}, ["--mask-prompt"], "train.jsonl:1: data.mask_prompt is for pairs"),
        ({"messages": CHAT}, ["--chat-template", "chatlm"], "no chat template chatlm: no such"),
        ({"messages": CHAT}, ["--chat-template", "FILE"], "loop.jinja cannot be rendered (it does"),
        ({"messages": CHAT}, ["--chat-template", "chatml", "--set", "train.max_length=8"],
         "none of 4 examples fits into 8 tokens with an answer in it; raise train.max_length"),
        ({"prompt": "a", "completion": "b"}, ["--chat-template", "chatml", "--set",
         "data.separator_id=0"], "data.separator_id is for pairs without a chat template"),
        ({"messages": CHAT}, ["--set", "data.text_feature=messages"], "name one column twice"),
        ({"messages": CHAT}, ["--set", "data.valid_split=1"], "must be between 0 and 1, not 1"),
        ({"messages": CHAT}, ["--set", "data.train_on=none"], "data.train_on"),
        ({"messages": CHAT}, ["--mask-prompt", "--set", "data.assistant_only_loss=true"],
         "data.assistant_only_loss is data.mask_prompt; give one of the two"),
        ({"messages": CHAT}, ["--task", "jsonl", "--train-on", "last"],
         "data.train_on is for task chat, not jsonl; leave it out"),
        ({"text": "a b"}, ["--chat-template", "chatml"], "data.chat_template is for conversations"),
        ({"text": "a b"}, ["--train-on", "last"], "data.train_on is for conversations, and these"),
        ({"messages": CHAT}, ["--set", "data.block_size=8"], "data.block_size is for whole texts"),
        ({"messages": CHAT}, ["--set", "data.answer_after=A"], "data.answer_after is for whole"),
        ({"messages": CHAT}, ["--task", "jsonl"], "this is a chat in messages, which task chat"),
    ],
)  # fmt: skip
def test_what_is_refused(jlora, tmp_path, tiny_model, row, options, words):
    write(tmp_path, **row)
    loop = tmp_path / "loop.jinja"
    loop.write_text("{% for a in range(9999) %}{% for a in range(9999) %}{% endfor %}{% endfor %}")
    options = [loop if option == "FILE" else option for option in options]
    out = tmp_path / "run"
    _, said = jlora("finetune", "--model", tiny_model, "--data", tmp_path, "--out", out,
                    *options, code=2)  # fmt: skip
    assert words in said.splitlines()[-1] and not out.exists()


def test_options_of_argparse(tmp_path):
    for options in (["--mask-prompt", "--no-mask-prompt"], ["--chat-template-args", "[1]"]):
        with pytest.raises(SystemExit):
            main(["finetune", "--model", "m", "--data", str(tmp_path), *options])


# Data --------------------------------------------------------------------------------------------


def test_names_of_other_trainers():
    for name in ("assistant_only_loss", "completion_only_loss"):
        assert recipe_of("m", **{name: False}).data.mask_prompt is False


def test_splits_are_drawn_by_the_seed(tmp_path):
    rows = [{"text": str(number)} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def texts(seed):
        recipe = recipe_of("m", train=str(tmp_path / "a.jsonl"), valid_split=0.1)
        recipe.train.seed = seed
        data = ChatData(recipe, test=False)
        return [[row.text for row in data._examples[split]] for split in ("train", "valid")]

    train, valid = texts(1)
    assert len(valid) == 4 and sorted(train + valid, key=int) == [str(n) for n in range(40)]
    assert texts(1) == [train, valid] and texts(2) != [train, valid]
    write(tmp_path, "one.jsonl", 1, text="a")
    with pytest.raises(UserError, match="valid_split needs two examples or more"):
        ChatData(recipe_of("m", train=str(tmp_path / "one.jsonl"), valid_split=0.1))


def test_a_row_is_read_once_and_its_columns_are_named_once(tmp_path, capsys):
    path = write(tmp_path, messages=CHAT, id=3)
    ChatData(recipe_of("m", train=str(path), valid_split=0.5), test=False)
    assert capsys.readouterr().err.count("columns that are not used: id") == 1


def test_the_validation_data_stand_in_for_test_data(tmp_path, tiny_model, capsys):
    write(tmp_path)
    write(tmp_path, "valid.jsonl", 2, messages=CHAT)
    recipe = recipe_of(tiny_model, folder=str(tmp_path), chat_template="chatml")
    recipe.decode = type(recipe.decode)(max_new_tokens=8)
    data = load_data(recipe)
    assert "no test data: the validation data are answered instead" in capsys.readouterr().err
    (group,) = data.groups
    assert (group.prompt, group.references) == ("name : A", ["A is here ."] * 2)
    prompt = data.template.render(CHAT[:1], add_generation_prompt=True)
    assert data.prompts == [data.tokenizer.encode(prompt)]
    assert data.train[0].ids[: len(data.prompts[0])] == data.prompts[0]


def test_the_file_beside_the_training_file_is_named(tmp_path, capsys):
    path = write(tmp_path)
    ChatData(recipe_of("m", train=str(path), folder=str(tmp_path)), test=False)
    valid = write(tmp_path, "valid.jsonl", 2)
    assert "valid data" not in capsys.readouterr().err
    ChatData(recipe_of("m", train=str(path), folder=str(tmp_path)), test=False)
    assert f"valid data: {valid}" in capsys.readouterr().err


def test_data_lie_with_the_others(tmp_path, monkeypatch):
    folder = tmp_path / "all" / "mine"
    folder.mkdir(parents=True)
    write(folder, text="a")
    monkeypatch.setenv("JLORA_DATA", str(tmp_path / "all"))
    monkeypatch.chdir(tmp_path)
    assert len(ChatData(recipe_of("m", folder="mine"), test=False)._examples["train"]) == 4
    with pytest.raises(UserError, match="no file or folder theirs"):
        ChatData(recipe_of("m", folder="theirs"), test=False)


# Looking at them ---------------------------------------------------------------------------------


def test_data_show(jlora, tmp_path, tiny_model):
    write(tmp_path, messages=[{"role": "user", "content": "a\x1b[2J\u2028"}, CHAT[1]])
    show = ["data", "show", tmp_path, "--model", tiny_model, "--chat-template", "chatml"]
    out, said = jlora(*show, "-n", 1)
    first, *rest = out.splitlines()
    assert first.startswith("--- example 1: ") and "trained" in first and "example 2" not in out
    assert "\u27e6A is here .<|im_end|>\n\u27e7" in out and "\\u001b[2J\\u2028" in out
    assert "\x1b" not in out and "4 examples" in out and rest[-1].endswith("4 " + "#" * 40)
    coloured, _ = jlora(*show, "--color", "always")
    assert "\x1b[32mA is here ." in coloured and "example 4" not in coloured
    page = tmp_path / "page.html"
    written, _ = jlora(*show, "--html", page)
    assert written.strip() == str(page)
    assert (
        "<mark>A is here .&lt;|im_end|&gt;" in page.read_text()
        and "<script" not in page.read_text()
    )


def test_data_show_of_a_task(jlora, tmp_path, tiny_model):
    write(tmp_path, prompt="name : A", completion="A .")
    out, _ = jlora("data", "show", tmp_path, "--model", tiny_model, "--task", "jsonl", "-n", 1)
    assert "name : A<|endoftext|>\u27e6 A .<|endoftext|>\u27e7" in out


def test_pieces_of_several_answers(tmp_path, tiny_model):
    write(tmp_path, messages=[*CHAT, *CHAT])
    data = load_data(recipe_of(tiny_model, folder=str(tmp_path), chat_template="chatml"), False)
    found = list(pieces(data.train[0], data.tokenizer))
    assert [is_trained for _, is_trained in found] == [False, True, False, True]
    assert "".join(text for text, _ in found) == data.template.render([*CHAT, *CHAT])
    assert view(data, 0, False).startswith("---\ntrain: 4 examples")


def test_histogram():
    assert histogram([5]) == [(5, 5, 1)]
    bins = histogram([1, 1, 2, 80])
    assert sum(count for *_, count in bins) == 4 and bins[0] == (1, 10, 3)
    assert bins[-1] == (71, 80, 1) and len(bins) == 8
