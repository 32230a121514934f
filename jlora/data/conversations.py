"""Conversations, pairs and texts from rows of every usual form, told by their keys.

In mlx-lm's order and with its names: ``prompt`` and ``completion``, ``messages``, ``text``; then
Alpaca's ``instruction``, ``input``, ``output``, ShareGPT's ``conversations``, and the
conversations.json that ChatGPT exports. What OpenAI's fine-tuning takes is ``messages``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jlora.data.chat_template import THOUGHTS
from jlora.data.readers import shorten
from jlora.data.rows import read_rows
from jlora.system.console import say
from jlora.system.errors import UserError, kind_of

MESSAGES = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
FORMS = (
    "prompt and completion, messages, text, instruction and output (Alpaca), or conversations "
    "(ShareGPT)"
)
#: What the fields of a message are called.
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
#: Roles by the names that files give them.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
#: Kept beside a message's role and content, for the template.
MORE = ("name", "tool_calls", "tool_call_id", *THOUGHTS)


@dataclass(frozen=True)
class Features:
    """The columns that are read, where a file calls them otherwise.

    Attributes:
        answer_after: words of a whole text behind which its answer stands, such as ``"A: "``.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"
    answer_after: str | None = None


@dataclass(frozen=True)
class Conversation:
    """One row of training data.

    Attributes:
        place: where it stands, such as ``train.jsonl:7``.
        messages: as a template takes them, roles and content checked; empty for a whole text.
        answers: numbers of the messages, from 0, that the assistant is to learn.
        tools: JSON schemas of functions that the assistant may call, or None.
        text: a whole text, where there are no messages.
        question: characters of the text that ask for the rest; None: it asks nothing.
        is_pair: whether it came as a prompt and its completion.
    """

    place: str
    messages: Sequence[Mapping[str, Any]] = ()
    answers: Sequence[int] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    question: int | None = None
    is_pair: bool = False


@dataclass
class _Keys:
    """The columns of a file that were looked at, and the others."""

    used: set[str] = field(default_factory=set)
    other: dict[str, None] = field(default_factory=dict)  # an ordered set


def read_conversations(path: str | Path, features: Features | None = None) -> list[Conversation]:
    """The rows of a file; columns that no form has are named in one line and ignored.

    Raises:
        UserError: a row fits no form or holds what cannot be trained on; names its line.
    """
    keys = _Keys()
    found = []
    for place, row in read_rows(path, MESSAGES):
        found += _conversation(place, row, features or Features(), keys)
    other = [name for name in keys.other if name not in keys.used]
    if other:
        say(f"{path}: columns that are not used: {shorten(', '.join(map(str, other)), 80)}")
    if not found:
        raise UserError(f"{path}: no conversation with an answer in it; give one with examples")
    return found


def holds_conversations(path: str | Path) -> bool:
    """Whether the first row of a file has the keys of a form.

    Raises:
        UserError: the file cannot be read.
    """
    return any(_form(row, Features()) for _, row in islice(read_rows(path, MESSAGES), 1))


def _form(row: Mapping[str, Any], names: Features) -> str | None:
    """The form of a row, by its keys."""
    if names.prompt in row and names.completion in row:
        return "pair"
    if names.chat in row:
        return "messages"
    if names.text in row:
        return "text"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "conversations" in row:
        return "sharegpt"
    if isinstance(row.get("mapping"), dict) and "current_node" in row:
        return "export"
    return None


def _conversation(
    place: str, row: dict[str, Any], names: Features, keys: _Keys
) -> Iterator[Conversation]:
    """The conversation of a row; none for an exported one that nobody answered."""
    form = _form(row, names)
    if form is None:
        found = shorten(", ".join(map(str, row)), 60) or "none"
        halves = {names.prompt, names.completion}
        missing = sorted(halves - set(row)) if halves & set(row) else []
        what = f"no key {missing[0]!r}" if missing else "the keys fit no form"
        raise UserError(
            f"{place}: {what} (found: {found}); write {FORMS}, or name the columns "
            "by data.prompt_feature, completion_feature, chat_feature, text_feature; data of "
            "another task need --task"
        )
    columns = {
        "pair": (names.prompt, names.completion, "tools"),
        "messages": (names.chat, "tools"),
        "text": (names.text,),
        "alpaca": ("instruction", "input", "output", "system"),
        "sharegpt": ("conversations", "system", "tools"),
        "export": ("mapping", "current_node"),
    }[form]
    keys.used.update(columns)
    keys.other.update(dict.fromkeys(row))
    if form == "text":
        text = _text(row[names.text], f"{place}: {names.text!r}")
        yield Conversation(place, text=text, question=_question(text, names.answer_after, place))
        return
    given = 0  # messages that no answer is learned from, whoever says them
    if form == "pair":
        asked = _side(row[names.prompt], "user", f"{place}: {names.prompt!r}")
        answer = _side(row[names.completion], "assistant", f"{place}: {names.completion!r}")
        raw, given = [*asked, *answer], len(asked)
    elif form == "alpaca":
        asked = _text(row["instruction"], f"{place}: 'instruction'")
        if row.get("input"):
            asked += "\n\n" + _text(row["input"], f"{place}: 'input'")
        raw = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    elif form == "export":
        raw = _exported(row, place)
        if not any(message["role"] == "assistant" for message in raw):
            return
    else:
        column = names.chat if form == "messages" else "conversations"
        raw = _list(row[column], f"{place}: {column!r}")
    if form in ("alpaca", "sharegpt") and row.get("system"):
        raw = [{"role": "system", "content": row["system"]}, *raw]
    messages = [
        _message(message, f"{place}: message {number}") for number, message in enumerate(raw, 1)
    ]
    answers = [
        number
        for number, (message, source) in enumerate(zip(messages, raw))
        if message["role"] == "assistant" and number >= given and _weight(source, place, number)
    ]
    if not answers:
        raise UserError(
            f"{place}: no message of the assistant to learn from; add one, or remove the row"
        )
    tools = _tools(row.get("tools"), place) if "tools" in columns else None
    yield Conversation(place, messages, answers, tools, is_pair=form in ("pair", "alpaca"))


def _question(text: str, answer_after: str | None, place: str) -> int | None:
    """Where the answer of a whole text begins: behind the last time that the words stand there."""
    if answer_after is None:
        return None
    before, found, answer = text.rpartition(answer_after)
    if not found or not answer.strip():
        raise UserError(
            f"{place}: no answer after {shorten(repr(answer_after))} (data.answer_after); write "
            "one, or leave the setting out"
        )
    return len(before + found)


def _side(value: Any, role: str, what: str) -> list[Any]:
    """One side of a pair: a text, or messages as in TRL's conversational pairs."""
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        _text(value, what)
        return [{"role": role, "content": value}]
    raise UserError(f"{what} is {kind_of(value)}; give a text")


def _list(value: Any, what: str) -> list[Any]:
    """A list of messages; in CSV it is written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what} is a string, not a list of messages; write {MESSAGES}") from (
                error
            )
    if not isinstance(value, list):
        raise UserError(f"{what} is {kind_of(value)}, not a list of messages; write {MESSAGES}")
    if not value:
        raise UserError(f"{what} is an empty list; remove the row")
    return value


def _message(value: Any, what: str) -> dict[str, Any]:
    """A message as templates take it: role, content, and what else they read.

    Raises:
        UserError: no object, an unknown role, or content that is no text.
    """
    if not isinstance(value, dict):
        raise UserError(f'{what} is {kind_of(value)}; write {{"role": "user", "content": "..."}}')
    role_key = next((key for key in ROLE_KEYS if key in value), None)
    if role_key is None:
        found = shorten(", ".join(map(str, value)), 60) or "none"
        raise UserError(f"{what} has no role (keys: {found}); add one, such as user")
    role = value[role_key]
    if not isinstance(role, str) or role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ROLES)}"
        raise UserError(f"{what} has the role {shorten(repr(role))}; {hint}")
    what, role = f"{what} ({role})", ROLES[role]
    kept: dict[str, Any] = {"role": role}
    for key in MORE:
        if value.get(key) is not None:
            kept[key] = value[key]
    for key in THOUGHTS:
        if key in kept:
            kept[key] = _text(kept[key], f"{what}: {key}", may_be_empty=True)
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], what)
    key = next((key for key in CONTENT_KEYS if key in value), None)
    content = None if key is None else value[key]
    if content is None and kept.get("tool_calls"):
        kept["content"] = ""  # OpenAI writes null there, which some templates print as None
        return kept
    if key is None:
        raise UserError(f"{what} has no content; add some, or remove it")
    may_be_empty = role in ("system", "tool") or bool(kept.get("tool_calls"))
    kept["content"] = _text(_joined(content, what), f"{what}: {key}", may_be_empty)
    return kept


def _joined(content: Any, what: str) -> Any:
    """The text of content that is given in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else kind_of(part)
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            part.get("text"), str
        ):
            raise UserError(
                f"{what}: its content holds {shorten(str(kind))}, and only text is read; remove it"
            )
        texts.append(part["text"])
    return "".join(texts)


def _text(value: Any, what: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}, not a text; write one, or remove the row")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{what} is empty; write something there, or remove the row")
    if "\0" in value:
        raise UserError(f"{what} holds a NUL character; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is "
            "no character; remove it"
        ) from error
    return value


def _tool_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """Calls as templates take them: OpenAI writes the arguments as a string of JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{what}: tool_calls is {kind_of(calls)}, not a list of objects")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UserError(f"{what}: a tool call has no function with a name")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{what}: the arguments of {shorten(inner['name'])} are not JSON; fix them"
                ) from error
        inner = {**inner, "arguments": arguments}
        found.append({**call, "function": inner} if "function" in call else inner)
    return found


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Schemas of functions, given as a list or as a string of JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: 'tools' is a string that is not JSON; fix it") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{place}: 'tools' is {kind_of(value)}, not a list of JSON schemas")
    return value


def _weight(message: Any, place: str, number: int) -> bool:
    """Whether to learn from a message: OpenAI's files may give it the weight 0."""
    weight = message.get("weight", 1)
    if weight not in (0, 1, None):
        raise UserError(
            f"{place}: message {number + 1} has the weight {shorten(repr(weight))}; only 0 and 1 "
            "have a meaning"
        )
    return weight != 0


def _exported(row: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """The messages of a conversation that ChatGPT exported: from its last one up to the first."""
    nodes, name = row["mapping"], row["current_node"]
    found: list[dict[str, Any]] = []
    seen = set()
    while isinstance(name, str):
        node = nodes.get(name)
        if not isinstance(node, dict) or name in seen:
            raise UserError(f"{place}: its mapping has no way from {shorten(name)} to its root")
        seen.add(name)
        message, name = node.get("message"), node.get("parent")
        author, content = (_inner(message, key) for key in ("author", "content"))
        role, parts = author.get("role"), content.get("parts")
        if content.get("content_type") != "text" or not isinstance(parts, list):
            continue
        text = "".join(part for part in parts if isinstance(part, str))
        if role in ("user", "assistant") and text.strip():
            found.append({"role": role, "content": text})
    return found[::-1]


def _inner(value: Any, key: str) -> dict[str, Any]:
    """The object under a key of an object; empty where one of the two is none."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
