"""Any dataset as JSON Lines: one ``{"prompt": "...", "completion": "..."}`` a line."""

from __future__ import annotations

from pathlib import Path

from jlora.data import Example, json_lines, string_field
from jlora.errors import UserError
from jlora.tasks import Task


def read_pairs(path: str | Path) -> list[Example]:
    """Read prompt/completion JSON Lines; other keys are ignored, completions are stripped.

    Raises:
        UserError: a line is not such an object, or a completion is empty (with file and line).
    """
    examples = []
    for number, row in json_lines(path):
        prompt = string_field(row, "prompt", path, number)
        completion = string_field(row, "completion", path, number).strip()
        if not completion:
            raise UserError(f"{path}:{number}: the completion is empty; remove the line")
        examples.append(Example(prompt, completion))
    return examples


TASK = Task(
    name="jsonl",
    read=read_pairs,
    metrics=("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"),
    splits={split: (f"{split}.jsonl",) for split in ("train", "valid", "test")},
)
