"""Every reader of text takes a byte order mark and Windows line ends, and names other encodings."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from jlora.data.readers import csv_rows, json_document, json_lines, text_lines
from jlora.data.tasks import get_task
from jlora.data.tokenizer import Tokenizer
from jlora.decoding.predictions import read_predictions
from jlora.metrics import evaluate, read_answers, read_hypotheses, read_references
from jlora.report.runs import read_config, read_scores
from jlora.runs.recipe import load_recipe
from jlora.runs.sweep import file_cases
from jlora.system.errors import UserError, kind_of
from jlora.system.files import read_text
from jlora.system.json_files import read_object
from jlora.system.text import decode_text, lines_of

PAIR = '{"prompt": "name : Café", "completion": "one\u2028two"}\n'
WEBNLG = {"category": "Food", "modifiedtripleset": [], "lexicalisations": []}
WEBNLG["modifiedtripleset"].append({"subject": "a", "property": "b", "object": "c\u2028d"})
WEBNLG["lexicalisations"].append({"lex": "Café.", "comment": "good"})


def vocabulary(path: Path) -> list[int]:
    """GPT-2's older pair of files; the file under test is one, the other is beside it."""
    others = {
        "vocab.json": json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}),
        "merges.txt": "#version: 0.2\na b\n",
    }
    for name in set(others) - {path.name}:
        (path.parent / name).write_text(others[name])
    return Tokenizer.from_folder(path.parent).encode("abba")


def chat_template(path: Path) -> str:
    vocabulary(path)
    return Tokenizer.from_folder(path.parent).chat_template.replace("\r\n", "\n")


def read_json(path: Path) -> dict:
    return read_object(path, "fix it")


READERS = {
    "text lines": ("a.txt", "a\n\nCafé\u2028b\n", lambda path: list(text_lines(path))),
    "hypotheses": ("a.txt", "a b\n\nCafé\u2028b\n", read_hypotheses),
    "references": ("a.txt", "a b\u2028c\nd\n\nCafé\n", read_references),
    "table of references": ("a.csv", 'mr,ref\nx,"Café\u2028b, c"\nx,d\ny,e\n', read_references),
    "tsv of references": ("a.tsv", "mr\tref\nx\tCafé\u2028b\ny\te\n", read_references),
    "answers": ("a.txt", "true\nfalse\n", lambda path: read_answers(path, ("true", "false"))),
    "E2E text": ("a.txt", "name : A||Café\u2028b\n", get_task("e2e").read),
    "E2E table": ("a.csv", 'mr,ref\n"name[A], area[b]",Café\u2028b\n', get_task("e2e").read),
    "table": ("a.csv", "a,b\n1,Café\u2028b\n", lambda path: list(csv_rows(path, ("b",)))),
    "JSON Lines": ("a.jsonl", PAIR * 2, lambda path: list(json_lines(path))),
    "pairs": ("a.jsonl", PAIR * 2, get_task("jsonl").read),
    "BoolQ": (
        "a.jsonl", '{"question": "q", "passage": "a\u2028b", "answer": true}\n' * 2,
        get_task("boolq").read,
    ),
    "WebNLG": (
        "a.json", json.dumps({"entries": [{"1": WEBNLG}]}, indent=1), get_task("webnlg").read,
    ),
    "DART": (
        "a.json", '[{"tripleset": [["a", "b", "c"]],\n"annotations": [{"text": "x\u2028y"}]}]',
        get_task("dart").read,
    ),
    "JSON": ("a.json", '{"a":\n ["Café\u2028b"]}\n', json_document),
    "adapter_config.json": ("adapter_config.json", '{"r": 4,\n "x": "a\u2028b"}', read_json),
    "predictions": (
        "p.jsonl", '{"prompt": "a", "prediction": "Café\u2028b"}\n' * 2, read_predictions,
    ),
    "recipe": ("r.yaml", "model: Café\ndata:\n  task: restaurants\n", load_recipe),
    "cases of a sweep": ("s.yaml", "one: {lora.r: 8}\ntwo: {lora.r: 4}\n", file_cases),
    "run's settings": ("config.yaml", "a: Café\n", lambda path: read_config(path)[1]),
    "run's scores": ("scores.json", '{"after":\n {"BLEU": 0.5}}', read_scores),
    "vocab.json": (
        "vocab.json", '{"a": 0, "b": 1,\n"ab": 2, "<|endoftext|>": 3}\n', vocabulary,
    ),
    "merges.txt": ("merges.txt", "#version: 0.2\na b\n", vocabulary),
    "chat_template.jinja": ("chat_template.jinja", "{{ 1 }}\nCafé\u2028b", chat_template),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_marks_and_line_ends_and_names_utf16(tmp_path, name):
    file_name, content, read = READERS[name]

    def saved(folder: str, data: bytes) -> Path:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file_name).write_bytes(data)
        return tmp_path / folder / file_name

    expected = read(saved("plain", content.encode()))
    assert "\ufeff" not in str(expected)
    assert read(saved("mark", content.encode("utf-8-sig"))) == expected
    windows = content.replace("\n", "\r\n")
    assert read(saved("windows", windows.encode("utf-8-sig"))) == expected
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path = saved(encoding, content.encode(encoding))
        with pytest.raises(UserError, match=r":1: not UTF-8 text but .*UTF-16[LB]E"):
            read(path)


def test_u2028_ends_no_line_but_stays_in_the_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\u2028two\x0c\x85three\nfour\n", encoding="utf-8")
    assert read_hypotheses(path) == ["one\u2028two\x0c\x85three", "four"]
    assert read_references(path) == [["one\u2028two\x0c\x85three"], ["four"]]


def test_lines():
    assert lines_of("a\r\nb\n\nc\rd") == ["a", "b", "", "c\rd"]
    assert lines_of("a\n") == lines_of("a") == lines_of("a\r") == ["a"]
    assert lines_of("") == []
    assert lines_of("a\rb\r\rc") == ["a", "b", "", "c"]  # old Macintosh files
    assert lines_of("a\n\ufeffb\r\n") == ["a", "b"]  # two files joined, the second with a mark


def test_marks_change_no_score(tmp_path):
    for name, mark in (("plain", "utf-8"), ("mark", "utf-8-sig")):
        (tmp_path / name).write_text(
            "The Mill is a pub by the river .\nIt is not cheap .\n", encoding=mark
        )
    for hypotheses in ("plain", "mark"):
        for references in ("plain", "mark"):
            texts = read_hypotheses(tmp_path / hypotheses)
            groups = read_references(tmp_path / references)
            assert evaluate(["BLEU"], texts, groups)["BLEU"] == 1.0


CHINESE = "餐厅在河边，提供便宜的食物。\n第二行 hello\n"


@pytest.mark.parametrize(
    ("data", "message", "iconv"),
    [
        (CHINESE.encode("utf-16"), ":1: not UTF-8 text but UTF-16LE with a byte", "UTF-16"),
        ("\ufeffab".encode("utf-16-be"), ":1: not UTF-8 text but UTF-16BE with a byte", "UTF-16"),
        (CHINESE.encode("utf-16-le"), "what looks like UTF-16LE without", "UTF-16LE"),
        (b"\0a\0b\0\n", ":1: not UTF-8 text but what looks like UTF-16BE without", "UTF-16BE"),
        (CHINESE.encode("utf-32"), "UTF-32LE with", "UTF-32"),
        (CHINESE.encode("gbk"), ":1: not UTF-8 text (byte 0xb2); it looks like GB18030", "GB18030"),
        (("a\n" + CHINESE).encode("gb18030")[:-20], ":2: not UTF-8 text", "GB18030"),
        (b"fine\nCaf\xe9\n", ":2: not UTF-8 text (byte 0xe9); it looks like Latin-1", "LATIN1"),
        ("Größe, Fuß\n".encode("latin-1"), "it looks like Latin-1", "LATIN1"),
        ("naïve “x”\n".encode("cp1252"), "it looks like Windows-1252", "WINDOWS-1252"),
        ("привет мир\n".encode("cp1251"), "its encoding is not recognised", "ENCODING"),
    ],
)  # fmt: skip
def test_other_encodings_are_named_with_the_way_out(tmp_path, data, message, iconv):
    path = tmp_path / "a file.txt"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_text(path)
    assert f"{path}{message}" in str(caught.value) or message in str(caught.value)
    command = f"iconv -f {iconv} -t UTF-8 {shlex.quote(str(path))}"
    assert command in str(caught.value)
    if iconv != "ENCODING":
        # What the message says to do gives a file that is read.
        converted = subprocess.run(shlex.split(command), capture_output=True).stdout
        assert decode_text(converted, path)


def test_damaged_utf8_is_not_told_to_be_latin1():
    for data in (("é" * 40).encode() + b"\xff\n", (CHINESE * 3).encode() + b"\xe9\xa3"):
        with pytest.raises(UserError, match="UTF-8 with broken or cut off .*iconv -c -f UTF-8"):
            decode_text(data, "a.txt")


def test_binary_files_and_pointers():
    for data in (b"PK\x03\x04\xff\0\0\x01", b"\x1f\x8b\x08\0\xe9\xff\x01"):
        with pytest.raises(UserError, match="it looks like a binary file; give a text file"):
            decode_text(data, "a.txt")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    with pytest.raises(UserError, match="a.txt: a Git LFS pointer.*git lfs pull"):
        decode_text(pointer, "a.txt")


def test_zero_bytes_in_utf8_are_part_of_the_text():
    assert decode_text("name : A||b\0é\n".encode(), "a.txt") == "name : A||b\0é\n"


# What a file of another kind looks like -----------------------------------------------------------


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
FORM = r'write (one object a line, )?(rows )?as \{"prompt": "\.\.\.", "completion": "\.\.\."\}'


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("jsonl", "a.jsonl", '{"messages": []}\n',
         rf"1: no key 'prompt' \(found: messages\); this is a chat in messages.*reads; {FORM}"),
        ("jsonl", "a.jsonl", '{"conversations": []}\n', rf"a chat in ShareGPT's form.*{FORM}"),
        ("jsonl", "a.jsonl", '{"instruction": "a", "input": "", "output": "b"}\n',
         "an instruction in Alpaca's form"),
        ("jsonl", "a.jsonl", '{"text": "a"}\n', "a whole text without a prompt"),
        ("jsonl", "a.jsonl", "prompt,completion\na,b\n",
         rf"1: not JSON .*looks like a table with commas between the columns prompt, .*{FORM}"),
        ("jsonl", "a.jsonl", "prompt\tcompletion\na\tb\n", "tabs between the columns prompt"),
        ("jsonl", "a.jsonl", json.dumps(ROWS, indent=1),
         rf"1: not JSON .*JSON with one list over several lines \(`jq -c '.\[\]' .*{FORM}"),
        ("jsonl", "a.jsonl", json.dumps(ROWS), rf"1: a JSON list, not an object; {FORM}"),
        ("jsonl", "a.jsonl", json.dumps(ROWS[0], indent=1) + "\n" + json.dumps(ROWS[1], indent=1),
         r"JSON with one object over several lines \(`jq -c '.' "),
        ("jsonl", "a.jsonl", "a||b\n", r"looks like `context\|\|target` text"),
        ("jsonl", "a.jsonl", "<!DOCTYPE html>\n<p>Not found</p>\n", "a web page"),
        ("e2e", "a.txt", json.dumps(ROWS, indent=1),
         r"1: no `\|\|` in the line; the file looks like JSON with one list .*JSON Lines with"),
        ("e2e", "a.json", json.dumps(ROWS, indent=1),
         "not a file of E2E data; the file looks like JSON with one list .*read are: `context"),
        ("e2e", "a.csv", "mr;ref\na;b\n", r"no column mr or ref .*\(mr;ref\).*commas between"),
        ("e2e", "a.txt", '{"messages": []}\n', "this is a chat in messages"),
        ("webnlg", "a.json", "mr,ref\na,b\n",
         "a.json:1: not JSON .*a table with commas.*give the JSON of the WebNLG challenge"),
        ("webnlg", "a.json", '{"messages": 1}\n{"messages": 2}\n',
         "a.json:2: not JSON .*JSON Lines with the keys messages; give the JSON of the WebNLG"),
        ("webnlg", "a.json", "[]", r'no \{"entries": .* but a list; give the JSON of the WebNLG'),
        ("dart", "a.json", "{}", "no list of entries but an object; give DART's JSON"),
        ("boolq", "a.jsonl", '{"messages": []}\n',
         r'no key \'question\' .*a chat in messages.*as \{"question": "\.\.\.", "passage"'),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_told_from_damaged_ones(tmp_path, task, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        get_task(task).read(path)
    assert str(caught.value).startswith(f"{path}:")


def test_a_damaged_line_is_not_told_to_be_another_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a, "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    with pytest.raises(UserError) as caught:
        get_task("jsonl").read(path)
    assert "looks like" not in str(caught.value)


@pytest.mark.parametrize("read", [read_hypotheses, read_references])
def test_json_is_not_scored_as_text(tmp_path, read):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"prompt": "a", "prediction": "b"}\n')
    with pytest.raises(UserError, match="plain text.*not.* JSON"):
        read(path)


def test_kinds_of_values():
    values = {None: "null", True: "true", 3: "a number", 0.5: "a number", "x": "a string"}
    assert {value: kind_of(value) for value in values} == values
    assert (kind_of([]), kind_of(()), kind_of({})) == ("a list", "a list", "an object")
    assert kind_of(b"") == "of type bytes"
