from __future__ import annotations

import hashlib

import pytest

from jlora.data.batches import Example
from jlora.data.tasks import NAMES, ReferenceGroup, get_task
from jlora.data.tasks import restaurants as grammar
from jlora.data.tasks.e2e import meaning_to_prompt
from jlora.system.errors import UserError

E2E = get_task("e2e")
PROMPT = "name : Blue Spice | Type : coffee shop | area : city centre"


def write(tmp_path, content, name="data.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_get_task():
    for name in NAMES:
        assert get_task(name).name == name
        assert set(get_task(name).splits) == {"train", "valid", "test"}
    with pytest.raises(UserError, match="no task 'e2'; did you mean e2e"):
        get_task("e2")
    with pytest.raises(UserError, match="no task 'zzz'; there are boolq, chat, dart, e2e"):
        get_task("zzz")


# E2E -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "rows", "inputs"),
    [("train", 42_061, 4_862), ("valid", 4_672, 547), ("test", 4_693, 630)],
)
def test_counts_of_the_real_data(shared_data, split, rows, inputs):
    examples = E2E.load(shared_data, split)
    assert len(examples) == rows
    groups = E2E.groups(examples)
    assert len(groups) == inputs
    assert sum(len(group.references) for group in groups) == rows
    assert all(each.completion == each.completion.strip() != "" for each in examples)


@pytest.mark.parametrize(
    ("csv_name", "text_name"), [("devset.csv", "valid.txt"), ("testset_w_refs.csv", "test.txt")]
)
def test_csv_and_text_give_the_same_prompts_in_every_row(shared_data, csv_name, text_name):
    from_csv = E2E.read(shared_data / "e2e" / csv_name)
    from_text = E2E.read(shared_data / "e2e" / text_name)
    assert [each.prompt for each in from_csv] == [each.prompt for each in from_text]
    for one, other in zip(from_csv, from_text):
        assert "".join(one.completion.split()) == "".join(other.completion.split())


def test_text_is_split_as_the_reference_splits_it(tmp_path):
    path = write(tmp_path, f"\ufeff  {PROMPT}||A coffee shop . \r\n\nname : B || Two . \n")
    assert E2E.read(path) == [Example(PROMPT, "A coffee shop ."), Example("name : B ", "Two .")]


def test_the_three_kinds_are_told_apart_by_content(tmp_path):
    expected = [Example(PROMPT, "It is a | b .")]
    csv = 'mr,ref\n"name[Blue Spice], eatType[coffee shop], area[city centre]",It is a | b .\n'
    json = f'{{"prompt": "{PROMPT}", "completion": " It is a | b . ", "more": 1}}\n'
    text = f"{PROMPT}||It is a | b .\n"
    for name in ("data.txt", "data", "data.csv", "data.jsonl"):
        for content in (csv, json, text):
            assert E2E.read(write(tmp_path, content, name)) == expected


def test_meaning_to_prompt():
    meaning = (
        "name[The Eagle], eatType[coffee shop],food[Japanese] , priceRange[less than £20], "
        "customer rating[5 out of 5], area[riverside], familyFriendly[yes], near[Burger King]"
    )
    assert meaning_to_prompt(meaning) == (
        "name : The Eagle | Type : coffee shop | food : Japanese | price : less than £ 20 | "
        "customer rating : 5 out of 5 | area : riverside | family friendly : yes | "
        "near : Burger King"
    )
    assert meaning_to_prompt("priceRange[£20-25]") == "price : £ 20 - 25"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("a||b\nno separator\n", "data.txt", r"data.txt:2: no `\|\|`.*CSV.*JSON Lines"),
        ("no separator\n", "data.txt", r"data.txt:1: no `\|\|`"),
        ("a||b||c\n", "data.txt", r"data.txt:1: 2 times `\|\|`"),
        ("a||b\na|| \n", "data.txt", r"data.txt:2: no target after"),
        ("a||b\n||c\n", "data.txt", r"data.txt:2: no context before"),
        ("", "data.txt", "data.txt: the file is empty"),
        (b"a||b\nCaf\xe9||c\n", "data.txt", "data.txt:2: not UTF-8"),
        (b"\xff\xfea\0|\0|\0b\0", "data.txt", "data.txt:1: not UTF-8"),
        ("some prose\n", "data", r"data:1: not a file of E2E data; read are: `context"),
        ("<html>\n", "data.html", r"data.html:1: not a file of E2E data"),
        ("a,b\n1,2\n", "data.csv", "data.csv:1: no column mr or ref"),
        ("mr,ref\n", "data.csv", "data.csv: no examples"),
        ("mr,ref\nname[A],  \n", "data.csv", "data.csv:2: column ref is empty"),
        ("mr,ref\nname[A,b\n", "data.csv", r"data.csv:2: 3 fields|data.csv:2: column mr: expected"),
        ("mr,ref\nname A,b\n", "data.csv", r"data.csv:2: 3 fields|data.csv:2: column mr: expected"),
        ('mr,ref\n"name[A] area[b]",c\n', "data.csv", "data.csv:2: column mr: expected a comma"),
        ('mr,ref\n"name[A],",c\n', "data.csv", "data.csv:2: column mr: expected `slot"),
        ("mr,ref\ncolour[A],c\n", "data.csv", "data.csv:2: column mr: unknown slot 'colour'"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt\n', "d.jsonl", "d.jsonl:2: not JSON"),
        ("not json\n", "d.jsonl", "d.jsonl:1: not JSON"),
        ('{"prompt": "a"}\n', "d.jsonl", r"d.jsonl:1: no key 'completion' \(found: prompt\)"),
        ('{"prompt": 1, "completion": "b"}\n', "d.jsonl", "d.jsonl:1: 'prompt' is a number"),
        ('{"prompt": "a", "completion": " "}\n', "d.jsonl", "d.jsonl:1: the completion is empty"),
    ],
)
def test_bad_files(tmp_path, content, name, message):
    path = write(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as caught:
        E2E.read(path)
    assert "\n" not in str(caught.value)


def test_a_folder_instead_of_a_file(tmp_path):
    with pytest.raises(UserError, match="give a file, not a folder"):
        E2E.read(tmp_path)


def test_groups_keep_first_seen_order():
    examples = [Example("b", "1"), Example("a", "2"), Example("b", "3")]
    assert E2E.groups(examples) == [ReferenceGroup("b", ["1", "3"]), ReferenceGroup("a", ["2"])]


# Finding data ----------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Empty $JLORA_DATA, ./data, ../shared/data and cache, in the order they are looked in."""
    work = tmp_path / "work"
    folders = [tmp_path / "from_variable", work / "data", tmp_path / "shared" / "data"]
    folders.append(tmp_path / "cache" / "data")
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("JLORA_DATA", str(folders[0]))
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    return folders


def test_places_are_looked_in_in_order(places):
    for folder in reversed(places):
        (folder / "e2e").mkdir()
        (folder / "e2e" / "test.txt").write_text("a||b\n")
        assert E2E.find_data(None, "test").resolve() == folder / "e2e" / "test.txt"


def test_folders_hold_the_files_or_the_tasks_folder(places):
    folder = places[1]
    (folder / "testset_w_refs.csv").write_text("mr,ref\n")
    assert E2E.find_data(None, "test").name == "testset_w_refs.csv"
    (folder / "test.txt").write_text("a||b\n")
    assert E2E.find_data(None, "test").name == "test.txt"
    assert E2E.find_data(folder, "test") == folder / "test.txt"
    (folder / "e2e").mkdir()
    (folder / "e2e" / "test.txt").write_text("a||b\n")
    assert E2E.find_data(folder, "test") == folder / "e2e" / "test.txt"
    assert E2E.find_data(folder / "test.txt", "train") == folder / "test.txt"


def test_what_is_not_found_is_listed(places, monkeypatch):
    with pytest.raises(UserError) as caught:
        E2E.find_data(None, "test")
    for part in (*map(str, (places[0], places[3])), "data/e2e", "../shared/data", "test.txt"):
        assert part in str(caught.value)
    assert "with --data or $JLORA_DATA, or run `jlora pull e2e`" in str(caught.value)
    with pytest.raises(UserError, match=r"\$JLORA_DATA$"):
        get_task("jsonl").find_data(None, "test")
    # --data is meant: nothing else is looked in.
    (places[1] / "test.txt").write_text("a||b\n")
    with pytest.raises(UserError, match="no test data"):
        E2E.find_data(places[2], "test")
    with pytest.raises(UserError, match="no file or folder"):
        E2E.find_data(places[2] / "absent", "test")
    with pytest.raises(UserError, match="no split 'dev'; it has train, valid, test"):
        E2E.find_data(None, "dev")


# Prompt templates ------------------------------------------------------------------------------


def test_templates_are_names_or_format_strings(tmp_path):
    task = get_task("boolq")
    assert task.find_template(None) == task.templates["jlora"]
    assert task.find_template("replication") == "{passage} {question}?"
    assert task.find_template("Q: {question}") == "Q: {question}"
    with pytest.raises(UserError, match="no prompt template 'replica'; task boolq has jlora, repl"):
        task.find_template("replica")
    with pytest.raises(UserError, match="task e2e has no prompt templates"):
        E2E.read(write(tmp_path, "a||b\n"), "{question}")
    with pytest.raises(UserError, match="task restaurants has no prompt templates"):
        get_task("restaurants").load(None, "test", template="jlora")


# The built-in corpus ---------------------------------------------------------------------------


def test_the_built_in_corpus_splits():
    task = get_task("restaurants")
    inputs = {}
    for split, count in grammar.INPUTS.items():
        examples = task.load(None, split)
        groups = task.groups(examples)
        assert len(groups) == count
        assert all(len(set(g.references)) == grammar.REFERENCES for g in groups)
        inputs[split] = {group.prompt for group in groups}
    assert len(task.load(None, "train")) == 3000
    assert not inputs["train"] & inputs["test"]
    assert not inputs["train"] & inputs["valid"]
    assert not inputs["valid"] & inputs["test"]
    with pytest.raises(UserError, match="no split 'dev'"):
        task.load(None, "dev")


# Changes with the grammar; then scores made before and after cannot be compared.
DIGEST = "6fe88006a372c4dac8bd9384598157ef3ae2ef943229c85fcd75dd76b569bac8"


def test_the_built_in_corpus_is_the_same_on_every_machine():
    text = "".join(f"{each.prompt}||{each.completion}\n" for each in grammar.corpus("test"))
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST
    assert grammar.corpus("test", seed=1) != grammar.corpus("test")


def test_built_in_texts_say_every_slot():
    words = {
        "riverside": ("river",),
        "cheap": ("cheap", "low - priced", "low prices", "prices that are low"),
        "moderate": ("moderate", "mid - priced"),
        "high": ("expensive", "high - priced", "high prices", "prices that are high"),
    }
    for example in grammar.corpus("valid"):
        text = example.completion
        assert text.endswith(" .")
        assert "  " not in text
        for slot in example.prompt.split(" | "):
            name, value = slot.split(" : ", 1)
            if name == "family friendly":
                said = "friendly" in text or "children" in text or "families" in text
                assert said or value == "no"
                assert ("not family friendly" in text or "adults only" in text) == (value == "no")
            elif name in ("price", "area"):
                assert any(each in text for each in words.get(value, (value,)))
            else:
                assert value in text


def test_the_written_corpus_is_read_as_e2e(tmp_path):
    grammar.write_corpus(tmp_path / "corpus")
    for split in grammar.INPUTS:
        assert E2E.load(tmp_path / "corpus", split) == grammar.corpus(split)


def test_the_built_in_names_are_not_e2es(shared_data):
    names = set()
    for example in E2E.load(shared_data, "train"):
        slots = dict(slot.split(" : ", 1) for slot in example.prompt.split(" | "))
        names |= {slots.get("name"), slots.get("near")}
    assert not names & {*grammar.VALUES["name"], *grammar.VALUES["near"]}
