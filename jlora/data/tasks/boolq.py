"""BoolQ (Clark et al. 2019): is the answer to a question about a passage true or false?

Two layouts of JSON Lines are read, told apart by a file's first row:

- the original release: question, title, answer, passage
- SuperGLUE's: question, passage, idx, label; its passage is ``TITLE -- PASSAGE``

Both give the same prompts: title and passage are separated, and a template selects and arranges the
fields. The answers are ``true`` and ``false``.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.batches import Example
from jlora.data.readers import json_lines, string_field
from jlora.data.tasks import Task
from jlora.system.errors import UserError
from jlora.system.files import check_absent, write_text

#: "replication" is the prompt of an earlier Jittor replication (Brian-csh/ANN-Jittor-Lora).
TEMPLATES = {
    "jlora": "{passage}\nQuestion: {question}?\nAnswer:",
    "replication": "{passage} {question}?",
}
FIELDS = ("passage", "question", "title")
LAYOUTS = ("superglue", "original")
FORM = '{"question": "...", "passage": "...", "answer": true}'

# Between title and passage in SuperGLUE's files.
_DASH = " -- "


@dataclass(frozen=True)
class Row:
    """One question; `answer` is None in a test file whose answers are not public."""

    question: str
    title: str
    passage: str
    answer: bool | None


def read_rows(path: str | Path, need_answers: bool = False) -> list[Row]:
    """Read a file of either layout.

    Raises:
        UserError: a line is malformed, of the other layout than the first, or has no answer though
            answers are needed (with file and line).
    """
    rows: list[Row] = []
    superglue = False
    for number, row in json_lines(path, FORM):
        if not rows:
            superglue = "label" in row or "idx" in row
        if superglue and "answer" in row or not superglue and "label" in row:
            raise UserError(
                f"{path}:{number}: the original layout (answer) and SuperGLUE's (label) in one "
                "file; keep to one, `jlora data convert` changes files"
            )
        question = string_field(row, "question", path, number, FORM)
        passage = string_field(row, "passage", path, number, FORM)
        title = string_field(row, "title", path, number, FORM) if "title" in row else ""
        if superglue and not title and _DASH in passage:
            title, passage = passage.split(_DASH, 1)
        if not question.strip() or not passage.strip():
            empty = "passage" if question.strip() else "question"
            raise UserError(f"{path}:{number}: the {empty} is empty; remove the line")
        answer = row.get("label" if superglue else "answer")
        # Hugging Face's exports have numbers: 0, 1, and -1 for an answer that is not public.
        if answer is not None and not (isinstance(answer, int) and answer in (-1, 0, 1)):
            quotes = "; write it without quotes" if answer in ("true", "false") else ""
            raise UserError(f"{path}:{number}: the answer is {answer!r}, not true or false{quotes}")
        if answer == -1:
            answer = None
        if answer is None and need_answers:
            raise UserError(
                f"{path}:{number}: no answer (those of BoolQ's own test set are not public); give "
                "a file with answers, such as the development set"
            )
        rows.append(Row(question, title, passage, None if answer is None else bool(answer)))
    return rows


def convert_rows(rows: Sequence[Row], to: str) -> list[dict[str, Any]]:
    """Rows as JSON objects of a layout, with the keys in its order; ``idx`` counts from 0.

    Raises:
        UserError: there is no layout ``to``.
    """
    if to not in LAYOUTS:
        raise UserError(f"no layout {to!r} of BoolQ; there are {', '.join(LAYOUTS)}")
    converted: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        if to == "original":
            answer = {} if row.answer is None else {"answer": row.answer}
            new = {"question": row.question, "title": row.title, **answer, "passage": row.passage}
        else:
            label = {} if row.answer is None else {"label": row.answer}
            passage = f"{row.title}{_DASH}{row.passage}" if row.title else row.passage
            new = {"question": row.question, "passage": passage, "idx": index, **label}
        converted.append(new)
    return converted


def convert_file(path: str | Path, out: str | Path, to: str) -> int:
    """Write a file of either layout in the layout ``to``; returns the number of rows.

    The original development set becomes SuperGLUE's byte for byte, and the other way round.

    Raises:
        UserError: it cannot be read, ``out`` exists, or there is no such layout.
    """
    check_absent(out)
    rows = convert_rows(read_rows(path), to)
    # SuperGLUE's release escapes characters outside ASCII, the original does not.
    lines = [json.dumps(row, ensure_ascii=to == "superglue") + "\n" for row in rows]
    write_text(out, "".join(lines))
    return len(rows)


def read(path: str | Path, template: str = TEMPLATES["jlora"]) -> list[Example]:
    """Read a file of either layout; `Example.keep` covers what follows the passage.

    Args:
        template: a format string with {question} and, at most once, {passage}; {title} if wanted.

    Raises:
        UserError: a line is malformed or has no answer, or the template cannot be used.
    """
    front, end = split_template(template)
    examples = []
    for row in read_rows(path, need_answers=True):
        fields = {"question": row.question, "title": row.title, "passage": row.passage}
        kept = end.format(**fields)
        answer = "true" if row.answer else "false"
        examples.append(Example(front.format(**fields) + kept, answer, keep=len(kept)))
    return examples


def split_template(template: str) -> tuple[str, str]:
    """Split a template after its passage; ("", template) if it has no passage.

    Raises:
        UserError: it is not a format string, or has an unknown field, no question or two passages.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"prompt template {template!r}: {error}; write {{{{ for a brace that is no field"
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(not spec and not conversion for _, _, spec, conversion in parts)
    if not plain or not set(names) <= set(FIELDS):
        raise UserError(
            f"prompt template {template!r}: its fields may be {', '.join(FIELDS)}, each as {{name}}"
        )
    if "question" not in names or names.count("passage") > 1:
        fault = "has no {question}" if "question" not in names else "has two passages"
        raise UserError(
            f"prompt template {template!r} {fault}; write one like {TEMPLATES['jlora']!r}"
        )
    if "passage" not in names:
        return "", template
    front, end = template.split("{passage}")
    return front + "{passage}", end


TASK = Task(
    name="boolq",
    read_file=read,
    metrics=("accuracy",),
    # The release has no test set with answers, so its development set serves as one.
    splits={
        "train": ("train.jsonl",),
        "valid": ("valid.jsonl", "val.jsonl"),
        "test": ("test.jsonl", "dev.jsonl"),
    },
    choices=("true", "false"),
    templates=TEMPLATES,
)
