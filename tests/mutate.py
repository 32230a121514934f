"""Changes that make hostile files from valid ones: of bytes, and of JSON's structure."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

#: Numbers that a length, an offset or a count may be replaced by.
HUGE = (
    *(0, 1, 2**15, 2**20, 2**26, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1),
)
#: Values that a JSON value may be replaced by.
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "a" * 5000, "../../evil", "/etc/passwd", "\x00"),
    *("\ud800", "\u2028\u200f", "1e5", "true", "(", "[a-", "F64", "BF16", "lora_A", [], {}),
    *([[]], [None], [0] * 300, [2**62, 2**62], [2**40, 0], [-1, -1], {"a": None}, {"": []}),
    *([1.5], ["x", "../x"], {"../x": 1}, [[[[[[]]]]]], [0, 2**63]),
)
JUNK = (
    *(b"\x00", b"\xff\xfe", b"\n", b"cos\nsystem\n", b"\x80\x04", b"PK\x05\x06", b"{", b"]", b'"'),
    *(
        b"../../",
        b"c__builtin__\neval\n",
        b"\xef\xbb\xbf",
        b"\\u0000",
        b"||",
        b",",
        b"&a *a",
        b"R.",
    ),
)
KINDS = ("flip", "cut", "drop", "number4", "number8", "byte", "repeat", "junk", "json", "json")

#: One change: its kind and two numbers that say where and what.
CHANGE = st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
CHANGES = st.lists(CHANGE, min_size=1, max_size=4)


def change(data: bytes, kind: str, a: int, b: int) -> bytes:
    """One change of a file; where a JSON change is impossible, bytes are changed."""
    if kind == "json":
        changed = change_json_file(data, a, b)
        if changed is not None:
            return changed
        kind = KINDS[b % 8]
    if not data:
        return JUNK[b % len(JUNK)]
    at, rest = a % len(data), len(data) - a % len(data)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << b % 8]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + 1 + b % 40 :]
    if kind in ("number4", "number8"):
        width = int(kind[-1])
        number = (HUGE[b % len(HUGE)] % 2 ** (8 * width)).to_bytes(width, "little")
        return data[:at] + number[:rest] + data[at + width :]
    if kind == "byte":
        return data[:at] + bytes([b % 256]) + data[at + 1 :]
    if kind == "repeat":
        piece = data[at : at + 1 + b % 200]
        return data[:at] + piece * (1 + b % 9) + data[at:]
    return data[:at] + JUNK[b % len(JUNK)] + data[at:]


def change_json_file(data: bytes, a: int, b: int) -> bytes | None:
    """Change a value in a JSON file, a line of JSON Lines, or the header of safetensors."""
    if len(data) > 8 and data[8:9] == b"{":
        (length,) = struct.unpack("<Q", data[:8])
        text = _change_text(data[8 : 8 + length], a, b) if length < len(data) else None
        if text is not None:
            return struct.pack("<Q", len(text)) + text + data[8 + length :]
    whole = _change_text(data, a, b)
    if whole is not None:
        return whole
    lines = data.split(b"\n")
    number = b % len(lines)
    line = _change_text(lines[number], a, b >> 8)
    if line is None:
        return None
    return b"\n".join([*lines[:number], line, *lines[number + 1 :]])


def _change_text(text: bytes, a: int, b: int) -> bytes | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return json.dumps(change_value(value, a, b)).encode()


def change_value(value: Any, a: int, b: int) -> Any:
    """Replace, remove or double one part of a JSON value."""
    holder = [copy.deepcopy(value)]
    places = list(_places(holder))
    where, key = places[a % len(places)]
    action = b % 8
    if action == 0 and where is not holder:
        del where[key]
    elif action == 1 and isinstance(where, list):
        where.insert(key, copy.deepcopy(where[key]))
    elif action == 2 and isinstance(where, dict):
        where[str(VALUES[(b >> 3) % len(VALUES)])[:99]] = where.pop(key)
    elif action == 3:
        other, other_key = places[(b >> 3) % len(places)]
        where[key] = copy.deepcopy(other[other_key])
    else:
        where[key] = copy.deepcopy(VALUES[(b >> 3) % len(VALUES)])
    return holder[0]


def _places(value: Any):
    """(container, key) of every value inside a list or dict."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)
