"""Reading text, JSON, JSON Lines and CSV files; errors name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError, kind_of
from jlora.system.files import read_text
from jlora.system.text import BYTE_ORDER_MARK, lines_of

#: Longest field of a CSV file; Python's own limit is shorter than some texts.
csv.field_size_limit(1 << 30)
#: A line of prompt/completion JSON Lines.
PAIRS = '{"prompt": "...", "completion": "..."}'
#: Rows that `jlora.data.conversations` reads: the keys that tell them, and what they are.
LAYOUTS = (
    ({"messages"}, "a chat in messages"),
    ({"conversations"}, "a chat in ShareGPT's form"),
    ({"instruction", "output"}, "an instruction in Alpaca's form"),
    ({"text"}, "a whole text without a prompt"),
)


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) for every line that is not blank.

    Only ``\\n`` and ``\\r\\n`` end a line (see `jlora.system.text.lines_of`).

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is empty.
    """
    for number, line in enumerate(lines_of(file_text(path)), start=1):
        if line.strip():
            yield number, line


def json_lines(
    path: str | Path,
    form: str = PAIRS,
    pairs_hook: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of a JSON Lines file.

    Args:
        form: an example of a line, for the message.
        pairs_hook: makes the objects, as in `json.loads`.

    Raises:
        UserError: as `text_lines`, or a line is not a JSON object; says what the file looks like.
    """
    is_first = True
    for number, line in text_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=pairs_hook)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            looks = looks_like(path) if is_first else ""
            raise UserError(
                f"{path}:{number}: not JSON ({reason}){looks}; write one object a line, as {form}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: a JSON {kind_of(row).split()[-1]}, not an object; "
                f"write one object a line, as {form}"
            )
        is_first = False
        yield number, row


def json_document(path: str | Path, way_out: str = "fix the file") -> Any:
    """The JSON value that a file consists of.

    Args:
        way_out: the end of the message: what to do, or which file to give.

    Raises:
        UserError: as `text_lines`, or it is not JSON (with the line); says what it looks like.
    """
    try:
        return json.loads(file_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}){looks_like(path)}; {way_out}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {way_out}") from error


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, values of ``columns``) for every row of a CSV file with a header.

    Raises:
        UserError: as `text_lines`, or a column is missing, or the number of fields in a row is not
            that of the header.
    """
    table = _csv_table(path)
    number, header = next(table)
    missing = [name for name in columns if name not in header]
    if missing:
        needed = ", ".join(columns) + ("" if len(header) > 1 else ", commas between")
        raise UserError(
            f"{path}:{number}: no column {' or '.join(missing)} in the header "
            f"({shorten(', '.join(header), 60)}); needed are {needed}"
        )
    wanted = [header.index(name) for name in columns]
    for number, row in table:
        yield number, [row[index] for index in wanted]


def csv_objects(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number from 1, {column: value}) for every row of a CSV file with a header.

    Raises:
        UserError: as `csv_rows`, or two columns have one name.
    """
    table = _csv_table(path)
    number, header = next(table)
    for name, count in Counter(header).items():
        if count > 1:
            raise UserError(f"{path}:{number}: the column {name!r} stands twice; rename one")
    for number, row in table:
        yield number, dict(zip(header, row))


def _csv_table(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a CSV file: first the header's names, then its rows."""
    text = file_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    width = 0
    start = 1
    try:
        for row in reader:
            # Quoted fields may contain line ends: a row starts after the last line of the one
            # before.
            number, start = start, reader.line_num + 1
            if not row:
                continue
            if not width:
                width = len(row)
                yield number, [name.strip() for name in row]
                continue
            if len(row) != width:
                raise UserError(
                    f"{path}:{number}: {len(row)} fields, and the header has {width}; "
                    'put "quotes" round a field that holds a comma'
                )
            yield number, row
    except csv.Error as error:
        raise UserError(f"{path}:{start}: broken CSV ({error}); check the quotes") from error


def file_text(path: str | Path) -> str:
    """The content of a text file.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is empty.
    """
    text = read_text(path)
    if not text.replace(BYTE_ORDER_MARK, "").strip():
        raise UserError(f"{path}: the file is empty; give one with examples")
    return text


def string_field(
    row: dict[str, Any], key: str, path: str | Path, number: int, form: str = PAIRS
) -> str:
    """The text under ``key`` of a JSON object.

    Args:
        form: an example of a whole row, for the message.

    Raises:
        UserError: it is missing or not a string (with file and line).
    """
    if key not in row:
        found = shorten(", ".join(map(str, row)), 60) or "none"
        looks = next((what for keys, what in LAYOUTS if keys <= set(row)), "")
        looks = looks and f"; this is {looks}, which task chat reads"
        raise UserError(
            f"{path}:{number}: no key {key!r} (found: {found}){looks}; write rows as {form}"
        )
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: {key!r} is {kind_of(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can contain half of a surrogate pair, which tokenizers and files cannot.
        raise UserError(
            f"{path}:{number}: {key!r} holds half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is no character; remove it"
        ) from error
    return value


def looks_like(path: str | Path) -> str:
    """``; the file looks like ...`` for a file that its reader cannot read; nothing if unclear."""
    text = file_text(path)
    lines = [line.strip() for line in lines_of(text) if line.strip()]
    what = _json_form(text, lines) if lines[0].startswith(("{", "[")) else _text_form(lines)
    if what.startswith("JSON with"):
        change = ".[]" if lines[0].startswith("[") else "."
        what += f" (`jq -c '{change}' {shlex.quote(str(path))}` makes JSON Lines of it)"
    return f"; the file looks like {what}" if what else ""


def _json_form(text: str, lines: Sequence[str]) -> str:
    objects = [_object(line) for line in lines[:2]]
    if all(objects):
        return f"JSON Lines with the keys {shorten(', '.join(objects[0]), 60)}"
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return ""  # a damaged line or value
    kind = "list" if lines[0].startswith("[") else "object"
    return f"JSON with one {kind} over several lines" if "\n" in text.lstrip()[:end] else ""


def _text_form(lines: Sequence[str]) -> str:
    first = lines[0]
    if first.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page or XML"
    if "||" in first:
        return "`context||target` text"
    for separator, name in ((",", "commas"), ("\t", "tabs"), (";", "semicolons")):
        columns = first.count(separator)
        if columns and len(lines) > 1 and lines[1].count(separator) >= columns:
            fields = shorten(", ".join(first.split(separator)), 60)
            return f"a table with {name} between the columns {fields}"
    return ""


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line is by itself."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def shorten(text: str, width: int = 40) -> str:
    text = " ".join(text.split())  # a message is one line
    return text if len(text) <= width else text[: width - 3] + "..."
