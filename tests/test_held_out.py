"""`jlora evaluate perplexity` and `exact-match`: a model judged by held-out examples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny

import jlora
from jlora.cli import main
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.system.runtime import jt

PAIRS = [("name : A", "A is there ."), ("name : B", "B is ."), ("name : C | x", "C .")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_chat_model(tmp_path_factory.mktemp("held") / "model")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(capsys, *argv):
    capsys.readouterr()
    argv = ["evaluate", *argv, "--precision", "plain", "--json"]
    assert main([str(argument) for argument in argv]) == 0
    return json.loads(capsys.readouterr().out)


def loss(model, before: str, trained: str) -> list[float]:
    """-log p of the trained tokens, by whole logits."""
    ids = model.tokenizer.encode(before)
    start = len(ids)
    ids += model.tokenizer.encode(trained)
    with jt.no_grad():
        logits = model(jt.array([ids])).numpy()[0].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return [-logs[place - 1, ids[place]] for place in range(start, len(ids))]


def test_perplexity_of_answers(model, tmp_path, capsys):
    file = write(
        tmp_path / "valid.jsonl", [{"prompt": asked, "completion": said} for asked, said in PAIRS]
    )
    own, losses = jlora.load(model), []
    for asked, said in PAIRS:
        before = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        losses += loss(own, before, f"{said}<|im_end|>\n")
    found = scores(capsys, "perplexity", "--model", model, "--data", tmp_path)
    assert found["examples"] == 3
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert scores(capsys, "perplexity", "--model", model, "--data", file) == found


def test_perplexity_of_texts_and_of_a_task(model, tiny_model, tiny_run, tmp_path, capsys):
    file = write(tmp_path / "t.jsonl", [{"text": "name : A is there ."}])
    own = jlora.load(model)
    found = scores(capsys, "perplexity", "--model", model, "--data", file)
    losses = loss(own, "name", " : A is there .<|im_end|>")
    assert (found["tokens"], found["examples"]) == (len(losses), 1)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    # The run's own task, separator and end token; its validation loss is the same thing.
    file = write(tmp_path / "p.jsonl", [{"prompt": "name : A", "completion": "A ."}])
    found = scores(capsys, "perplexity", "--adapter", tiny_run, "--data", file, "--task", "jsonl")
    own = jlora.PeftModel.from_pretrained(jlora.load(tiny_model), tiny_run / "best")
    losses = loss(own, f"name : A{tiny.END}", f" A .{tiny.END}")
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_exact_match(model, tmp_path, capsys):
    own = jlora.load(model)
    own.eval()
    rows = []
    for number, (asked, _) in enumerate(PAIRS):
        text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        (found,) = generate(own, [own.tokenizer.encode(text)], GenerateConfig((401, 0), 6))
        answer = own.tokenizer.decode(found.text_ids).strip()
        rows.append({"prompt": asked, "completion": answer + (" no" if number == 1 else " \n")})
    file, out = write(tmp_path / "test.jsonl", rows), tmp_path / "out.jsonl"
    argv = ["exact-match", "--model", model, "--data", file, "--max-tokens", 6, "--out", out]
    found = scores(capsys, *argv)
    assert found == {"exact_match": pytest.approx(2 / 3), "matches": 2, "examples": 3}
    assert len(out.read_text().splitlines()) == 3


def test_answers_of_texts_by_a_model_alone(model, tmp_path, capsys):
    """It goes on with the text as it is, though the model has a chat template."""
    own = jlora.load(model)
    own.eval()
    rows = []
    for asked, _ in PAIRS:
        (found,) = generate(own, [own.tokenizer.encode(f"{asked} A:")], GenerateConfig((401, 0), 6))
        answer = own.tokenizer.decode(found.text_ids).strip()
        rows.append({"text": f"{asked} A: {answer}"})
    file = write(tmp_path / "test.jsonl", rows)
    argv = ["exact-match", "--model", model, "--data", file, "--max-tokens", 6]
    found = scores(capsys, *argv, "--set", "data.answer_after=' A:'")
    assert found == {"exact_match": 1.0, "matches": 3, "examples": 3}


def test_columns_of_another_name(model, tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", [{"q": asked, "a": said} for asked, said in PAIRS])
    usual = [{"prompt": asked, "completion": said} for asked, said in PAIRS]
    expected = scores(
        capsys, "perplexity", "--model", model, "--data", write(tmp_path / "y.jsonl", usual)
    )
    names = ["--set", "data.prompt_feature=q", "--set", "data.completion_feature=a"]
    assert scores(capsys, "perplexity", "--model", model, "--data", file, *names) == expected


def test_perplexity_counts_what_was_cut(model, tmp_path, capsys):
    turns = [{"role": role, "content": "a b"} for role in ("user", "assistant") * 3]
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 60}]
    rows = [{"messages": turns}, {"messages": turns[:2]}, {"messages": long}]
    file = write(tmp_path / "x.jsonl", rows)
    argv = ["perplexity", "--model", model, "--data", file]
    found = scores(capsys, *argv, "--max-length", 40)
    assert (found["examples"], found["cut"], found["left_out"]) == (2, 1, 1)
    found = scores(capsys, *argv)
    assert (found["examples"], found["cut"], found["left_out"]) == (3, 0, 0)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("perplexity", "perplexity needs data: --data FILE"),
        ("perplexity --data nowhere", "nowhere"),
        ("perplexity --data FILE --refs x", "--refs is for the scores of a task"),
        ("perplexity --data FILE --out x", "--out is for exact-match, not for perplexity"),
        ("exact-match --data FILE --max-length 9", "--max-length is for perplexity"),
        ("exact-match --data FILE", "exact match compares answers, and no example ends with one"),
        ("exact-match --data FILE --chat-template nope", "compares answers"),
        ("perplexity --data FILE --chat-template nope", "no chat template nope"),
        ("perplexity --data FILE --task jsonl --chat-template alpaca", "x.jsonl:1: no key"),
        ("perplexity --data FILE --split test", "--split is for a folder"),
        ("perplexity --data . --split no", "task chat has no split 'no'"),
        ("perplexity --data FILE --chat-template chatml", "for conversations, and these are whole"),
        ("perplexity --data FILE --set lora.r=2", "what can be set here is data.NAME=VALUE, with"),
        ("perplexity --data FILE --set data.train_limit=2", "with NAME one of template, separ"),
        ("perplexity --data FILE --set data.train_on=no", "data.train_on"),
        ("perplexity --data FILE --set data", "write KEY=VALUE"),
        ("e2e --refs x --hyps y --set data.train_on=all", "--set is for perplexity and exact"),
        ("e2e --data FILE", "--data is for perplexity and exact-match"),
        ("e2e --refs x", "e2e is scored by --refs and --hyps; give both"),
        ("perplexty --data FILE", "no task 'perplexty'; did you mean perplexity?"),
    ],
)
def test_mistakes(model, tmp_path, capsys, argv, said):
    file = write(tmp_path / "x.jsonl", [{"text": "a b"}])
    argv = argv.replace("FILE", str(file)).split()
    own = ["--model", str(model)] if argv[0] in ("perplexity", "exact-match") else []
    assert main(["evaluate", *argv, *own]) == (2 if said else 0)
    assert said in capsys.readouterr().err
