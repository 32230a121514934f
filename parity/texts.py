"""Lines of text that are difficult for tokenizers, made from a seed, and real lines of data."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPACES = " \t\n\r\f\v\x1c\x1f\x85\xa0\u1680\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u180e\ufe0f\ufe0e"
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2069"
CONTROLS = "".join(map(chr, [*range(32), *range(127, 160)]))
FACES = "".join(map(chr, [*range(0x1F466, 0x1F46A), *range(0x1F600, 0x1F650), 0x2764, 0x1F3F4]))
SKINS = "".join(map(chr, range(0x1F3FB, 0x1F400)))
FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
TAGS = "".join(map(chr, range(0xE0061, 0xE0080)))
MARKS = "".join(map(chr, [*range(0x300, 0x370), 0x20E3, 0x93C, 0x94D, 0x5B8, 0x64B, 0xE34]))
HEBREW_ARABIC = "".join(
    map(chr, [*range(0x5D0, 0x5EB), *range(0x620, 0x64B), *range(0x6F0, 0x6FA)])
)
CHINESE = "".join(map(chr, [*range(0x4E00, 0x9FF0), *range(0x20000, 0x20400)]))
KANA = "".join(map(chr, [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)]))
HANGUL = "".join(map(chr, [*range(0xAC00, 0xD7A4), *range(0x1100, 0x1113)]))
WIDE = "、。！？「」（）：０１９Ａｚ～"
DIGITS = "0123456789²³¹½⅔Ⅷⅻ①㊿٠٣٩۵०९๓໑၅०𝟘𝟗〇零一１９"
ASCII = "".join(map(chr, range(33, 127)))
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZàéîõüßøñçžЖдяΣω"
QUOTES = "''''’ʼ＇‘`´"
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<|endoftext|", "|endoftext|>",
    "<|im_start|>user\n", "<|", "|>", "< |endoftext|>", "<|ENDOFTEXT|>", "<s>", "</s>", "<unk>",
)  # fmt: skip
SUFFIXES = ("s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "Ve", "ſ", "x", "")


@lru_cache(maxsize=1)
def blocks(assigned: bool = True) -> list[str]:
    """The characters of Unicode without surrogates, in blocks of 256 code points.

    Only characters that Python's Unicode tables (14.0 in Python 3.11) assign, including private
    use: regular expressions with older tables do not treat newer letters as letters, so that two
    correct tokenizers would differ on them. ``assigned=False`` gives the other characters.
    """
    found = []
    for start in range(0, 0x110000, 256):
        characters = map(chr, range(start, start + 256))
        kept = [c for c in characters if (unicodedata.category(c) != "Cn") == assigned]
        kept = [c for c in kept if not 0xD800 <= ord(c) < 0xE000]
        if kept:
            found.append("".join(kept))
    return found


def made_lines(rng: np.random.Generator, count: int) -> list[str]:
    """Lines of every kind in turn."""
    return [KINDS[i % len(KINDS)](rng) for i in range(count)]


def unassigned_lines(rng: np.random.Generator, count: int) -> list[str]:
    """Lines with characters that Python's Unicode tables do not know (yet)."""
    choice = blocks(assigned=False)
    return [_mix(rng, _pick(rng, choice), LETTERS, " 1'") for _ in range(count)]


def _pick(rng, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _many(rng, options: Sequence[str], most: int) -> str:
    return "".join(
        options[i] for i in rng.integers(0, len(options), int(rng.integers(1, most + 1)))
    )


def _mix(rng, *alphabets: Sequence[str]) -> str:
    """Short stretches of the alphabets."""
    stretches = (_many(rng, _pick(rng, alphabets), 5) for _ in range(int(rng.integers(1, 13))))
    return "".join(stretches)


def _words(rng) -> str:
    return " ".join(_many(rng, LETTERS, 8) for _ in range(int(rng.integers(1, 5))))


def _one_block(rng) -> str:
    return _mix(rng, _pick(rng, blocks()), _pick(rng, blocks()), " ")


def _anywhere(rng) -> str:
    return "".join(_pick(rng, _pick(rng, blocks())) for _ in range(int(rng.integers(1, 30))))


def _emoji(rng) -> str:
    kind = int(rng.integers(4))
    if kind == 0:  # a family: faces joined by zero-width joiners
        return "\u200d".join(
            _pick(rng, FACES) + _pick(rng, ["", _pick(rng, SKINS), "\ufe0f"])
            for _ in range(int(rng.integers(1, 5)))
        )
    if kind == 1:
        return _many(rng, FLAGS, 6) + _pick(rng, "0123456789#*") + "\ufe0f\u20e3"
    if kind == 2:
        return "\U0001f3f4" + _many(rng, TAGS, 6) + "\U000e007f"
    return _mix(rng, FACES, SKINS, "\u200d\ufe0f", " a")


def _run(rng) -> str:
    """One character repeated."""
    options = [" ", "\n", "a", "0", "=", "'", "é", "日", _pick(rng, SPACES), _pick(rng, FACES)]
    options += [_pick(rng, _pick(rng, blocks()))]
    text = _pick(rng, options) * int(rng.integers(1, 200))
    return _pick(rng, ["", "x", " "]) + text + _pick(rng, ["", "x", "1"])


def _contractions(rng) -> str:
    words = (
        _many(rng, LETTERS, 6) + _pick(rng, QUOTES) + _pick(rng, SUFFIXES)
        for _ in range(int(rng.integers(1, 6)))
    )
    return _pick(rng, [" ", "", "  "]).join(words)


def _special(rng) -> str:
    pieces = [_pick(rng, [_pick(rng, SPECIAL), _words(rng), " ", "\n", ""]) for _ in range(6)]
    return "".join(pieces)


def _edges(rng) -> str:
    """An empty line, or spaces at the start or end."""
    left, right = (_pick(rng, ["", " ", "  ", "\t", "\r\n", "\n\n", "\u3000"]) for _ in range(2))
    return left + _pick(rng, ["", _words(rng), "1", "."]) + right


KINDS = (
    _one_block,
    _anywhere,
    lambda rng: _mix(rng, SPACES, " ", "\r\n", LETTERS, "1.'"),
    lambda rng: _mix(rng, CONTROLS, LETTERS, " "),
    lambda rng: _mix(rng, INVISIBLE, LETTERS, " ", "12"),
    _emoji,
    lambda rng: _mix(rng, MARKS, LETTERS, CHINESE, " "),
    lambda rng: _mix(rng, HEBREW_ARABIC, BIDI, MARKS, " ", "12"),
    lambda rng: _mix(rng, CHINESE, KANA, HANGUL, WIDE, " "),
    _run,
    lambda rng: _mix(rng, DIGITS, "0123456789", " ", ".,:-+%", LETTERS),
    _contractions,
    _special,
    lambda rng: _mix(rng, ASCII, LETTERS, " ", "    "),
    _edges,
    _words,
)


def data_folder() -> Path | None:
    """The development data: $JLORA_DATA, else ../shared/data; None if neither exists."""
    places = [ROOT.parent / "shared" / "data"]
    if os.environ.get("JLORA_DATA"):
        places.insert(0, Path(os.environ["JLORA_DATA"]))
    return next((place for place in places if (place / "e2e" / "test.txt").is_file()), None)


def data_lines(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    """Some of E2E's lines, context and text, or of BoolQ's passages."""
    folder = data_folder()
    if kind == "e2e":
        names = ("train.txt", "valid.txt", "test.txt")
        texts = [(folder / "e2e" / name).read_text(encoding="utf-8") for name in names]
        lines = [line for text in texts for line in text.split("\n")]
    else:
        rows = (folder / "boolq" / "dev.jsonl").read_text(encoding="utf-8").split("\n")
        lines = [json.loads(row)["passage"] for row in rows if row]
    return [lines[i] for i in rng.choice(len(lines), min(count, len(lines)), replace=False)]


def pack(name: str, lines: Sequence[str]) -> dict[str, np.ndarray]:
    """Texts as arrays: their UTF-8 bytes, and the end of each text."""
    return pack_numbers(name, [list(line.encode()) for line in lines], np.uint8)


def unpack(name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """The inverse of `pack`."""
    return [bytes(part).decode() for part in unpack_numbers(name, arrays)]


def pack_numbers(name: str, lists: Sequence[Sequence[int]], kind=np.int64) -> dict[str, np.ndarray]:
    """Lists of numbers as arrays: all numbers, and the end of each list."""
    flat = np.array([value for numbers in lists for value in numbers], dtype=kind)
    return {name: flat, f"{name}_ends": np.cumsum([len(numbers) for numbers in lists])}


def unpack_numbers(name: str, arrays: dict[str, np.ndarray]) -> list[list[int]]:
    """The inverse of `pack_numbers`."""
    parts = np.split(arrays[name], arrays[f"{name}_ends"])[:-1]
    return [part.tolist() for part in parts]
