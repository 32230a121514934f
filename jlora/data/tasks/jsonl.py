"""Any dataset as JSON Lines: one ``{"prompt": "...", "completion": "..."}`` a line."""

from __future__ import annotations

from pathlib import Path

from jlora.data.batches import Example
from jlora.data.readers import json_lines, string_field, text_lines
from jlora.data.tasks import Task
from jlora.system.errors import UserError


def read_pairs(path: str | Path) -> list[Example]:
    """Read prompt/completion JSON Lines; completions are stripped.

    An optional ``"part"`` names the part of the dataset that a line belongs to (`Example.part`);
    other keys are ignored.

    Raises:
        UserError: a line is not such an object, or its completion is empty (with file and line).
    """
    examples = []
    for number, row in json_lines(path):
        prompt = string_field(row, "prompt", path, number)
        completion = string_field(row, "completion", path, number).strip()
        if not completion:
            raise UserError(f"{path}:{number}: the completion is empty; remove the line")
        part = None if row.get("part") is None else string_field(row, "part", path, number)
        examples.append(Example(prompt, completion, part))
    return examples


def holds_pairs(path: str | Path) -> bool:
    """Whether a file is prompt/completion JSON Lines, by its name or its first line.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    _, first = next(text_lines(path))
    return Path(path).suffix.lower() == ".jsonl" or first.lstrip().startswith('{"prompt"')


TASK = Task(
    name="jsonl",
    read_file=read_pairs,
    metrics=("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"),
    splits={split: (f"{split}.jsonl",) for split in ("train", "valid", "test")},
)
