"""Texts of several models side by side, with the differences from the reference marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from jlora.data.readers import json_lines, string_field
from jlora.report.runs import PREDICTIONS_NAME, RunSummary
from jlora.report.tables import pick, slots
from jlora.system.errors import UserError

BEFORE_NAME = "predictions_before.jsonl"
LONGEST_PROMPT = 700  # characters shown
LONGEST_DIFF = 400  # words compared
# Texts with a smaller share of common words are not marked: almost every word would be.
ALIKE = 0.35
SHORT = 3  # words; two texts of at most this length, such as answers, are always marked

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

References = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Output:
    """A text of one model as HTML; ``is_before``: of the model before training."""

    label: str
    html: Markup
    is_before: bool = False


@dataclass(frozen=True)
class Shown:
    """One input of the page; ``slots`` as `jlora.report.tables.slots` gives them."""

    prompt: str
    slots: list[tuple[str, str]] | None
    reference: str | None
    note: str
    outputs: list[Output]


def shown_samples(
    runs: Sequence[RunSummary], references: References | None, count: int
) -> list[Shown]:
    """``count`` inputs, evenly spaced, that all ``runs`` (of one task) answered.

    If some inputs were also answered before training, only those are shown.

    Args:
        references: target texts by prompt, for predictions without ``references``; None: those of
            the run's test data, if it can still be found.

    Raises:
        UserError: a file of predictions is damaged.
    """
    columns: list[tuple[str, bool, dict[str, str]]] = []
    found: dict[str, Sequence[str]] = {}
    models = set()
    for run in runs:
        after = _predictions(run.folder / PREDICTIONS_NAME, found)
        if not after:
            continue
        before = {} if run.model in models else _predictions(run.folder / BEFORE_NAME, {})
        if before:
            models.add(run.model)
            columns.append(
                ("Before" if len(runs) == 1 else f"{run.model}, untouched", True, before)
            )
        alone = "After" if before else "Output"
        columns.append((alone if len(runs) == 1 else run.name, False, after))
    if not columns:
        return []
    prompts = [prompt for prompt in columns[0][2] if all(prompt in texts for *_, texts in columns)]
    chosen = pick(prompts, count)
    if any(prompt not in found for prompt in chosen):
        outside = task_references(runs[0]) if references is None else references
        found = {**outside, **found}
    return [_shown(prompt, columns, found.get(prompt, ())) for prompt in chosen]


def marked(text: str, reference: str) -> Markup:
    """``text`` with ``<ins>`` around words not in the reference, and ``<del>`` for missing words.

    Words are compared without regard to case and spacing. A text that has little in common with
    the reference, or is very long, is not marked.
    """
    ours, theirs = list(_WORD.finditer(text)), list(_WORD.finditer(reference))
    words = [[match.group().casefold() for match in side] for side in (ours, theirs)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    longest = max(map(len, words))
    if longest > LONGEST_DIFF or (longest > SHORT and matcher.ratio() < ALIKE):
        return escape(text)
    parts, place = [], 0
    for kind, start, end, their_start, their_end in matcher.get_opcodes():
        if kind in ("replace", "insert"):  # words of the reference that are missing here
            missing = reference[theirs[their_start].start() : theirs[their_end - 1].end()]
            gap = " " if place else ""
            parts.append(Markup("{}<del>{}</del>").format(gap, missing))
            if not place and kind == "insert":
                parts.append(escape(" "))
        if kind != "insert":
            first, last = ours[start].start(), ours[end - 1].end()
            space = text[place:first] or (" " if kind == "replace" else "")
            tag = "{}{}" if kind == "equal" else "{}<ins>{}</ins>"
            parts.append(Markup(tag).format(space, text[first:last]))
            place = last
    return Markup("").join([*parts, escape(text[place:])])


def task_references(run: RunSummary) -> dict[str, list[str]]:
    """References of the run's test inputs by prompt; {} if its data are not found."""
    from jlora.data.tasks import get_task

    file, folder = run.setting("data.test"), run.setting("data.folder")
    if not run.task or not all(path is None or isinstance(path, str) for path in (file, folder)):
        return {}
    try:
        task = get_task(run.task)
        examples = task.read(file) if file else task.load(folder, "test")
        return {group.prompt: group.references for group in task.groups(examples)}
    except UserError:
        return {}


def _predictions(path: Path, references: dict[str, Sequence[str]]) -> dict[str, str]:
    """Predictions by prompt, {} if the file is missing; adds its references to ``references``."""
    if not path.exists():
        return {}
    texts = {}
    for number, row in json_lines(path):
        prompt = string_field(row, "prompt", path, number)
        found = row.get("references") or []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise UserError(f"{path}:{number}: 'references' is not a list of strings")
        if found:
            references.setdefault(prompt, found)
        texts[prompt] = string_field(row, "prediction", path, number).strip()
    return texts


def _shown(
    prompt: str, columns: Sequence[tuple[str, bool, dict[str, str]]], references: Sequence[str]
) -> Shown:
    tuned = next(texts[prompt] for _, is_before, texts in columns if not is_before)
    reference = _nearest(tuned, references)
    outputs = [
        Output(
            label,
            marked(texts[prompt], reference)
            if reference and texts[prompt]
            else escape(texts[prompt]),
            is_before,
        )
        for label, is_before, texts in columns
    ]
    text = prompt.strip()
    if len(text) > LONGEST_PROMPT:  # a passage has its question at the end
        text = text[: LONGEST_PROMPT // 2].rstrip() + " … " + text[-LONGEST_PROMPT // 2 :].lstrip()
    note = f"the nearest of {len(references)}" if len(references) > 1 else ""
    return Shown(text, slots(text), reference, note, outputs)


def _nearest(text: str, references: Sequence[str]) -> str | None:
    """The reference with most words in common with ``text``; None if there are none."""
    words = [match.group().casefold() for match in _WORD.finditer(text)][:LONGEST_DIFF]

    def likeness(reference: str) -> float:
        theirs = [match.group().casefold() for match in _WORD.finditer(reference)][:LONGEST_DIFF]
        return difflib.SequenceMatcher(None, words, theirs, autojunk=False).ratio()

    return max(references, key=likeness).strip() if references else None
