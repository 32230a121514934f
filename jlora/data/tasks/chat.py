"""Conversations, instructions, pairs and whole texts, told by their keys (`conversations`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jlora.data.conversations import Conversation, holds_conversations, read_conversations
from jlora.data.rows import SUFFIXES
from jlora.data.tasks import ReferenceGroup, Task
from jlora.system.errors import UserError

NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}


@dataclass(frozen=True)
class AskedGroup(ReferenceGroup):
    """A test input with its references, and the conversation that it is the end of."""

    asked: Conversation | None = None


@dataclass(frozen=True)
class ChatTask(Task):
    def groups(self, examples: Sequence[Conversation]) -> list[ReferenceGroup]:
        """Conversations that end with an answer, without it; equal ones are one group.

        The prompt is what was said last, or everything if it is more than that. Of whole texts it
        is the question, without the space that the first word of an answer brings along.
        """
        found: dict[str, AskedGroup] = {}
        for row in examples:
            if row.question is not None:
                prompt, answer = row.text[: row.question].rstrip(" "), row.text[row.question :]
                found.setdefault(prompt, AskedGroup(prompt, [], asked=row))
                found[prompt].references.append(answer.strip())
                continue
            if row.text is not None or row.answers[-1] != len(row.messages) - 1:
                continue
            before = row.messages[:-1]
            key = repr((before, row.tools))
            if key not in found:
                asked = replace(row, messages=before, answers=())
                said = [f"{message['role']}: {message['content']}" for message in before]
                prompt = before[0]["content"] if len(before) == 1 else "\n".join(said)
                found[key] = AskedGroup(prompt, [], asked=asked)
            found[key].references.append(row.messages[-1]["content"])
        return list(found.values())


def guess_task(folder: str | Path | None, file: str | Path | None) -> str | None:
    """Which task reads data that nobody named: ``chat`` by name and keys, or None.

    Args:
        folder, file: what ``--data`` says; a file goes before the folder.

    Raises:
        UserError: a table's first row cannot be read.
    """
    path = None if file is None else Path(file)
    if path is None:
        try:
            path = TASK.find_data(folder, "train") if folder is not None else None
        except UserError:
            return None
        if path is None or (path.parent / "train.txt").is_file():
            return None  # E2E's own file goes first
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    if path.suffix.lower() == ".csv" and not holds_conversations(path):
        return None
    return TASK.name


TASK = ChatTask(
    name="chat",
    read_file=read_conversations,
    metrics=("exact_match",),
    splits={
        split: tuple(f"{name}{suffix}" for name in names for suffix in SUFFIXES)
        for split, names in NAMES.items()
    },
)
