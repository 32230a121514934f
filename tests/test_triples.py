"""WebNLG and DART: prepared as microsoft/LoRA's converters do."""

from __future__ import annotations

import json

import pytest

from jlora.data.batches import Example
from jlora.data.tasks import get_task
from jlora.system.errors import UserError

WEBNLG, DART = get_task("webnlg"), get_task("dart")


def text(lex, comment="good"):
    return {"comment": comment, "lang": "", "lex": lex, "xml_id": "Id1"}


def triple(subject, relation, value):
    return {"object": value, "property": relation, "subject": subject}


ENTRY = {
    "category": "Airport",
    "lexicalisations": [text("One."), text("Two. ", "toFix"), text(" Three. ")],
    "modifiedtripleset": [
        triple("Aarhus", "leaderName", "Jacob_Bundsgaard"),
        triple("Aarhus_Airport", "runwayLength", '"2702.0"'),
    ],
    "size": "2",
}
UNSEEN = {**ENTRY, "category": "Artist", "modifiedtripleset": [triple("A", "b", "C")]}
NO_TEXT = {**ENTRY, "lexicalisations": []}
TABLE = {
    "tripleset": [["Mars Hill", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "Café : X | Y"]],
    "subtree_was_extended": False,
    "annotations": [{"source": "mturk", "text": "One. "}, {"source": "e2e", "text": "two"}],
}


def webnlg_file(tmp_path, *entries, name="test.json", **dump):
    path = tmp_path / name
    numbered = [{str(number): entry} for number, entry in enumerate(entries, start=1)]
    path.write_text(json.dumps({"entries": numbered}, **dump), encoding="utf-8")
    return path


def dart_file(tmp_path, *entries):
    path = tmp_path / "dart.json"
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path


@pytest.mark.parametrize("indent", [None, 4])
def test_webnlg(tmp_path, indent):
    prompt = 'Aarhus : leaderName : Jacob_Bundsgaard | Aarhus_Airport : runwayLength : "2702.0"'
    path = webnlg_file(tmp_path, ENTRY, NO_TEXT, UNSEEN, indent=indent)
    assert WEBNLG.read(path) == [
        Example(prompt, "One.", "seen"),
        Example(prompt, " Three. ", "seen"),
        Example("A : b : C", "One.", "unseen"),
        Example("A : b : C", " Three. ", "unseen"),
    ]
    assert [group.part for group in WEBNLG.groups(WEBNLG.read(path))] == ["seen", "unseen"]


def test_dart(tmp_path):
    prompt = "Mars Hill : joined : 1973 | [TABLECONTEXT] : [title] : Café : X | Y"
    path = dart_file(tmp_path, TABLE)
    assert DART.read(path) == [Example(prompt, "One. "), Example(prompt, "two")]


@pytest.mark.parametrize("task", [WEBNLG, DART])
def test_pairs_are_read_too(tmp_path, task):
    line = '{"prompt": "a : b : c", "completion": "d", "part": "unseen"}\n'
    for name in ("test.jsonl", "test.json"):
        (tmp_path / name).write_text(line)
        assert task.read(tmp_path / name) == [Example("a : b : c", "d", "unseen")]
        assert task.find_data(tmp_path, "test") == tmp_path / name


def reference_rows(document):
    """The converters' rules once more, for whole files."""
    if isinstance(document, dict):
        seen = "Airport Astronaut Building City ComicsCharacter Food Monument SportsTeam "
        seen += "University WrittenWork"
        for number, entry in enumerate(document["entries"], start=1):
            entry = entry[str(number)]
            triples = [
                f"{t['subject']} : {t['property']} : {t['object']}"
                for t in entry["modifiedtripleset"]
            ]
            for each in entry["lexicalisations"]:
                if each["comment"] == "good":
                    yield " | ".join(triples), each["lex"], entry["category"] in seen.split()
    else:
        for entry in document:
            triples = [f"{s} : {r.lower()} : {o}" for s, r, o in entry["tripleset"]]
            for each in entry["annotations"]:
                yield " | ".join(triples), each["text"], None


@pytest.mark.parametrize(
    ("task", "rows", "inputs"),
    [(WEBNLG, 2258, 870), (DART, 6980, 2721)],
    ids=["webnlg", "dart"],
)
def test_the_development_parts(shared_data, task, rows, inputs):
    path = shared_data / task.name / "dev.json"
    if not path.is_file():
        pytest.skip(f"{task.name}'s development part is not in the development data")
    examples = task.load(shared_data, "valid")
    groups = task.groups(examples)
    assert (len(examples), len(groups)) == (rows, inputs)
    assert sum(len(group.references) for group in groups) == rows
    expected = list(reference_rows(json.loads(path.read_text(encoding="utf-8"))))
    assert [(each.prompt, each.completion) for each in examples] == [row[:2] for row in expected]
    if task is WEBNLG:
        assert {each.part for each in examples} == {"seen"}
        assert all(row[2] for row in expected)


def without(entry, key):
    return {k: v for k, v in entry.items() if k != key}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (without(ENTRY, "category"), "entry 2 .*no 'category'"),
        (without(ENTRY, "modifiedtripleset"), "entry 2 .*no 'modifiedtripleset'"),
        ({**ENTRY, "lexicalisations": [{"lex": "x"}]}, "entry 2 .*no 'comment'"),
        ({**ENTRY, "lexicalisations": [text(3)]}, "entry 2 .*a text is a number"),
        ({**ENTRY, "lexicalisations": [text("\ud800")]}, "entry 2 .*surrogates not allowed"),
        ({**ENTRY, "modifiedtripleset": [triple("a", "b", None)]}, "entry 2 .*a text is null"),
        ("text", "entry 2 "),
    ],
)
def test_bad_webnlg_entries(tmp_path, entry, message):
    with pytest.raises(UserError, match=f"test.json: {message}"):
        WEBNLG.read(webnlg_file(tmp_path, ENTRY, entry))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (without(TABLE, "tripleset"), "entry 2 .*no 'tripleset'"),
        ({**TABLE, "tripleset": [["a", "b"]]}, "entry 2 .*not enough values"),
        ({**TABLE, "tripleset": [["a", 3, "b"]]}, "entry 2 .*a text is a number"),
        ({**TABLE, "annotations": ["x"]}, "entry 2 "),
        (7, "entry 2 "),
    ],
)
def test_bad_dart_entries(tmp_path, entry, message):
    with pytest.raises(UserError, match=f"dart.json: {message}"):
        DART.read(dart_file(tmp_path, TABLE, entry))


@pytest.mark.parametrize("task", [WEBNLG, DART])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"entries":\n [}', "test.json:2: not JSON"),
        ('{"a": []}', "no "),
        ("3", "no "),
        ('{"entries": []}', "no "),
        ("[]", "no "),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_files_of_another_kind(tmp_path, task, content, message):
    path = tmp_path / "test.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        task.read(path)
    assert "\n" not in str(caught.value)
