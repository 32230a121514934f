"""Rows of a data file as dicts, each with its place: JSON Lines, a JSON array, CSV or Parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.data.readers import csv_objects, file_text, json_lines
from jlora.system.errors import UserError, kind_of, one_line
from jlora.system.files import os_error
from jlora.system.text import check_no_pointer

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: A row beyond this is a whole file by mistake, and no model reads it.
MOST_CHARACTERS = 10_000_000

Row = tuple[str, dict[str, Any]]


def read_rows(path: str | Path, form: str) -> Iterator[Row]:
    """Yield (place such as ``train.jsonl:7``, row) for every row of a file.

    A ``.json`` file may hold an array of objects, or an object a line. Cells of CSV are strings.

    Args:
        form: an example of a row, for messages.

    Raises:
        UserError: the file cannot be read, a row is no object, has a key twice or is larger than
            `MOST_CHARACTERS`; names the line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix == ".csv":
        rows = ((f"{path}:{number}", row) for number, row in csv_objects(path))
    elif suffix == ".json" and file_text(path).lstrip().startswith("["):
        rows = _array_rows(path, form)
    elif suffix in (".json", ".jsonl"):
        rows = ((f"{path}:{number}", row) for number, row in json_lines(path, form, once))
    else:
        raise UserError(f"{path}: not a data file; give one that ends in {', '.join(SUFFIXES)}")
    for place, row in rows:
        size = characters(row)
        if size > MOST_CHARACTERS:
            raise UserError(
                f"{place}: a row of {size:,} characters, and at most {MOST_CHARACTERS:,} are read; "
                "divide it into several"
            )
        yield place, row


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``object_pairs_hook``: of a key given twice Python would keep one value.

    Raises:
        ValueError: there is such a key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def characters(value: Any) -> int:
    """About how many characters there are in a structure of dicts, lists and scalars."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + characters(each) for key, each in value.items())
    if isinstance(value, list):
        return sum(1 + characters(each) for each in value)
    return 8


def _array_rows(path: Path, form: str) -> Iterator[Row]:
    """The objects of a JSON array, one by one, so that each has its line."""
    text = file_text(path)
    decoder = json.JSONDecoder(object_pairs_hook=once)
    place, line, counted = _skip(text, text.index("[") + 1), 1, 0
    if text[place : place + 1] == "]":
        raise UserError(f"{path}: an empty list; give one with examples")
    while True:
        line += text.count("\n", counted, place)
        counted = place
        try:
            row, end = decoder.raw_decode(text, place)
            following = _skip(text, end)
            if text[following : following + 1] not in (",", "]"):
                raise ValueError("a comma or ] is missing behind this object")
        except (ValueError, RecursionError) as error:
            at = line + text.count("\n", place, getattr(error, "pos", place))
            reason = getattr(error, "msg", str(error))
            raise UserError(f"{path}:{at}: not JSON ({reason}); fix it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: {kind_of(row)} in the list; write rows as {form}")
        yield f"{path}:{line}", row
        if text[following] == "]":
            if text[following + 1 :].strip():
                raise UserError(
                    f"{path}:{line + text.count(chr(10), place, following)}: more text behind the "
                    "end of the list; remove it"
                )
            return
        place = _skip(text, following + 1)


def _skip(text: str, place: int) -> int:
    """The next place that is no white space of JSON's."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'jlora[parquet]'") from error
    try:
        with open(path, "rb") as handle:
            check_no_pointer(handle.read(64), path)
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except OSError as error:
        if error.errno is not None:
            raise os_error("read", path, error) from error
        raise _damaged(path, error) from error
    except (pyarrow.ArrowException, ValueError) as error:
        raise _damaged(path, error) from error
    if not number:
        raise UserError(f"{path}: the file is empty; give one with examples")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a Parquet file, or a damaged one ({one_line(error)[:100]}); download it again"
    )
