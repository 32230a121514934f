"""DART v1.1.1 (Nan et al. 2021): texts for triples from tables and other datasets.

Prepared as by microsoft/LoRA's `format_converting_dart.py`: one example for each annotation; the
prompt is the triples with the relation in lower case::

    Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina

Prompt/completion JSON Lines are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.data.batches import Example
from jlora.data.readers import json_document
from jlora.data.tasks import Task
from jlora.data.tasks.jsonl import holds_pairs, read_pairs
from jlora.data.tasks.webnlg import METRICS, check_text, read_entries, triples_to_prompt
from jlora.system.errors import UserError, kind_of


def entry_prompt(entry: dict[str, Any]) -> str:
    """The prompt of one entry, ``{"tripleset": [[subject, relation, object], ...], ...}``.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the entry has an unexpected shape.
    """
    return triples_to_prompt(
        [
            (subject, check_text(relation).lower(), value)
            for subject, relation, value in entry["tripleset"]
        ]
    )


def entry_examples(entry: dict[str, Any]) -> Iterator[Example]:
    """The examples of one entry.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the entry has an unexpected shape.
    """
    prompt = entry_prompt(entry)
    for annotation in entry["annotations"]:
        yield Example(prompt, check_text(annotation["text"]))


def read(path: str | Path) -> list[Example]:
    """Read DART's JSON, or prompt/completion JSON Lines.

    Raises:
        UserError: it is neither, or an entry has an unexpected shape (with its number, from 1).
    """
    if holds_pairs(path):
        return read_pairs(path)
    forms = "give DART's JSON, or prompt/completion JSON Lines named .jsonl"
    document = json_document(path, forms)
    if not isinstance(document, list):
        raise UserError(f"{path}: no list of entries but {kind_of(document)}; {forms}")
    return read_entries(path, document, entry_examples)


# `jlora pull` keeps the release's own file names.
TASK = Task(
    name="dart",
    read_file=read,
    metrics=METRICS,
    splits={
        "train": ("train.json", "dart-v1.1.1-full-train.json", "train.jsonl"),
        "valid": ("valid.json", "dev.json", "dart-v1.1.1-full-dev.json", "valid.jsonl"),
        "test": ("test.json", "dart-v1.1.1-full-test.json", "test.jsonl"),
    },
)
