"""Reading hypotheses and references as the official E2E script does, and answers of a choice."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from jlora.system.errors import UserError
from jlora.system.files import read_text

SOURCE_HEADERS = {"mr", "src", "source", "meaning", "meaning rep", "meaning representation"}
REFERENCE_HEADERS = {"ref", "reference", "trg", "tgt", "target", "human", "human ref"}
# Wrongly decoded pound signs and accents that stand in the published CSV files.
MOJIBAKE = (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é"))


def read_hypotheses(path: str | Path) -> list[str]:
    """Read one hypothesis a line; an empty line is an empty hypothesis.

    Raises:
        UserError: the file is unreadable, empty, or a table.
    """
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise UserError(
            f"{path}: hypotheses are read from plain text, one a line, not from a table"
        )
    return [line.strip() for line in _lines(path)]


def read_references(path: str | Path) -> list[list[str]]:
    """Read groups of references, in the order of the inputs.

    Plain text: one reference a line, groups separated by one empty line; a file without any empty
    line has one reference for each input. ``.csv`` and ``.tsv``: a header line with the columns
    ``mr`` and ``ref`` (or source and reference); consecutive rows of the same ``mr`` are a group.

    Raises:
        UserError: the file is unreadable or empty, a group has no reference, or a table has no such
            columns or a broken row, with the line.
    """
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
    """Read the right answers of a task that is a choice, one a line.

    Raises:
        UserError: the file is unreadable or empty, or a line is none of ``choices``.
    """
    answers = read_hypotheses(path)
    for number, answer in enumerate(answers, start=1):
        if answer not in choices:
            raise UserError(
                f"{path}:{number}: {answer[:60]!r} is no answer; write {' or '.join(choices)}"
            )
    return answers


def _lines(path: str | Path) -> list[str]:
    # splitlines also ends a line at the rarer separators (U+2028 and so on), as the official
    # script and the Java tokeniser do.
    lines = read_text(path).splitlines()
    if not lines:
        raise UserError(f"{path}: the file is empty")
    return lines


def _table_references(path: str | Path) -> list[list[str]]:
    numbered = [
        (number, _repair(line.strip()))
        for number, line in enumerate(_lines(path), start=1)
        if line.strip("\ufeff \t")
    ]
    if not numbered:
        raise UserError(f"{path}: the file is empty")
    numbers, lines = zip(*numbered)
    reader = csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",", strict=True)
    groups: list[list[str]] = []
    previous = None
    try:
        header = next(reader)
        source, reference = (
            _column(path, header, names) for names in (SOURCE_HEADERS, REFERENCE_HEADERS)
        )
        for row in reader:
            if len(row) != len(header):
                raise UserError(
                    f"{path}:{numbers[reader.line_num - 1]}: {len(row)} columns where the header "
                    f"has {len(header)}; quote fields that contain the separator"
                )
            if row[source] != previous or not groups:
                groups.append([])
                previous = row[source]
            groups[-1].append(row[reference])
    except csv.Error as error:
        line = numbers[max(reader.line_num, 1) - 1]
        raise UserError(f"{path}:{line}: not a readable CSV row ({error})") from error
    if not groups:
        raise UserError(f"{path}: a header but no references")
    return groups


def _repair(line: str) -> str:
    line = line.replace("\ufeff", "")
    for wrong, right in MOJIBAKE:
        line = line.replace(wrong, right)
    return line


def _column(path: str | Path, header: list[str], names: set[str]) -> int:
    plain = [re.sub(r"[_ .-]+", " ", field.strip().lower()) for field in header]
    found = [index for index, field in enumerate(plain) if field.rstrip("s") in names]
    if len(found) != 1:
        raise UserError(
            f"{path}:1: {len(found)} columns named like {' or '.join(sorted(names)[:3])} in the "
            f"header {','.join(header)[:80]}; the header of an E2E table is mr,ref"
        )
    return found[0]
