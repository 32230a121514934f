"""E2E NLG (Novikova et al. 2017): restaurant descriptions from slots and values.

Three kinds of file are read: microsoft/LoRA's text (``context||target`` a line), the official CSV
(columns ``mr`` and ``ref``), and prompt/completion JSON Lines. The prompt is the same in all
three::

    name : Blue Spice | Type : coffee shop | area : city centre

References in the CSV are plain text, those in the text files are tokenised (spaces around
punctuation); both are left as they are.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from jlora.data.batches import Example
from jlora.data.readers import csv_rows, looks_like, text_lines
from jlora.data.tasks import Task
from jlora.data.tasks.jsonl import read_pairs
from jlora.system.errors import UserError

KINDS = (
    "`context||target` text, CSV with the columns mr and ref, "
    'JSON Lines with {"prompt": ..., "completion": ...}'
)

# The official slot names and what microsoft/LoRA's files call them.
SLOTS = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}

_SLOT = re.compile(r"\s*([^\[\],]+?)\s*\[([^\[\]]*)\]\s*")


def read_text_pairs(path: str | Path) -> list[Example]:
    """Read microsoft/LoRA's text: the line is stripped and split at ``||``, the target stripped.

    Raises:
        UserError: a line does not have exactly one ``||`` with text on both sides.
    """
    examples = []
    for number, line in text_lines(path):
        parts = line.strip().split("||")
        if len(parts) != 2:
            found = "no `||`" if len(parts) == 1 else f"{len(parts) - 1} times `||`"
            raise UserError(
                f"{path}:{number}: {found} in the line{looks_like(path) if not examples else ''}; "
                f"write `context||target` (read are: {KINDS})"
            )
        context, target = parts[0], parts[1].strip()
        if not context.strip() or not target:
            side = "target after" if context.strip() else "context before"
            raise UserError(f"{path}:{number}: no {side} `||`; write `context||target`")
        examples.append(Example(context, target))
    return examples


def meaning_to_prompt(meaning: str) -> str:
    """``name[Cocum], priceRange[£20-25]`` -> ``name : Cocum | price : £ 20 - 25``.

    Slots keep their order. Prices are spaced as in the text files; on the official development and
    test sets the result equals the context of valid.txt and test.txt in every row.

    Raises:
        ValueError: it does not have this form, or has a slot that E2E does not have.
    """
    slots = []
    position = 0
    while True:
        match = _SLOT.match(meaning, position)
        if match is None:
            raise ValueError(f"expected `slot[value]` at {meaning[position : position + 30]!r}")
        slot, value = match.group(1), match.group(2).strip()
        if slot not in SLOTS:
            raise ValueError(f"unknown slot {slot!r}; E2E has {', '.join(SLOTS)}")
        if slot == "priceRange":
            value = re.sub(r"£(?=\d)", "£ ", value)
            value = re.sub(r"(?<=\d)-(?=\d)", " - ", value)
        slots.append(f"{SLOTS[slot]} : {value}")
        position = match.end()
        if position == len(meaning):
            return " | ".join(slots)
        if meaning[position] != ",":
            raise ValueError(f"expected a comma at {meaning[position : position + 30]!r}")
        position += 1


def read_csv_pairs(path: str | Path) -> list[Example]:
    """Read the official CSV (columns ``mr`` and ``ref``).

    Raises:
        UserError: a column is missing or a row is malformed (with file and line).
    """
    examples = []
    for number, (meaning, reference) in csv_rows(path, ("mr", "ref")):
        try:
            prompt = meaning_to_prompt(meaning)
        except ValueError as error:
            raise UserError(f"{path}:{number}: column mr: {error}") from error
        if not reference.strip():
            raise UserError(f"{path}:{number}: column ref is empty; remove the row")
        examples.append(Example(prompt, reference.strip()))
    return examples


def detect_reader(path: str | Path):
    """Choose the reader by the first line, then by the file's extension.

    Raises:
        UserError: the file is of none of the three kinds.
    """
    number, first = next(text_lines(path))
    if first.lstrip().startswith("{"):
        return read_pairs
    try:
        header = [name.strip() for name in next(csv.reader([first]))]
    except csv.Error:
        header = []
    if "mr" in header and "ref" in header:
        return read_csv_pairs
    if "||" in first:
        return read_text_pairs
    # The first line has an error: the reader for the file's extension says which.
    by_extension = {".csv": read_csv_pairs, ".jsonl": read_pairs, ".txt": read_text_pairs}
    reader = by_extension.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(
            f"{path}:{number}: not a file of E2E data{looks_like(path)}; read are: {KINDS}"
        )
    return reader


def read(path: str | Path) -> list[Example]:
    """Read a file of any of the three kinds.

    Raises:
        UserError: it is of none of them, has a malformed line, or has no examples.
    """
    examples = detect_reader(path)(path)
    if not examples:
        raise UserError(f"{path}: no examples after the header; give a file with some")
    return examples


TASK = Task(
    name="e2e",
    read_file=read,
    metrics=("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"),
    splits={
        "train": ("train.txt", "trainset.csv", "train.csv", "train.jsonl"),
        "valid": ("valid.txt", "devset.csv", "valid.csv", "valid.jsonl"),
        "test": ("test.txt", "testset_w_refs.csv", "test.csv", "test.jsonl"),
    },
)
