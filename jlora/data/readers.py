"""Text, JSON, JSON Lines and CSV files, line by line, with errors that name file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError
from jlora.system.files import read_text


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) for every line that is not blank.

    A byte order mark at the start is dropped. Only ``\\n`` and ``\\r\\n`` end a line.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has nothing in it.
    """
    text = _text_without_mark(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON Lines file.

    Raises:
        UserError: as `text_lines`, or a line is not a JSON object.
    """
    for number, line in text_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise UserError(
                f"{path}:{number}: not JSON ({reason}); write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: a JSON {type(row).__name__}, not an object; "
                'write one object a line, as {"prompt": "...", "completion": "..."}'
            )
        yield number, row


def json_document(path: str | Path) -> Any:
    """The one JSON value that a file holds.

    Raises:
        UserError: as `text_lines`, or it is not JSON (with the line).
    """
    try:
        return json.loads(_text_without_mark(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); mend it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); mend it") from error


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, values of ``columns``) for every row of a CSV file with a header.

    Raises:
        UserError: as `text_lines`, or a column is missing, or a row has another number of fields
            than the header.
    """
    text = _text_without_mark(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    wanted: list[int] = []
    width = 0
    start = 1
    try:
        for row in reader:
            # A quoted field may hold line ends; the row starts after the previous one's last line.
            number, start = start, reader.line_num + 1
            if not row:
                continue
            if not wanted:
                header = [name.strip() for name in row]
                missing = [name for name in columns if name not in header]
                if missing:
                    raise UserError(
                        f"{path}:{number}: no column {' or '.join(missing)} in the header "
                        f"({shorten(', '.join(header), 60)}); needed are {', '.join(columns)}"
                    )
                wanted = [header.index(name) for name in columns]
                width = len(header)
                continue
            if len(row) != width:
                raise UserError(
                    f"{path}:{number}: {len(row)} fields, and the header has {width}; "
                    'put "quotes" round a field that holds a comma'
                )
            yield number, [row[index] for index in wanted]
    except csv.Error as error:
        raise UserError(f"{path}:{start}: broken CSV ({error}); check the quotes") from error


def _text_without_mark(path: str | Path) -> str:
    text = read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise UserError(f"{path}: the file is empty; give one with examples")
    return text


def string_field(row: dict[str, Any], key: str, path: str | Path, number: int) -> str:
    """The text under ``key`` of a JSON object.

    Raises:
        UserError: it is missing or not a string (with file and line).
    """
    if key not in row:
        found = shorten(", ".join(map(str, row)), 60) or "none"
        raise UserError(f"{path}:{number}: no key {key!r} (found: {found})")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: {key!r} is a {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair, which no tokenizer or file takes.
        raise UserError(
            f"{path}:{number}: {key!r} holds half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is no character; remove it"
        ) from error
    return value


def shorten(text: str, width: int = 40) -> str:
    text = " ".join(text.split())  # a message is one line
    return text if len(text) <= width else text[: width - 3] + "..."
