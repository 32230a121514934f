"""BoolQ: two layouts, one prompt; conversion; templates and cut prompts."""

from __future__ import annotations

import hashlib
import json

import pytest

from jlora.data.batches import Example
from jlora.data.tasks import get_task
from jlora.data.tasks.boolq import TEMPLATES, Row, convert_file, convert_rows, read_rows
from jlora.system.errors import UserError

BOOLQ = get_task("boolq")
ROWS = [
    Row("is it wet", "Water", "Water -- as ice -- is {cold}.", True),
    Row("can cows fly", "Käse", "No.", False),
]
ORIGINAL = [
    {"question": "is it wet", "title": "Water", "answer": True, "passage": ROWS[0].passage},
    {"question": "can cows fly", "title": "Käse", "answer": False, "passage": "No."},
]
SUPERGLUE = [
    {"question": "is it wet", "passage": f"Water -- {ROWS[0].passage}", "idx": 0, "label": True},
    {"question": "can cows fly", "passage": "Käse -- No.", "idx": 1, "label": False},
]
# sha256 of the official dev.jsonl of either release.
OFFICIAL = {
    "original": "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
    "superglue": "0c86a5045886e5795fe9052003873f7d94b88ed3028a33007c51d99e44fd66d9",
}


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def dev(shared_data):
    path = shared_data / "boolq" / "dev.jsonl"
    if not path.is_file():
        pytest.skip("BoolQ is not in the development data")
    return path


@pytest.mark.parametrize("rows", [ORIGINAL, SUPERGLUE], ids=["original", "superglue"])
def test_both_layouts_give_the_same_prompts(tmp_path, rows):
    path = write(tmp_path, rows)
    assert read_rows(path) == ROWS
    assert BOOLQ.read(path, "replication") == [
        Example("Water -- as ice -- is {cold}. is it wet?", "true", keep=11),
        Example("No. can cows fly?", "false", keep=14),
    ]
    jlora = BOOLQ.read(path)[1]
    assert jlora == Example("No.\nQuestion: can cows fly?\nAnswer:", "false", keep=32)
    assert jlora.prompt[-jlora.keep :] == "\nQuestion: can cows fly?\nAnswer:"
    assert {each.completion for each in BOOLQ.read(path)} == set(BOOLQ.choices)


@pytest.mark.parametrize(
    ("template", "prompt", "kept"),
    [
        ("{title}: {passage} -- {question}", "Käse: No. -- can cows fly", " -- can cows fly"),
        ("{question}? {passage}", "can cows fly? No.", ""),
        ("{passage}{{}} {question}", "No.{} can cows fly", "{} can cows fly"),
        ("{question}?", "can cows fly?", "can cows fly?"),
    ],
)
def test_templates_of_ones_own(tmp_path, template, prompt, kept):
    example = BOOLQ.read(write(tmp_path, ORIGINAL), template)[1]
    assert (example.prompt, example.keep) == (prompt, len(kept))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{passage}", r"has no \{question\}"),
        ("{passage} {passage} {question}", "has two passages"),
        ("{passage} {qestion}", "its fields may be passage, question, title"),
        ("{passage.__class__} {question}", "its fields may be"),
        ("{passage!r} {question}", "its fields may be"),
        ("{passage:>9} {question}", "its fields may be"),
        ("{} {question}", "its fields may be"),
        ("{passage} {question", "prompt template"),
        ("jlor", "no prompt template 'jlor'"),
    ],
)
def test_bad_templates(tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        BOOLQ.read(write(tmp_path, ORIGINAL), template)


def test_conversion_both_ways(tmp_path):
    assert convert_rows(ROWS, "original") == ORIGINAL
    assert convert_rows(ROWS, "superglue") == SUPERGLUE
    assert [list(row) for row in convert_rows(ROWS, "original")] == [list(ORIGINAL[0])] * 2
    bare = [Row("q", "", "p", None)]
    assert convert_rows(bare, "superglue") == [{"question": "q", "passage": "p", "idx": 0}]
    assert convert_rows(bare, "original") == [{"question": "q", "title": "", "passage": "p"}]
    with pytest.raises(UserError, match="no layout 'glue' of BoolQ; there are superglue, original"):
        convert_rows(ROWS, "glue")
    for to in ("original", "superglue"):
        assert convert_file(write(tmp_path, SUPERGLUE), tmp_path / f"{to}.jsonl", to) == 2
        assert read_rows(tmp_path / f"{to}.jsonl") == ROWS
    with pytest.raises(UserError, match="original.jsonl is there already"):
        convert_file(write(tmp_path, ORIGINAL), tmp_path / "original.jsonl", "original")


def test_the_releases_become_each_other_byte_for_byte(dev, tmp_path):
    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    if digest(dev) != OFFICIAL["superglue"]:
        pytest.skip("the development data's dev.jsonl is not SuperGLUE's")
    for path, to in ((dev, "original"), (tmp_path / "original.jsonl", "superglue")):
        convert_file(path, tmp_path / f"{to}.jsonl", to)
        assert digest(tmp_path / f"{to}.jsonl") == OFFICIAL[to]


def test_counts_of_the_real_data(dev, shared_data):
    whole = BOOLQ.read(dev)
    assert len(whole) == len({each.prompt for each in whole}) == 3270
    parts = [BOOLQ.load(shared_data, split) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [2400, 400, 470]
    # The parts are the original layout, the whole is SuperGLUE's.
    together = [each for part in parts for each in part]
    assert sorted(together, key=str) == sorted(whole, key=str)
    assert sum(each.completion == "true" for each in whole) == 2033
    assert all(each.prompt.endswith("?\nAnswer:") for each in whole)


def test_exported_labels_and_hidden_answers(tmp_path):
    numbers = [{**SUPERGLUE[0], "label": 1}, {**SUPERGLUE[1], "label": 0}]
    assert read_rows(write(tmp_path, numbers)) == ROWS
    hidden = [{**SUPERGLUE[0], "label": -1}, SUPERGLUE[1]]
    assert [row.answer for row in read_rows(write(tmp_path, hidden))] == [None, False]
    for rows in (hidden[:1], [{k: v for k, v in ORIGINAL[0].items() if k != "answer"}]):
        with pytest.raises(UserError, match="rows.jsonl:1: no answer"):
            BOOLQ.read(write(tmp_path, rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**ORIGINAL[1], "answer": "false"},
            ":2: the answer is 'false', not true or false; write it without quotes",
        ),
        ({**ORIGINAL[1], "answer": 2}, ":2: the answer is 2"),
        ({**ORIGINAL[1], "answer": 1.0}, ":2: the answer is 1.0"),
        ({**ORIGINAL[1], "question": " "}, ":2: the question is empty"),
        ({**ORIGINAL[1], "passage": ""}, ":2: the passage is empty"),
        ({**ORIGINAL[1], "title": None}, ":2: 'title' is null, not a string"),
        ({"question": "q", "answer": True}, ":2: no key 'passage'"),
        (SUPERGLUE[1], ":2: the original layout .* and SuperGLUE's .* in one file"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    with pytest.raises(UserError, match=f"rows.jsonl{message}"):
        BOOLQ.read(write(tmp_path, [ORIGINAL[0], row]))


def test_the_releases_development_set_serves_as_test_set(tmp_path):
    write(tmp_path, ORIGINAL, "train.jsonl")
    write(tmp_path, ORIGINAL, "dev.jsonl")
    assert BOOLQ.find_data(tmp_path, "test").name == "dev.jsonl"
    with pytest.raises(UserError, match="no valid data for task boolq"):
        BOOLQ.find_data(tmp_path, "valid")


def test_the_first_template_is_the_default():
    assert list(TEMPLATES) == ["jlora", "replication"]
