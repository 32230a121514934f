"""Rows of every form as conversations, and rows that are none: by file, line and way out."""

from __future__ import annotations

import csv
import io
import json

import pytest

from jlora.data import rows as rows_module
from jlora.data.conversations import Features, holds_conversations, read_conversations
from jlora.data.tasks.chat import TASK, guess_task
from jlora.system.errors import UserError

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CHAT = [USER, BOT]


def lines(path, *rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read(path, *rows, **features):
    return read_conversations(lines(path, *rows), Features(**features))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.jsonl"


# Forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages", "answers"),
    [
        ({"prompt": "Hi", "completion": "Yo"}, CHAT, [1]),
        ({"messages": CHAT}, CHAT, [1]),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, CHAT, [1]),
        ({"instruction": "Hi", "output": "Yo"}, CHAT, [1]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
         CHAT, [1]),
        ({"instruction": "Hi", "input": "you", "output": "Yo", "system": "S"},
         [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi\n\nyou"}, BOT], [2]),
        ({"conversations": [{"role": "user", "content": "Hi"}, BOT], "system": "S"},
         [{"role": "system", "content": "S"}, *CHAT], [2]),
        ({"messages": [*CHAT, USER, BOT, USER]}, [*CHAT, USER, BOT, USER], [1, 3]),
        ({"prompt": [*CHAT, USER], "completion": [BOT]}, [*CHAT, USER, BOT], [3]),
        ({"messages": [USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 1}]},
         [*CHAT, USER, BOT], [3]),
        ({"messages": [{"role": "developer", "content": "S"}, *CHAT]},
         [{"role": "system", "content": "S"}, *CHAT], [2]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}, BOT]},
         CHAT, [1]),
        ({"messages": [USER, {**BOT, "thinking": "so", "id": 7}]},
         [USER, {**BOT, "thinking": "so"}], [1]),
        ({"messages": json.dumps(CHAT)}, CHAT, [1]),
    ],
    ids=["pair", "messages", "alpaca", "alpaca without input", "sharegpt", "alpaca with input",
         "sharegpt with a system prompt", "turns", "TRL's pair", "OpenAI's weights", "developer",
         "parts", "thoughts", "as JSON in a string"],
)  # fmt: skip
def test_forms(file, row, messages, answers):
    (found,) = read(file, row)
    assert (list(found.messages), list(found.answers)) == (messages, answers)
    assert found.place == f"{file}:1" and found.text is None


def test_texts(file):
    found = read(file, {"text": "a\nb"}, {"text": "c"})
    assert [(row.text, row.place) for row in found] == [("a\nb", f"{file}:1"), ("c", f"{file}:2")]


def test_the_order_of_the_forms(file):
    everything = {"text": "t", "messages": CHAT, "prompt": "p", "completion": "c"}
    (first,) = read(file, everything)
    assert first.is_pair and first.messages[0]["content"] == "p"
    del everything["prompt"]
    assert not read(file, everything)[0].is_pair
    del everything["messages"]
    assert read(file, everything)[0].text == "t"


def test_tools(file):
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    told = {"role": "tool", "content": "", "tool_call_id": "1"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        (found,) = read(file, {"messages": [USER, asked, told, BOT], "tools": given})
        assert found.tools == tools and list(found.answers) == [1, 3]
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert found.messages[1]["content"] == "" and found.messages[2] == told
    assert read(file, {"messages": CHAT, "tools": []})[0].tools is None


def node(role, text, parent, kind="text"):
    content = {"content_type": kind, "parts": [text]}
    return {"message": {"author": {"role": role}, "content": content}, "parent": parent}


def test_what_chatgpt_exports(tmp_path):
    mapping = {
        "root": {"message": None, "parent": None},
        "s": node("system", "", "root"),
        "u": node("user", "Hi", "s"),
        "other": node("assistant", "another branch", "u"),
        "i": node("assistant", "", "u", "multimodal_text"),
        "a": node("assistant", "Yo", "i"),
    }
    asked = {"mapping": {"u": node("user", "Hi", None)}, "current_node": "u", "title": "t"}
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps([{"mapping": mapping, "current_node": "a"}, asked], indent=1))
    (found,) = read_conversations(path)
    assert found.messages == CHAT
    path.write_text(json.dumps([asked]))
    with pytest.raises(UserError, match="no conversation with an answer"):
        read_conversations(path)


def test_other_columns_are_named_once(file, capsys):
    read(file, *[{"messages": CHAT, "id": 1, "source": "x"}] * 3, {"messages": CHAT, "lang": "de"})
    said = capsys.readouterr().err
    assert said == f"jlora: {file}: columns that are not used: id, source, lang\n"
    read(file, {"instruction": "a", "input": "b", "output": "c"}, {"messages": CHAT, "tools": []})
    assert capsys.readouterr().err == ""


def test_renamed_columns(file):
    row = {"frage": "Hi", "antwort": "Yo", "prompt": "x"}
    (found,) = read(file, row, prompt="frage", completion="antwort")
    assert found.messages == CHAT
    assert read(file, {"dialog": CHAT}, chat="dialog")[0].messages == CHAT
    assert read(file, {"body": "b", "text": "t"}, text="body")[0].text == "b"
    with pytest.raises(
        UserError, match=r":1: the keys fit no form \(found: dialog\).*chat_feature"
    ):
        read(file, {"dialog": CHAT})


def test_texts_with_an_answer(file):
    (found,) = read(file, {"text": "Q: A: b\nA: c"}, answer_after="A: ")
    assert found.text[found.question :] == "c"
    (group,) = TASK.groups([found])
    assert (group.prompt, group.references) == ("Q: A: b\nA:", ["c"])
    with pytest.raises(UserError, match=":1: no answer after 'A: ' .data.answer_after.; write one"):
        read(file, {"text": "Q: b\nA: "}, answer_after="A: ")


def test_groups_ask_for_the_last_answer(file):
    rows = [{"messages": CHAT}, {"prompt": "Hi", "completion": "Hey"}, {"text": "t"},
            {"messages": [*CHAT, USER, BOT]}, {"messages": [*CHAT, USER]}]  # fmt: skip
    first, second = TASK.groups(read(file, *rows))
    assert (first.prompt, first.references) == ("Hi", ["Yo", "Hey"])
    assert second.prompt == "user: Hi\nassistant: Yo\nuser: Hi"
    assert second.asked.messages == [*CHAT, USER] and second.references == ["Yo"]


# Files -------------------------------------------------------------------------------------------


def test_a_json_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff[\r\n{"text": "a"},\n\n {"text":\n"b"}\n , {"text": "c"}]\n')
    places = [row.place for row in read_conversations(path)]
    assert places == [f"{path}:2", f"{path}:4", f"{path}:6"]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(read_conversations(path)) == 2


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('id,prompt,completion\n1,"Hi, you\nthere",Yo\n2,b,' + "c" * 200_000 + "\n")
    first, second = read_conversations(path)
    assert first.messages[0]["content"] == "Hi, you\nthere" and second.place == f"{path}:4"
    table = io.StringIO()
    csv.writer(table).writerows([["messages", "tools"], [json.dumps(CHAT), ""]])
    path.write_text(table.getvalue())
    assert read_conversations(path)[0].messages == CHAT


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pip install 'jlora[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT], "n": [1, 2]}), path)
    first, second = read_conversations(path)
    assert first.messages == CHAT and second.place == f"{path}: row 2"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="a.parquet: not a Parquet file, or a damaged one"):
        read_conversations(path)
    with pytest.raises(UserError, match="cannot read .*b.parquet"):
        read_conversations(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    with pytest.raises(UserError, match="the file is empty"):
        read_conversations(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="Parquet needs pyarrow; pip install 'jlora.parquet.'"):
        read_conversations(tmp_path / "a.parquet")


def test_separators_that_end_no_line(file):
    text = "a\u2028b\x0cc\r\nd\x85"
    file.write_bytes(("\ufeff" + json.dumps({"text": text}, ensure_ascii=False) + "\r\n").encode())
    assert read_conversations(file)[0].text == text


@pytest.mark.parametrize(
    ("name", "row", "task"),
    [("train.jsonl", '{"prompt": "a", "completion": "b"}', "chat"),
     ("train.json", '[{"text": "a"}]', "chat"), ("train.csv", "text\na", "chat"),
     ("train.csv", "mr,ref\na,b", None), ("train.csv", "text", None),
     ("train.txt", "a||b", None), ("train.jsonl", "{", "chat"), ("other.jsonl", "{}", None)],
)  # fmt: skip
def test_which_data_are_conversations(tmp_path, name, row, task):
    (tmp_path / name).write_text(row + "\n")
    assert guess_task(tmp_path, None) == task
    assert guess_task(None, tmp_path / name) == (task or ("chat" if name[0] == "o" else None))
    (tmp_path / "train.txt").write_text("a||b\n")
    assert guess_task(tmp_path, None) is None


def test_names_of_splits(tmp_path):
    for name in ("train.json", "validation.csv", "test.parquet"):
        (tmp_path / name).write_text("x")
    found = [TASK.find_data(tmp_path, split).name for split in ("train", "valid", "test")]
    assert found == ["train.json", "validation.csv", "test.parquet"]
    (tmp_path / "val.jsonl").write_text('{"text": "a"}')
    assert holds_conversations(tmp_path / "val.jsonl")


# Bad input ---------------------------------------------------------------------------------------

GOOD = json.dumps({"messages": CHAT}).encode() + b"\n"


def message(content, role="user", **more):
    return {"messages": [{"role": role, "content": content, **more}, BOT]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{", r"not JSON"),
        (b'["a"]', r"a JSON list, not an object"),
        (b'{"text": "a", "text": "b"}', r"the key 'text' stands twice in an object"),
        (b'{"messages": [{"role": "user", "role": "x"}]}', r"the key 'role' stands twice"),
        (b'{"text": "a\x00b"}', r"not JSON .*control character"),
        (b'{"text": "caf\xe9"}', r"not UTF-8 text .*LATIN1"),
        (b"[" * 100_000, r"not JSON"),
        ({}, r"the keys fit no form \(found: none\); write prompt and completion, messages"),
        ({"prompt": "a"}, r"no key 'completion' \(found: prompt\)"),
        ({"prompt": 5, "completion": "b"}, r"'prompt' is a number; give a text"),
        ({"prompt": "a", "completion": ""}, r"'completion' is empty; write something there"),
        ({"prompt": " \n", "completion": "b"}, r"'prompt' is empty"),
        ({"text": None}, r"'text' is null, not a text"),
        ({"text": "a\0b"}, r"'text' holds a NUL character; remove it"),
        ({"text": "\ud800"}, r"'text' holds half of a surrogate pair \(.ud800\)"),
        ({"messages": "hello"}, r"'messages' is a string, not a list of messages"),
        ({"messages": {}}, r"'messages' is an object, not a list"),
        ({"messages": []}, r"'messages' is an empty list; remove the row"),
        ({"messages": ["a"]}, r"message 1 is a string; write \{\"role\": \"user\""),
        ({"messages": [USER]}, r"no message of the assistant to learn from"),
        ({"messages": [USER, {**BOT, "weight": 0}]}, r"no message of the assistant"),
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, r"message 2 has the weight 0.5; only 0 and"),
        ({"messages": [{"content": "a"}, BOT]}, r"message 1 has no role \(keys: content\)"),
        ({"messages": [{"role": "user"}, BOT]}, r"message 1 \(user\) has no content"),
        (message("a", "usr"), r"message 1 has the role 'usr'; did you mean user\?"),
        (message("a", "Q&A"), r"message 1 has the role 'Q&A'; there are system, developer, user"),
        (message("a", 3), r"message 1 has the role 3"),
        (message(None), r"message 1 \(user\): content is null, not a text; write one, or"),
        (message(7), r"message 1 \(user\): content is a number"),
        (message(""), r"message 1 \(user\): content is empty"),
        (message({"text": "a"}), r"message 1 \(user\): content is an object"),
        (message([[["a"]]]), r"message 1 \(user\): its content holds a list, and only text"),
        (message([{"type": "image_url", "image_url": {}}]), r"its content holds image_url"),
        (message([{"type": "text", "text": 3}]), r"its content holds text, and only text|holds"),
        (message([{"type": ["x"], "text": "a"}]), r"its content holds \['x'\]"),
        ({"messages": [USER, {**BOT, "content": "\0"}]}, r"\(assistant\): content holds a NUL"),
        ({"messages": [USER, {**BOT, "thinking": 3}]}, r"thinking is a number"),
        ({"messages": [USER, {**BOT, "tool_calls": "f()"}]}, r"tool_calls is a string, not a list"),
        ({"messages": [USER, {**BOT, "tool_calls": [{}]}]}, r"a tool call has no function with"),
        ({"messages": [USER, {**BOT, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
         r"the arguments of f are not JSON"),
        ({"messages": CHAT, "tools": "["}, r"'tools' is a string that is not JSON"),
        ({"messages": CHAT, "tools": {"a": 1}}, r"'tools' is an object, not a list of JSON"),
        ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]},
         r"message 1 \(human\): value is null"),
        ({"instruction": "a", "output": 4}, r"message 2 \(assistant\): content is a number"),
        ({"mapping": {}, "current_node": "x"}, r"its mapping has no way from x to its root"),
        ({"mapping": {"x": {"parent": "x"}}, "current_node": "x"}, r"has no way from x"),
    ],
)  # fmt: skip
def test_a_bad_row(file, row, words):
    file.write_bytes(GOOD * 2 + (row if isinstance(row, bytes) else json.dumps(row).encode()))
    with pytest.raises(UserError, match=rf"^{file}:3: .*{words}"):
        read_conversations(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ": the file is empty"),
        ("[]", ": an empty list"),
        ('[\n{"text": "a"}\n{"text": "b"}]', ":2: not JSON .a comma or . is missing"),
        ('[\n{"text": "a"},\n{"text": }]', ":3: not JSON .Expecting value"),
        ('[\n{"text": "a"},\n]', ":3: not JSON"),
        ('[{"text": "a"},\n\n3]', ":3: a number in the list; write rows as"),
        ('[{"text": "a"}]\n{"text": "b"}', ":1: more text behind the end of the list"),
        ('[{"text": "a"}', ":1: not JSON"),
        ("[" * 100_000, ":1: not JSON"),
        ('[{"text": "a", "text": "b"}]', ":1: not JSON .the key 'text' stands twice"),
    ],
)  # fmt: skip
def test_a_bad_array(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^{path}{words}"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.csv", "text,text\na,b\n", ":1: the column 'text' stands twice"),
     ("a.csv", "text,b\na\n", ":2: 1 fields, and the header has 2"),
     ("a.csv", 'text\n"a\n', ":2: broken CSV"), ("a.csv", "text\n", ": no conversation"),
     ("a.xlsx", "PK", ": not a data file; give one that ends in .jsonl, .json, .csv, .parquet")],
)  # fmt: skip
def test_a_bad_table(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / name}{words}"):
        read_conversations(tmp_path / name)


def test_a_row_as_large_as_a_file(file, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_CHARACTERS", 1000)
    with pytest.raises(UserError, match=r":2: a row of 1,005 characters, and at most 1,000 are re"):
        read(file, {"text": "x" * 996}, {"text": "x" * 1001})
    with pytest.raises(UserError, match=r":1: a row of 2,\d+ characters"):
        read(file, {"messages": [{"role": "user", "content": "x" * 2000}, BOT]})
