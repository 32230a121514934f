"""Answering prompts: what is kept of an interruption, what processes share, what a run decides."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from plain_gpt2 import PlainGPT2

from jlora.cli import main
from jlora.decoding.beam import BeamConfig
from jlora.decoding.predictions import read_predictions
from jlora.decoding.sampling import GenerateConfig
from jlora.runs import adapter_file, answer, pipeline
from jlora.runs.adapter_file import AdapterFile, run_of
from jlora.runs.recipe import load_recipe, make_recipe
from jlora.runs.run_data import RunData
from jlora.system.distributed import World
from jlora.system.errors import UserError

BEAM = BeamConfig((0,), num_beams=3, max_new_tokens=8, batch_size=2)
DRAW = GenerateConfig((0,), max_new_tokens=8, temperature=1.0, batch_size=2)
ENCODED = [[3, 1, 4], [2], [7, 7], [2], [9, 3, 2], [5]]
PROMPTS = ["three", "one", "two", "one", "three more", "five"]


class Letters:
    eos_token_id = 0

    def decode(self, ids):
        return "".join(chr(ord("a") + token) for token in ids)

    def encode_batch(self, texts):
        return [[ord(letter) % 20 + 1 for letter in text] for text in texts]

    encode_after = encode_batch


@pytest.fixture
def model():
    model = PlainGPT2.random(1, 25)
    model.tokenizer, model.eval = Letters(), lambda: None
    return model


def texts(predictions):
    return [prediction.prediction for prediction in predictions]


@pytest.fixture
def watched(monkeypatch):
    """Numbers of the prompts that are decoded; stops with Ctrl-C after ``limit`` of them."""
    seen, limit, hypotheses_of = [], [99], answer.hypotheses_of

    def watch(*arguments):
        for number, hypotheses in hypotheses_of(*arguments):
            if len(seen) == limit[0]:
                raise KeyboardInterrupt
            seen.append(number)
            yield number, hypotheses

    monkeypatch.setattr(answer, "hypotheses_of", watch)
    return seen, limit


# What an interruption leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("config", [BEAM, DRAW], ids=["beam", "draw"])
def test_what_is_finished_is_not_decoded_again(model, watched, tmp_path, config):
    """Also of prompts that are alike: each has draws of its own."""
    seen, limit = watched
    whole = answer.decode(model, PROMPTS, ENCODED, config, tmp_path / "whole.jsonl")
    seen.clear()
    limit[0] = 4
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer.decode(model, PROMPTS, ENCODED, config, out, "source")
    kept = read_predictions(tmp_path / "out.jsonl.partial")
    assert len(kept) == 4
    seen.clear()
    limit[0] = 99
    # More prompts at a time make no difference to the answers.
    larger = replace(config, batch_size=4)
    assert answer.decode(model, PROMPTS, ENCODED, larger, out, "source") == whole
    assert len(seen) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "whole.jsonl", "whole.txt", "out.jsonl", "out.txt"
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"source": "another adapter"},
        {"config": replace(BEAM, length_penalty=0.1)},
        {"config": replace(BEAM, eos_token_ids=(1,))},
        {"config": DRAW},
        {"encoded": [[4, *ids] for ids in ENCODED]},
    ],
    ids=str,
)
def test_what_another_decoding_left_is_not_taken(model, watched, tmp_path, capsys, change):
    seen, limit = watched
    call = {"source": "source", "config": BEAM, "encoded": ENCODED}
    limit[0], out = 4, tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer.decode(model, PROMPTS, path=out, **call)
    seen.clear()
    limit[0] = 99
    expected = answer.decode(model, PROMPTS, path=None, **{**call, **change})
    seen.clear()
    assert answer.decode(model, PROMPTS, path=out, **{**call, **change}) == expected
    assert len(seen) == len(PROMPTS)
    assert "out.jsonl.partial is of another adapter, model or setting" in capsys.readouterr().err


def test_predictions_without_a_key_are_of_an_older_version(model, watched, tmp_path):
    path = tmp_path / "out.jsonl.partial"
    path.write_text(json.dumps({"prompt": "one", "prediction": "of another"}) + "\n")
    found = answer.decode(model, PROMPTS, ENCODED, BEAM, tmp_path / "out.jsonl")
    assert "of another" not in texts(found) and len(watched[0]) == len(PROMPTS)


def test_the_source_of_answers(tiny_run, tmp_path):
    """Another weight file, adapter, alpha or precision is another source."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a")
    adapter = Path(shutil.copytree(tiny_run / "best", tmp_path / "adapter"))

    class Model:
        name_or_path, source = "m", weights

    def source(precision="plain", **settings):
        return answer.describe_source(Model, precision, AdapterFile(adapter, **settings))

    first = source()
    assert source() == first
    assert source("fp32") != first and source(lora_alpha=3.0) != first
    (adapter / "adapter_config.json").write_text("{}")
    second = source()
    assert second != first
    weights.write_bytes(b"ab")
    assert source() != second


# Several processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [BEAM, replace(DRAW, temperature=0.0), DRAW], ids=str)
def test_processes_divide_the_prompts(model, watched, monkeypatch, tmp_path, config):
    expected = answer.decode(model, PROMPTS, ENCODED, config, None)
    seen, others = watched[0], {}

    class Process(World):
        size = 2

        def gather(self, item):
            if self.rank == 1:
                others.update(item)
                return [item, {number: expected[number] for number in range(6)}]
            return [item, others]

    for rank in (1, 0):
        seen.clear()
        here = Process()
        here.rank = rank
        monkeypatch.setattr(answer, "world", lambda here=here: here)
        out = tmp_path / f"{rank}.jsonl"
        assert answer.decode(model, PROMPTS, ENCODED, config, out) == expected
        assert len(seen) == 3  # of six
    assert not set(seen) & set(others)


# Choices -----------------------------------------------------------------------------------------


def test_a_choice_longer_than_the_new_tokens_has_room(monkeypatch, tmp_path):
    """The prompt is cut so that the longest answer fits into the context behind it."""
    from jlora.data.tasks import boolq

    task = replace(boolq.TASK, choices=("true", "false, as far as anybody can tell"))
    monkeypatch.setattr("jlora.runs.run_data.get_task", lambda name: task)
    row = {"question": "is it", "title": "It", "passage": "word " * 40, "answer": True}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")

    class Model:
        tokenizer = Letters()

        class config:
            max_positions, vocab_size = 100, 25

    values = {"data": {"task": "boolq", "folder": str(tmp_path)}, "decode": {"max_new_tokens": 4}}
    data = RunData(make_recipe({"model": "m", **values}, "test")).encode(Model)
    longest = max(map(len, Letters().encode_batch([f" {choice}" for choice in task.choices])))
    assert longest > 4
    assert [len(prompt) + longest - 1 for prompt in data.prompts] == [100]


def test_choices_beyond_the_context_are_refused(model):
    prompts = [[1] * (model.config.max_positions - 3)]
    with pytest.raises(UserError, match="with the 5 of an answer exceed the model's context"):
        answer.choice_logprobs(model, prompts, ["a", "abcd"])


# What a run decides ------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a run folder, to be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def change_config(run: Path, change) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    change(values)
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def test_commands_take_the_adapter_that_the_run_decodes_with(run):
    assert run_of(run)[0] == run / "best"
    change_config(run, lambda values: values["decode"].update(adapter="last"))
    assert run_of(run)[0] == run / "adapter"
    shutil.rmtree(run / "adapter")
    assert run_of(run)[0] == run / "best"
    (run / "best").rename(run / ".best.old")  # a run that was killed while it wrote
    assert run_of(run)[0] == run / "best"


@pytest.mark.parametrize(
    "text",
    [
        "base_model: x\nadapter: lora\n",
        "model: x\ntrain: true\ndata: y\n",
        "- a\n",
        "a: &x 1\nb: *x\n",
        "{{",
        "\udcff",
    ],
    ids=ascii,
)
def test_another_tools_config_beside_an_adapter_is_left_alone(run, capsys, text):
    (run / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert run_of(run / "best") == (run / "best", None)
    assert f"{run / 'config.yaml'} is not of a run of jlora" in capsys.readouterr().err


def test_a_setting_that_was_renamed_since_blocks_no_adapter(run, capsys):
    def change(values):
        values["data"]["separator_id"] = 5
        values["train"]["warmup"] = 3
        values["of_old"] = 1
        values["train"]["optim"]["schedule"] = "gone"

    change_config(run, change)
    folder, recipe = run_of(run)
    said = capsys.readouterr().err
    assert folder == run / "best" and recipe.data.separator_id == 5
    assert "does not know of_old, train.warmup" in said or "train.warmup, of_old" in said
    with pytest.raises(UserError, match="unknown setting"):
        load_recipe(run / "config.yaml")  # to train on, every setting counts
    change_config(run, lambda values: values["decode"].update(num_beams=0))
    with pytest.raises(UserError, match="config.yaml: num_beams is 0"):
        run_of(run)


def decoded(argv, monkeypatch):
    """The settings that a `jlora generate` comes to, and the prompts."""
    found = {}

    def take(prompts, model, adapter, config, *rest):
        found.update(prompts=prompts, config=config)
        return []

    monkeypatch.setattr(answer, "answer", take)
    monkeypatch.setattr(answer, "stream_answer", lambda prompt, *rest: take([prompt], *rest))
    assert main(["generate", *map(str, argv)]) == 0
    return found["config"]


def test_a_run_s_own_decode_settings_are_the_defaults(run, tiny_model, monkeypatch):
    change_config(
        run,
        lambda values: values["decode"].update(
            num_beams=3, max_new_tokens=9, length_penalty=0.5, rank_up_to=0.7, batch_size=5,
            repetition_penalty=1.5, eos_token_ids=[7],
        ),
    )  # fmt: skip
    argv = ["--adapter", run, "--prompt", "x"]
    config = decoded(argv, monkeypatch)
    assert (config.num_beams, config.max_new_tokens, config.length_penalty) == (3, 9, 0.5)
    assert (config.batch_size, config.rank_up_to, config.eos_token_ids) == (5, 0.7, [7])
    config = decoded([*argv, "--beams", 2, "--length-penalty", 0.9], monkeypatch)
    assert (config.num_beams, config.length_penalty, config.rank_up_to) == (2, 0.9, None)
    config = decoded([*argv, "--method", "greedy", "--batch-size", 2], monkeypatch)
    assert (config.temperature, config.max_new_tokens, config.repetition_penalty) == (0, 9, 1.5)
    assert (config.batch_size, config.eos_token_ids) == (2, [7])
    config = decoded([*argv, "--method", "sample", "--top-k", 4, "--seed", 2], monkeypatch)
    assert (config.temperature, config.top_k, config.seed, config.top_p) == (1.0, 4, 2, 1.0)
    for task in (["--separator-id", 0], ["--beams", 10, "--max-new-tokens", 64]):
        config = decoded(["--model", tiny_model, "--prompt", "x", *task], monkeypatch)
        assert (config.num_beams, config.max_new_tokens, config.length_penalty) == (10, 64, 0.8)
        assert (config.no_repeat_ngram_size, config.batch_size) == (4, 32)


# Before a model is loaded ------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch, capsys):
    """Runs a command that must be refused without loading a model; its message."""
    for module in (pipeline, adapter_file):
        monkeypatch.setattr(module, "load", lambda name: pytest.fail("the model was loaded"))

    def run(*argv):
        capsys.readouterr()
        assert main([str(argument) for argument in argv]) == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method beam --temp 2", "--temperature is for --method sample, not beam; leave it out"),
        ("--top-k 0", "--top-k is for --method sample"),
        ("--top-p 1", "--top-p is for --method sample"),
        ("--seed 0", "--seed is for --method sample"),
        ("--method greedy --seed 3", "--seed is for --method sample, not greedy"),
        ("--method sample --beams 3", "--beams is for --method beam, not sample"),
        ("--method greedy --length-penalty 1", "--length-penalty is for --method beam"),
        ("--method sample --no-repeat-ngram-size 0", "--no-repeat-ngram-size is for --method beam"),
        ("--lora-alpha 0", "--lora-alpha is for an --adapter; leave it out"),
        ("--enable-lora 1,0,1", "--enable-lora is for an --adapter"),
        ("--force", "--force is for an --adapter"),
        ("--task e2e", "--task says how --data is read; leave it out"),
        ("--raw --separator-id 3", "--separator-id says another token than --raw"),
        ("--beams 0", "num_beams is 0, but must be from 1"),
        ("--method sample --top-p 2", "top_p is 2.0, but must be above 0"),
        ("--max-new-tokens 0", "max_new_tokens is 0, but must be >= 1"),
        ("--precision fp8", "precision 'fp8' is not one of auto, plain"),
        ("--adapter nowhere", "nowhere is no folder; give the folder that holds"),
        ("--adapter tests", "tests holds no adapter_config.json"),
        ("--out x.txt", "x.txt: the texts alone go to a file of that name"),
        ("--out tests", "tests is a folder; give a file in it"),
    ],
)
def test_generate_refuses_what_has_no_effect_or_no_sense(no_model, options, said, tmp_path,
                                                         monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert said in no_model("generate", "--model", "m", "--prompt", "x", *options.split())
    assert [path.name for path in tmp_path.iterdir()] == ["tests"]


def test_generate_reads_its_data_first(no_model, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    said = no_model("generate", "--model", "m", "--data", path, "--task", "jsonl")
    assert "test.jsonl:2: no key 'completion'" in said


def test_generate_checks_prompts_and_tokens_first(no_model, tiny_model, tmp_path, run):
    said = no_model("generate", "--model", tiny_model, "--prompt", "name : A | " * 60)
    assert "prompt 1" in said and "shorten it" in said
    said = no_model("generate", "--model", tiny_model, "--prompt", "x", "--end-id", "400")
    assert "end tokens 400: the model's vocabulary has 400 words" in said
    said = no_model("generate", "--model", tiny_model, "--prompt", "x", "--separator-id", "400")
    assert "token ids outside the model's vocabulary of 400" in said
    rows = [{"prompt": "name : A | " * count, "completion": "b"} for count in (1, 60)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = no_model("generate", "--adapter", run, "--data", path, "--task", "jsonl")
    assert "prompt 2" in said and "loading" not in said


def test_other_commands_refuse_what_has_no_effect(no_model, tmp_path, run):
    export = ["export", "m", "--gguf", tmp_path / "x.gguf"]
    assert "--force is for an --adapter" in no_model(*export, "--force")
    assert "leave the others out" in no_model("run", "--resume", "--smoke", "--out", run)
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("")
    rerank = ["rerank", predictions, "--length-penalty", 1, "--out", tmp_path / "p.txt"]
    assert "the texts alone go to a file of that name" in no_model(*rerank)


@pytest.mark.parametrize(
    ("verb", "split"),
    [(verb, split) for verb in ("run", "finetune") for split in ("train", "valid")]
    + [("run", "test")],
)
def test_a_mistake_in_line_7_costs_no_minute(no_model, tmp_path, tiny_model, verb, split):
    good = json.dumps({"prompt": "name : A", "completion": "A ."}) + "\n"
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(good * 6 + ("{\n" if name == split else good))
    recipe = tmp_path / "recipe.yaml"
    data = f"{{task: jsonl, folder: {tmp_path}, metrics: [BLEU]}}"
    recipe.write_text(f"model: {tiny_model}\ndata: {data}\nprecision: plain\n")
    named = [recipe] if verb == "run" else ["--recipe", recipe]
    out = tmp_path / "run"
    assert f"{split}.jsonl:7: not JSON" in no_model(verb, *named, "--out", out)
    assert not out.exists()


def test_settings_are_checked_before_the_model(no_model, tmp_path, tiny_model):
    options = ["finetune", "--model", tiny_model, "--task", "restaurants", "--out", tmp_path / "r"]
    said = no_model(*options, "--set", "data.separator_id=50256")
    assert "vocabulary has 400" in said
    said = no_model(*options, "--precision", "plain", "--checkpoint-activations")
    assert "checkpoint_activations works with precision bf16 or int8, not with plain" in said


def test_a_run_reads_each_file_once_and_says_so_once(tmp_path, tiny_model, capsys, monkeypatch):
    from jlora.data.tasks import jsonl

    read = []
    monkeypatch.setattr(
        jsonl, "TASK",
        replace(jsonl.TASK, read_file=lambda path: read.append(path) or jsonl.read_pairs(path)),
    )  # fmt: skip
    for name, count in (("train", 6), ("valid", 2), ("test", 2)):
        rows = [{"prompt": f"name : {i}", "completion": "A ."} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ndata: {{task: jsonl, folder: {tmp_path}, metrics: [BLEU]}}\n"
        "lora: {r: 2, target_modules: [c_attn]}\ntrain: {batch_size: 4, steps: 2, max_length: 64}\n"
        "decode: {num_beams: 2, max_new_tokens: 4}\nprecision: plain\nscore_before: true\n"
    )
    for verb, named, files in (("run", [recipe], 3), ("finetune", ["--recipe", recipe], 2)):
        read.clear()
        assert main([verb, *map(str, named), "--out", str(tmp_path / verb)]) == 0
        said = capsys.readouterr().err
        assert said.count("6 train examples") == said.count("2 valid examples") == 1
        assert len(read) == len(set(read)) == files
    hashes = json.loads((tmp_path / "run" / "environment.json").read_text())["data_sha256"]
    assert [Path(name).name for name in sorted(hashes)] == [
        "test.jsonl", "train.jsonl", "valid.jsonl"
    ]  # fmt: skip
