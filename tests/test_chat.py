"""`jlora chat` and what `jlora generate` does with a chat template, on a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from tiny_models import randomise_adapter

import jlora
from jlora.cli import chat as command
from jlora.cli import main
from jlora.data.batches import NO_SEPARATOR
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.runs.adapter_file import AdapterFile
from jlora.runs.chat import Talk
from jlora.runs.data_config import DataConfig
from jlora.runs.form import find_form
from jlora.system.errors import UserError

USER = "name : Blue Spice | food : Italian"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[str]:
    """Two adapters on ``model``, made by nobody's run."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("adapter") / f"a{seed}"
        config = jlora.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"])
        tuned = jlora.get_peft_model(jlora.load(model), config)
        randomise_adapter(tuned, seed, 0.3).save_pretrained(folder)
        found.append(str(folder))
    return found


def talk(model, adapter=None, tokens=8, **settings) -> Talk:
    adapter = adapter and AdapterFile(Path(adapter))
    config = GenerateConfig((), tokens)
    return Talk(str(model), adapter, config, precision="plain", **settings)


def expected(model, messages, tokens=8, adapter=None, ends=(401, 0)) -> str:
    """The answer to messages by a model that is loaded anew, from ids written out here."""
    own = jlora.load(model)
    if adapter is not None:
        own = AdapterFile(Path(adapter)).attach(own)
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in messages)
    ids = own.tokenizer.encode(text + "<|im_start|>assistant\n")
    own.eval()
    (found,) = generate(own, [ids], GenerateConfig(ends, tokens))
    return own.tokenizer.decode(found.text_ids)


# A conversation ----------------------------------------------------------------------------------


def test_every_turn_is_answered_as_the_whole_conversation_is(model):
    one, said = talk(model, tokens=4), []
    for text in ("food", "a", "b"):
        said.append(("user", text))
        answer = "".join(one.say(text))
        assert answer == expected(model, said, 4)
        said.append(("assistant", answer))
    assert [(each["role"], each["content"]) for each in one.messages] == said
    assert one.cut
    one.set_system("brief")
    asked = [("system", "brief"), *said, ("user", "x")]
    assert "".join(one.say("x")) == expected(model, asked, 4)
    one.reset()
    assert one.messages == [] and not one.cut
    one.set_system(None)
    assert "".join(one.say("food")) == expected(model, said[:1], 4)


def test_adapters_change_on_the_way(model, adapters):
    one, said = talk(model, tokens=4), []
    answers = set()
    for adapter in (None, *adapters, adapters[0], None):
        one.set_adapter(adapter and AdapterFile(Path(adapter)))
        assert one.adapter == (adapter and Path(adapter))
        if len(said) == 4:
            one.reset()
            said = []
        said.append(("user", "a"))
        answers.add("".join(one.say("a")))
        assert one.messages[-1]["content"] == expected(model, said, 4, adapter)
        said.append(("assistant", one.messages[-1]["content"]))
    assert len(answers) > 2
    with pytest.raises(UserError, match="nowhere is no folder"):
        one.set_adapter(AdapterFile(Path("nowhere")))
    assert one.adapter is None
    assert "".join(one.say("x")) == expected(model, [*said, ("user", "x")], 4)


def test_an_answer_that_ends_with_its_last_token_is_not_cut(model):
    whole = "".join((one := talk(model, tokens=3)).say("food"))
    assert whole and one.cut
    config = GenerateConfig((), 3, stops=(whole,))  # a stop text
    one = Talk(str(model), None, config, precision="plain")
    assert "".join(one.say("food")) == "" and not one.cut
    ids = jlora.load(model).tokenizer.encode(whole)
    one = talk(model, tokens=1, end_ids=ids[:1])  # an end token
    assert "".join(one.say("food")) == "" and not one.cut
    one = talk(model, tokens=1)
    assert "".join(one.say("food")) and one.cut


def test_an_answer_that_is_left_counts_as_far_as_it_came(model):
    one = talk(model, tokens=20)
    whole = expected(model, [("user", USER)], tokens=20)
    asked = iter([False, False, True, True])
    part = "".join(one.say(USER, lambda: next(asked)))
    assert whole.startswith(part) and 0 < len(part) < len(whole)
    assert one.messages[-1]["content"] == part and not one.cut
    said = [("user", USER), ("assistant", part), ("user", "x")]
    assert "".join(one.say("x")) == expected(model, said, tokens=20)


def test_a_conversation_that_is_full(model):
    one = talk(model, tokens=400)
    "".join(one.say(USER))  # as many tokens as there is room for
    before = list(one.messages)
    assert one.cut
    with pytest.raises(UserError, match=r"conversation has \d+ tokens, .* context is 128; begin"):
        "".join(one.say(USER))
    assert one.messages == before


def test_a_model_that_cannot_talk_says_what_can_be_done(tiny_model, tiny_run):
    with pytest.raises(UserError, match="has no chat template; choose one with --chat-template"):
        talk(tiny_model)
    with pytest.raises(UserError, match="was trained for a task and not to talk"):
        talk(tiny_model, tiny_run)
    one = talk(tiny_model, tiny_run, choice="chatml")
    assert one._config.stops == ("<|im_end|>",)  # which is no token of this model
    assert isinstance("".join(one.say("x")), str)


# The command -------------------------------------------------------------------------------------


def chat(capsys, monkeypatch, lines, *argv):
    """`jlora chat` with lines piped in: the exit code, what it wrote and what it said."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    arguments = ["chat", *argv, "--precision", "plain", "--max-new-tokens", "8"]
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_a_pipe(model, adapters, capsys, monkeypatch):
    lines = f"\ufeff{USER}\r\n\n/system brief\n/adapter {adapters[0]}\na \\\nb\n/reset\n/adapter\n"
    lines += "/adapter off\n/system\n x\n/help\n/exit\nnever\n"
    code, out, said = chat(capsys, monkeypatch, lines, model)
    system = ("system", "brief")
    first = expected(model, [("user", USER)])
    turns = [
        first,
        expected(
            model,
            [system, ("user", USER), ("assistant", first), ("user", "a \nb")],
            adapter=adapters[0],
        ),
        expected(model, [("user", " x")]),
    ]
    assert code == 0
    assert out == "".join(turn.strip() + "\n" for turn in turns)
    for part in ("system prompt: brief", f"adapter: {adapters[0]}", "adapter: none", "/reset  ",
                 "system prompt: as the template has it", "was cut at its largest"):  # fmt: skip
        assert part in said
    run_or_adapter = chat(capsys, monkeypatch, USER, adapters[1], "--system-prompt", "brief")
    assert run_or_adapter[0] == 0 and f"names {model} as the base model" in run_or_adapter[2]
    code, out, _ = chat(capsys, monkeypatch, USER, model, "--adapter", adapters[1])
    assert out.strip() == expected(model, [("user", USER)], adapter=adapters[1]).strip()


@pytest.mark.parametrize(
    ("lines", "argv", "said"),
    [
        ("x\n/nothing\ny\n", [], "no command /nothing; /help shows them"),
        ("/adapter nowhere\n", [], "nowhere is no folder"),
        ("x " * 300, [], "begin a new one (/reset)"),
        ("\udcff\n", [], "line 1 of standard input is not UTF-8"),
        ("", ["--top-p", "0.5"], "--top-p is for --method sample, not greedy (--temp above 0"),
        ("", ["--temp", "-1"], "temperature is -1.0, but must be >= 0"),
        ("", ["--stop", ""], "stops is [''], but must be texts of a character or more"),
        ("", ["--adapter", "nowhere"], "nowhere is no folder"),
        ("", ["--end-id", "402"], "end tokens 402: the model's vocabulary has 402 words"),
        ("", ["--lora-alpha", "1"], "--lora-alpha is for an --adapter"),
        ("", ["--chat-template", "nope"], "no chat template nope"),
    ],
)
def test_mistakes_in_a_pipe_end_it(model, capsys, monkeypatch, lines, argv, said):
    code, _, err = chat(capsys, monkeypatch, lines, model, *argv)
    assert code == 2
    assert said in err.splitlines()[-1]


def test_no_model_and_an_adapter_twice(capsys, monkeypatch, adapters):
    assert "no model given" in chat(capsys, monkeypatch, "")[2]
    said = chat(capsys, monkeypatch, "", adapters[0], "--adapter", adapters[1])[2]
    assert "is an adapter itself" in said


def test_the_model_may_be_an_option(model, capsys, monkeypatch):
    plain = chat(capsys, monkeypatch, "food\n", model)
    assert chat(capsys, monkeypatch, "food\n", "--model", model) == plain and plain[0] == 0
    assert "give one of the two" in chat(capsys, monkeypatch, "", model, "--model", model)[2]


class Typed:
    """Somebody at the keyboard: what is typed, or raised, line by line."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, prompt):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


class Endless:
    """A talk whose answers end when they are left, Ctrl-C being pressed in the middle."""

    def __init__(self, presses=1):
        self.presses, self.cut, self.chat, self.said = presses, False, self, []
        self.system = None

    def say(self, text, leave):
        if text == "bad":
            raise UserError("too  bad")
        yield "word"
        for _ in range(self.presses):
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            if leave():
                self.said.append(text)
                return
            yield " more"
        pytest.fail("nobody left")


def test_control_c_stops_the_answer_alone(capsys, monkeypatch):
    monkeypatch.setattr(command, "ask", Typed("a", KeyboardInterrupt(), "/no", "bad", "b"))
    before, one = signal.getsignal(signal.SIGINT), Endless()
    assert command.converse(one, interactive=True) == 0
    assert one.said == ["a", "b"]
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert out.count("word") == 2
    for part in ("Ctrl-D or /exit ends", "error: no command /no", "error: too bad"):
        assert part in err  # and it went on


def test_a_second_control_c_ends_the_program(capsys, monkeypatch):
    monkeypatch.setattr(command, "ask", Typed("a", "b"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        command.converse(Endless(presses=2), interactive=True)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal(model, popen):
    """Through a pseudo-terminal: the prompt, an answer, Ctrl-C while nothing is said, Ctrl-D."""
    ours, theirs = pty.openpty()
    with contextlib.closing(Terminal(ours)) as terminal:
        try:
            argv = f"-m jlora chat {model} --precision plain --max-tokens 8".split()
            process = popen(
                [sys.executable, *argv], stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
                env={**os.environ, "TERM": "dumb"},
            )  # fmt: skip
        finally:
            os.close(theirs)
        terminal.until(b"> ")
        os.write(ours, USER.encode() + b"\n")
        shown = terminal.until(b"> ").decode().replace(USER, "", 1).removesuffix("> ")
        assert shown.split() == expected(model, [("user", USER)]).split()
        process.send_signal(signal.SIGINT)
        terminal.until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
        said = process.stderr.read().decode()
        assert "type a message" in said and "Ctrl-D or /exit ends the conversation" in said


class Terminal:
    """What a program shows on a pseudo-terminal."""

    def __init__(self, ours: int):
        self.ours = ours

    def until(self, end: bytes) -> bytes:
        shown = b""
        while not shown.endswith(end):
            ready, _, _ = select.select([self.ours], [], [], 120)
            assert ready, shown
            shown += os.read(self.ours, 4096)
        return shown

    def close(self) -> None:
        os.close(self.ours)


# generate ----------------------------------------------------------------------------------------


def answers(capsys, *argv) -> str:
    arguments = ["generate", *argv, "--precision", "plain"]
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_template_is_applied_where_there_is_one(model, adapters, capsys, tmp_path):
    ask = ["--model", model, "--prompt", USER, "--max-tokens", 8]
    answer = expected(model, [("user", USER)]).strip()
    assert answers(capsys, *ask) == answer + "\n"
    assert answers(capsys, *ask, "--prompt", USER) == 2 * (answer + "\n")
    assert answers(capsys, *ask, "--method", "beam", "--beams", 1, "--no-repeat-ngram-size", 0) == (
        answer + "\n"
    )
    out = tmp_path / "p.jsonl"
    answers(capsys, *ask, "--out", out)
    row = json.loads(out.read_text())
    assert (row["prompt"], row["prediction"]) == (USER, answer)
    system = expected(model, [("system", "brief"), ("user", USER)]).strip()
    assert answers(capsys, *ask, "--system-prompt", "brief") == system + "\n"
    tuned = expected(model, [("user", USER)], adapter=adapters[0]).strip()
    assert answers(capsys, *ask, "--adapter", adapters[0]) == tuned + "\n"
    stop = answer[2:4]
    for more in ([], ["--out", out]):  # as it streams, and afterwards
        found = answers(capsys, *ask, "--stop", stop, *more)
        found = json.loads(out.read_text())["prediction"] if more else found.removesuffix("\n")
        assert found == answer.partition(stop)[0].strip()
    drawn = [
        answers(capsys, *ask, "--temp", 1.5, "--min-p", 0.01, "--seed", seed) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_adapter_folder_names_its_base(model, adapters, capsys, monkeypatch, tmp_path):
    """It was made by nobody's run, and is found by what PEFT's settings say."""
    config = json.loads((Path(adapters[0]) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    tuned = expected(model, [("user", USER)], adapter=adapters[0]).strip()
    ask = ["generate", "--prompt", USER, "--max-tokens", "8", "--precision", "plain"]
    assert main([*ask, "--adapter", adapters[0]]) == 0
    out, err = capsys.readouterr()
    assert out == tuned + "\n"
    assert err.count(f"names {model} as the base model, which is taken; --model takes") == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{USER}\n"))
    assert main(["chat", adapters[0], "--max-tokens", "8", "--precision", "plain"]) == 0
    assert capsys.readouterr().out == tuned + "\n"
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"prompt": USER, "completion": tuned}) + "\n")
    argv = ["evaluate", "exact-match", "--adapter", adapters[0], "--data", str(file), "--json"]
    assert main([*argv, "--max-tokens", "8", "--precision", "plain"]) == 0
    assert json.loads(capsys.readouterr().out)["matches"] == 1


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("../gone/model", "names '../gone/model' as the base model, which is not here; give"),
        (None, "no --model given"),
        (7, "no --model given"),
    ],
)
def test_an_adapter_folder_whose_base_is_not_here(adapters, capsys, tmp_path, base, said):
    folder = shutil.copytree(adapters[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for verb in (["chat", str(folder)], ["generate", "--adapter", str(folder), "--prompt", "x"]):
        assert main(verb) == 2
        assert said in capsys.readouterr().err


def test_chat_template_none(model, tiny_model, capsys, tmp_path):
    """As if the model had none: a text goes on, pairs have the separator, nobody can talk."""
    ask = ["--model", model, "--prompt", USER, "--max-tokens", 8]
    raw = answers(capsys, *ask, "--raw")
    assert answers(capsys, *ask, "--chat-template", "none") == raw != answers(capsys, *ask)
    assert (
        main(["generate", *map(str, ask), "--chat-template", "none", "--system-prompt", "x"]) == 2
    )
    assert "--system-prompt is for a chat template, and" in capsys.readouterr().err
    assert main(["chat", str(model), "--chat-template", "none"]) == 2
    assert "a conversation needs a template" in capsys.readouterr().err
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": USER, "completion": "a"}) + "\n")
    found = []
    for name, more in ((model, ["--chat-template", "none"]), (tiny_model, [])):
        argv = ["evaluate", "perplexity", "--model", str(name), "--data", str(file), *more]
        assert main([*argv, "--precision", "plain", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert found[0] == found[1]


def test_the_form_is_decided_once(model, tiny_model, tiny_run, adapters, tmp_path):
    """`generate` and `evaluate` ask alike."""
    run, made = AdapterFile(tiny_run), AdapterFile(Path(adapters[0]))
    chat, task = DataConfig(task="chat"), DataConfig(task="jsonl", separator_id=7)
    texts = replace(chat, separator_id=NO_SEPARATOR)

    def form(*arguments, **settings):
        found = find_form(*arguments, **settings)
        assert not (found.chat and found.plain)
        kind = "chat" if found.chat else "plain" if found.plain else found.separator_id
        return kind, found.of_task

    name, plain = str(model), str(tiny_model)
    assert form(name, None) == form(name, None, data=chat) == form(name, made) == ("chat", False)
    assert form(name, None, raw=True) == form(name, made, raw=True) == ("plain", False)
    assert form(name, None, data=chat, texts=True) == ("plain", False)
    assert form(name, run) == form(None, run) == (None, True)  # as the run says
    assert form(name, run, choice="chatml") == ("chat", False)
    assert form(name, None, separator_id=3) == (3, True)
    assert form(name, None, data=task) == (7, True)
    assert form(name, None, data=task, raw=True) == (NO_SEPARATOR, True)
    assert form(plain, None) == ("plain", False)
    assert form(plain, made) == (None, True)
    assert form(plain, None, data=chat) == (None, False)  # pairs, as they are trained
    assert form(plain, None, data=texts) == ("plain", False)


def test_without_a_template_a_text_goes_on(model, tiny_model, capsys, monkeypatch):
    own = jlora.load(tiny_model)
    own.eval()
    (found,) = generate(own, [own.tokenizer.encode(USER)], GenerateConfig((0,), 8))
    text = own.tokenizer.decode(found.text_ids).strip()
    ask = ["--prompt", USER, "--max-tokens", 8]
    assert answers(capsys, "--model", tiny_model, *ask) == text + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\ufeff{USER}\n"))
    assert answers(capsys, "--model", tiny_model, "--prompt", "-", *ask[2:]) == text + "\n"
    own = jlora.load(model)
    own.eval()
    (found,) = generate(own, [own.tokenizer.encode(USER)], GenerateConfig((401, 0), 8))
    raw = answers(capsys, "--model", model, *ask, "--ignore-chat-template")
    assert raw == own.tokenizer.decode(found.text_ids).strip() + "\n"
    # As many tokens as there is room for, unless a number is asked for.
    assert answers(capsys, "--model", model, "--prompt", USER)


def test_a_task_s_run_is_asked_as_before(model, tiny_run, capsys, tmp_path, monkeypatch):
    """Beams and separator, though the model has a template; also once it is merged."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    base = shutil.copytree(tiny.write_model(tmp_path / "base"), tmp_path / "chat")
    settings = {"eos_token": tiny.END, "chat_template": tiny.CHATML}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["model"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    ask = ["--prompt", USER, "--max-new-tokens", 6]
    plain = answers(capsys, "--adapter", tiny_run, *ask)
    assert answers(capsys, "--adapter", run, *ask) == plain
    assert main(["merge", str(base), str(run), str(tmp_path / "merged")]) == 0
    assert answers(capsys, "--model", tmp_path / "merged", *ask) == plain
    assert answers(capsys, "--model", base, *ask, "--separator-id", 0, "--adapter", run) == plain
    assert main(["generate", "--adapter", str(run), *map(str, ask), "--system-prompt", "x"]) == 2
    assert "--system-prompt is for a chat template, which a task has not" in capsys.readouterr().err


def test_data_of_conversations_are_asked_by_the_template(model, capsys, tmp_path):
    """Not as a task's inputs are, with a separator and beams; all turns count."""
    turns = [("user", "food"), ("assistant", "a b"), ("user", "name : A")]
    messages = [{"role": role, "content": said} for role, said in turns]
    file = tmp_path / "test.jsonl"
    row = {"messages": [*messages, {"role": "assistant", "content": "A ."}]}
    file.write_text(json.dumps(row) + "\n")
    ask = ["--model", model, "--task", "chat", "--data", file, "--max-tokens", 4]
    assert answers(capsys, *ask) == expected(model, turns, tokens=4).strip() + "\n"
    refused = ["generate", *map(str, ask), "--system-prompt", "x"]
    assert main(refused) == 2
    assert "--system-prompt is for --prompt" in capsys.readouterr().err


def test_a_conversation_needs_a_template(tiny_model, capsys, tmp_path):
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    for argv in (["generate", "--task", "chat"], ["evaluate", "exact-match"]):
        assert main([*argv, "--model", str(tiny_model), "--data", str(file)]) == 2
        said = capsys.readouterr().err
        assert f"{file}:1: a conversation, and there is no chat template" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--temp 0 --method sample", "--temp 0 takes the likeliest token and is not for"),
        ("--temp 0 --beams 2", "--beams is for --method beam, not greedy"),
        ("--temp 0.5 --beams 2", "--beams is for --method beam, not sample"),
        ("--method greedy --temp 0.5", "--temperature is for --method sample, not greedy"),
        ("--temp 0 --min-p 0.1", "--min-p is for --method sample, not greedy"),
        ("--beams 2 --stop x", "--stop is for --method greedy or sample, not beam"),
        ("--raw --system-prompt x", "--system-prompt is for a chat template, which --raw leaves"),
        ("--raw --chat-template chatml", "--chat-template is for a chat template, which --raw"),
        ("--separator-id 0 --system-prompt x", "is for a chat template, which a task has not"),
        ("--beams 2 --chat-template alpaca", ""),
    ],
)
def test_flags_that_do_not_go_together(model, capsys, options, said):
    argv = [
        "generate",
        "--model",
        str(model),
        "--prompt",
        "x",
        "--max-tokens",
        "2",
        *options.split(),
    ]
    assert main([*argv, "--precision", "plain"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompt", "--system-prompt", "--stop"])
def test_bytes_of_another_encoding(capsys, option):
    with pytest.raises(SystemExit):
        main(["generate", "--model", "m", "--prompt", "x", option, "caf\udce9"])
    assert "'caf\\udce9' is not UTF-8; set the terminal to it" in capsys.readouterr().err


def test_a_template_s_end_that_is_no_token_and_beams(tiny_model, capsys):
    argv = [
        "--model",
        str(tiny_model),
        "--prompt",
        "x",
        "--chat-template",
        "chatml",
        "--beams",
        "2",
    ]
    assert main(["generate", *argv]) == 2
    assert "ends an answer by the text '<|im_end|>', at which beam" in capsys.readouterr().err


# The demo ----------------------------------------------------------------------------------------


def test_the_demo_ends_in_a_conversation(model, tmp_path, capsys, monkeypatch):
    from jlora.cli import demo
    from jlora.runs.recipe import load_recipe

    settings = [
        f"model={model}", "train.steps=2", "lora.r=2", "decode.max_new_tokens=4",
        "precision=plain", "train.max_length=120",
    ]  # fmt: skip
    monkeypatch.setattr(demo, "load_recipe", lambda path: load_recipe(path, settings))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who bakes?\n/adapter\n"))
    run = tmp_path / "demo"
    assert main(["demo", "--chat", "--out", str(run)]) == 0
    out, said = capsys.readouterr()
    assert out.count("before:") == out.count("now:") == 4
    assert f"jlora chat {run}" in out and f"adapter: {run}" in said
    learned = (tmp_path / "demo-data" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in learned]
    asked = {message["content"] for row in rows for message in row["messages"]}
    lines = out.splitlines()
    shown = {line for line, after in zip(lines, lines[1:]) if after.startswith("  before:")}
    assert len(rows) == 72 and len(shown) == 4 and not shown & asked
    assert main(["demo", "--chat", "--data", "x"]) == 2


def test_a_run_keeps_its_template_and_so_does_what_is_merged(
    tiny_model, tmp_path, capsys, monkeypatch
):
    """Trained by ChatML on a model that has neither a template nor its tokens."""
    rows = [{"prompt": f"name : {name}", "completion": f"{name} ."} for name in "ABC"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, merged = tmp_path / "run", tmp_path / "merged"
    argv = f"finetune --model {tiny_model} --data {tmp_path / 'train.jsonl'} --out {run} "
    argv += "--chat-template chatml --rank 2 --lr 1e-2 --steps 3 --precision plain"
    assert main(argv.split()) == 0
    assert f"try it: jlora chat {run}" in capsys.readouterr().out
    assert main(["merge", str(tiny_model), str(run), str(merged)]) == 0
    said = [chat(capsys, monkeypatch, "name : A\n", model)[1] for model in (run, merged)]
    ask = ["--prompt", "name : A", "--max-tokens", 8]
    said += [answers(capsys, *each, *ask) for each in (["--adapter", run], ["--model", merged])]
    assert len(set(said)) == 1 and said[0].strip()
    # A run of whole texts goes on with texts.
    (tmp_path / "text.jsonl").write_text('{"text": "name : A is there ."}\n')
    argv = f"finetune --model {tiny_model} --data {tmp_path / 'text.jsonl'} --out {tmp_path / 't'} "
    assert main((argv + "--rank 2 --steps 1 --precision plain").split()) == 0
    assert f"jlora generate --adapter {tmp_path / 't'}" in capsys.readouterr().out
    plain = answers(capsys, "--adapter", tmp_path / "t", *ask)
    assert plain == answers(capsys, "--adapter", tmp_path / "t", *ask, "--raw")
