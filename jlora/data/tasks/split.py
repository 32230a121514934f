"""Seeded splits of a dataset's file, such that no input is in two parts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.readers import json_document, json_lines, looks_like, text_lines
from jlora.data.tasks import dart, webnlg
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, check_absent

PARTS = {2: ("train", "test"), 3: ("train", "valid", "test")}


@dataclass(frozen=True)
class Part:
    """One part of a split: its file, its distinct inputs, and its rows (lines or entries)."""

    path: Path
    inputs: int
    rows: int


def split_file(
    path: str | Path, folder: str | Path, sizes: Sequence[int], seed: int = 0
) -> list[Part]:
    """Split a file into train, valid and test (two sizes: train and test).

    The file may be JSON Lines (BoolQ's, prompt/completion), ``context||target`` text, or the JSON
    of WebNLG or DART. Inputs are drawn with equal probability, as a function of the file and the
    seed. All rows of an input go to the same part, in the file's order, and are written unchanged,
    but WebNLG's entries are numbered anew in each part.

    Args:
        folder: new or empty; either all parts are written to it or none.
        sizes: the number of distinct inputs of each part. Remaining inputs are left out.

    Raises:
        UserError: the file is of no such kind or has fewer inputs, or ``folder`` is not empty.
    """
    if len(sizes) not in PARTS or any(size < 1 for size in sizes):
        raise UserError(
            f"sizes {','.join(map(str, sizes))}: give two or three whole numbers from 1, for "
            "train,test or train,valid,test"
        )
    check_absent(folder)
    rows_of, write = read_groups(path)
    if sum(sizes) > len(rows_of):
        raise UserError(
            f"{path} has {len(rows_of):,} distinct inputs, fewer than the {sum(sizes):,} asked for "
            f"({' + '.join(map(str, sizes))}); ask for fewer"
        )
    # Only random() gives the same numbers in every Python version.
    dice = random.Random(seed)
    order = sorted(rows_of, key=lambda _: dice.random())
    parts = []
    with atomic_path(folder, directory=True) as temporary:
        for name, size in zip(PARTS[len(sizes)], sizes):
            taken, order = order[:size], order[size:]
            rows = [row for key in taken for row in rows_of[key]]
            file = f"{name}{Path(path).suffix}"
            (temporary / file).write_text(write(rows), encoding="utf-8")
            parts.append(Part(Path(folder) / file, size, len(rows)))
    return parts


def read_groups(path: str | Path) -> tuple[dict[Any, list[Any]], Any]:
    """The rows of each input, and the function that joins rows to the text of a file.

    Raises:
        UserError: the file is of a kind that cannot be split.
    """
    first = next(text_lines(path))[1].strip()
    if "||" in first and not first.startswith(("{", "[")):
        rows = [(line.split("||")[0].strip(), line) for _, line in text_lines(path)]
        return group(rows), join_lines
    if is_object(first) and '"entries"' not in first:
        lines = dict(text_lines(path))
        return group([(row_key(row), lines[n]) for n, row in json_lines(path)]), join_lines
    if not first.startswith(("{", "[")):
        raise UserError(
            f"{path}: not of a kind that can be split{looks_like(path)}; give JSON Lines, "
            "`context||target` text, or the JSON of WebNLG or DART"
        )
    document = json_document(path)
    if isinstance(document, dict):
        webnlg.read(path)  # raises if anything is wrong
        rows = [(webnlg.entry_prompt(entry), entry) for entry in document["entries"]]
        return group(rows), join_webnlg
    dart.read(path)
    return group([(dart.entry_prompt(entry), entry) for entry in document]), join_json


def is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def row_key(row: dict[str, Any]) -> str:
    """The part of a JSON Lines row that is its input: all but the answer and the row's number."""
    if "prompt" in row:
        return str(row["prompt"])
    return json.dumps({k: v for k, v in row.items() if k not in ("answer", "label", "idx")})


def group(rows: Sequence[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """(key, row) pairs as lists of rows by key, in the order in which keys are first seen."""
    groups: dict[Any, list[Any]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return groups


def join_lines(lines: Sequence[str]) -> str:
    return "".join(line + "\n" for line in lines)


def join_json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def join_webnlg(entries: Sequence[dict[str, Any]]) -> str:
    """Entries numbered from "1", as microsoft/LoRA's converter expects them to be."""
    renumbered = [
        {str(number): next(iter(entry.values()))} for number, entry in enumerate(entries, start=1)
    ]
    return join_json({"entries": renumbered})
