"""Reading hypotheses, references (as the official E2E script does) and the answers of a choice."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from jlora.system.errors import UserError
from jlora.system.files import read_text
from jlora.system.text import lines_of

SOURCE_HEADERS = {"mr", "src", "source", "meaning", "meaning rep", "meaning representation"}
REFERENCE_HEADERS = {"ref", "reference", "trg", "tgt", "target", "human", "human ref"}
# Wrongly decoded pound signs and accents in the published CSV files. The official script takes
# every Ł for a pound sign; Polish texts have it in words.
MOJIBAKE = ((r"Ł(?=\s?\d)", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


def read_hypotheses(path: str | Path) -> list[str]:
    """Read one hypothesis a line; an empty line is an empty hypothesis.

    Raises:
        UserError: the file is unreadable or empty, or by its name a table or JSON.
    """
    kind = Path(path).suffix.lower()
    if kind in (".csv", ".tsv"):
        raise UserError(
            f"{path}: hypotheses are read from plain text, one a line, not from a table"
        )
    if kind in (".json", ".jsonl"):
        # Read as plain text, the JSON itself would be scored.
        raise UserError(
            f"{path}: read from here is plain text, one text a line, not JSON; `jlora generate "
            "--out` writes the texts of NAME.jsonl to NAME.txt"
        )
    return [line.strip() for line in _lines(path)]


def read_references(path: str | Path) -> list[list[str]]:
    """Read groups of references, in the order of the inputs.

    Plain text: one reference a line, groups separated by one empty line; a file without any empty
    line has one reference for each input. ``.csv`` and ``.tsv``: a header line with the columns
    ``mr`` and ``ref`` (or source and reference); consecutive rows of the same ``mr`` are a group.

    Raises:
        UserError: the file is unreadable or empty, by its name JSON, a group has no reference, or a
            table has no such columns or a broken row, with the line.
    """
    if Path(path).suffix.lower() in (".json", ".jsonl"):
        raise UserError(
            f"{path}: references are read from plain text (one a line, inputs separated by an "
            "empty line) or from a .csv or .tsv table with the columns mr and ref, not from JSON"
        )
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        return _table_references(path)
    lines = [line.strip() for line in _lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: no references, only empty lines")
    groups: list[list[str]] = [[]]
    for number, line in enumerate(lines, start=1):
        if line:
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
        else:
            raise UserError(
                f"{path}:{number}: a group without references (an empty line at the start, or two "
                "in a row); separate groups by one empty line"
            )
    return [[line] for line in groups[0]] if len(groups) == 1 else groups


def read_answers(path: str | Path, choices: Sequence[str]) -> list[str]:
    """Read the right answers of a task that is a choice between answers, one a line.

    Raises:
        UserError: the file is unreadable or empty, or a line is not one of ``choices``.
    """
    answers = read_hypotheses(path)
    for number, answer in enumerate(answers, start=1):
        if answer not in choices:
            raise UserError(
                f"{path}:{number}: {answer[:60]!r} is no answer; write {' or '.join(choices)}"
            )
    return answers


def _lines(path: str | Path) -> list[str]:
    lines = lines_of(read_text(path))
    if not lines:
        raise UserError(f"{path}: the file is empty")
    return lines


def _table_references(path: str | Path) -> list[list[str]]:
    text = read_text(path).replace("\ufeff", "")
    for wrong, right in MOJIBAKE:
        text = re.sub(wrong, right, text)
    first = next((line for line in lines_of(text) if line.strip()), None)
    if first is None:
        raise UserError(f"{path}: the file is empty")
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter="\t" if "\t" in first else ",", strict=True)
    header: list[str] = []
    groups: list[list[str]] = []
    previous = None
    start = 1
    try:
        for row in reader:
            # Quoted fields may contain line ends: a row starts after the last line of the one
            # before.
            number, start = start, reader.line_num + 1
            row = [field.strip() for field in row]
            if not any(row):
                continue
            if not header:
                header = row
                source, reference = (
                    _column(f"{path}:{number}", header, names)
                    for names in (SOURCE_HEADERS, REFERENCE_HEADERS)
                )
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}:{number}: {len(row)} columns where the header "
                    f"has {len(header)}; quote fields that contain the separator"
                )
            if row[source] != previous or not groups:
                groups.append([])
                previous = row[source]
            groups[-1].append(row[reference])
    except csv.Error as error:
        raise UserError(f"{path}:{start}: not a readable CSV row ({error})") from error
    if not groups:
        raise UserError(f"{path}: a header but no references")
    return groups


def _column(where: str, header: list[str], names: set[str]) -> int:
    plain = [re.sub(r"[_ .-]+", " ", field.strip().lower()) for field in header]
    found = [index for index, field in enumerate(plain) if field.rstrip("s") in names]
    if len(found) != 1:
        raise UserError(
            f"{where}: {len(found)} columns named like {' or '.join(sorted(names)[:3])} in the "
            f"header {','.join(header)[:80]}; the header of an E2E table is mr,ref"
        )
    return found[0]
