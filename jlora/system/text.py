"""Text files are UTF-8; a byte order mark is dropped, and any other encoding is named."""

from __future__ import annotations

import codecs
import shlex
import unicodedata
from pathlib import Path

from jlora.system.errors import UserError

MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BYTE_ORDER_MARK = "\ufeff"


def decode_text(data: bytes, path: str | Path) -> str:
    """The content of a UTF-8 text file without its byte order mark.

    Raises:
        UserError: it is not UTF-8 (with the line of the first bad byte, the encoding that it looks
            like, and how to convert it), or it is a Git LFS pointer.
    """
    check_no_pointer(data, path)
    wide = wide_encoding(data)
    if wide is not None:
        looks, name = wide
        raise UserError(f"{path}:1: not UTF-8 text but {looks}; {conversion(name, path)}")
    try:
        return data.decode("utf-8").lstrip(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        start = error.start
        line = data.count(b"\n", 0, start) + 1
        # Up to a megabyte around the bad byte tells enough.
        begin = data.rfind(b"\n", 0, max(0, start - 500_000)) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[start]:02x}); "
            f"{advice(data[begin : start + 500_000], path)}"
        ) from error


def check_no_pointer(head: bytes, path: str | Path) -> None:
    """Refuse what a clone without Git LFS has in the place of a large file.

    Args:
        head: the first 64 bytes of the file, or more.

    Raises:
        UserError: it is a Git LFS pointer.
    """
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        )


def lines_of(text: str) -> list[str]:
    """The lines of a text file, without their ends.

    Lines end with ``\\n`` or ``\\r\\n``, or with ``\\r`` where the file has no ``\\n`` at all;
    other separators (U+2028, form feed) are part of a line. Byte order marks that joining files has
    left at the start of lines are dropped.
    """
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r").lstrip(BYTE_ORDER_MARK) for line in lines]


# Other encodings -------------------------------------------------------------------------------


def wide_encoding(data: bytes) -> tuple[str, str] | None:
    """The UTF-16 or UTF-32 encoding that a file has, in words and as iconv's name; None: neither.

    Without a byte order mark UTF-16 is recognised by its zero bytes: one of the two bytes of an
    ASCII character is zero.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            # iconv drops the mark only where the name leaves the byte order open.
            return f"{name} with a byte order mark", name[:-2]
    if b"\0" not in data:
        return None
    even, odd = data[::2].count(0), data[1::2].count(0)
    name = "UTF-16LE" if odd > even else "UTF-16BE"
    # A UTF-8 text may hold a stray zero byte, so there it takes many to tell.
    many = max(even, odd) > len(data) // 5
    if (many or not _decodes(data, "utf-8")) and _is_prose(data, name):
        return f"what looks like {name} without a byte order mark", name
    return None


def advice(data: bytes, path: str | Path) -> str:
    """What bytes that are no UTF-8 look like, and how to convert them."""
    if any(byte in data for byte in range(9)):  # control characters that no text file has
        return "it looks like a binary file; give a text file"
    text = data.decode("utf-8", "replace")
    if sum(not character.isascii() for character in text) > 5 * text.count("\ufffd"):
        return (
            "it looks like UTF-8 with broken or cut off characters; fix them, or drop them with "
            f"`iconv -c -f UTF-8 -t UTF-8 {shlex.quote(str(path))} > NEW_FILE`"
        )
    if _is_chinese(data):
        return f"it looks like GB18030 (GBK); {conversion('GB18030', path)}"
    high = sum(byte >= 0x80 for byte in data)
    if high > sum(chr(byte).isalpha() for byte in data if byte < 0x80):
        # Western languages have fewer letters outside ASCII than in it.
        return (
            f"its encoding is not recognised; {conversion('ENCODING', path)} with the encoding "
            "that it has"
        )
    # Windows-1252 has printable characters where Latin-1 has control characters.
    if any(byte in data for byte in range(0x80, 0xA0)):
        return f"it looks like Windows-1252; {conversion('WINDOWS-1252', path)}"
    return f"it looks like Latin-1; {conversion('LATIN1', path)}"


def conversion(encoding: str, path: str | Path) -> str:
    quoted = shlex.quote(str(path))
    return f"convert it with `iconv -f {encoding} -t UTF-8 {quoted} > NEW_FILE`"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_prose(data: bytes, encoding: str) -> bool:
    """Whether bytes decode to assigned, printable characters, tabs and line ends."""
    if not _decodes(data, encoding):
        return False
    rare = ("Cc", "Cn", "Co", "Cs")
    characters = set(data.decode(encoding)) - set("\t\r\n\f")
    return not any(unicodedata.category(character) in rare for character in characters)


def _is_chinese(data: bytes) -> bool:
    """Whether most characters outside ASCII are common Chinese ones when read as GB18030."""
    try:
        # A file may end within a character.
        text = codecs.getincrementaldecoder("gb18030")().decode(data)
    except UnicodeDecodeError:
        return False
    foreign = [character for character in text if not character.isascii()]
    # GB2312 has its punctuation in rows A1 and A3, its 3,755 commonest characters in B0 to D7.
    leads = (character.encode("gb2312", "ignore")[:1] for character in foreign)
    common = sum(lead in (b"\xa1", b"\xa3") or b"\xb0" <= lead <= b"\xd7" for lead in leads)
    return common > 0.8 * len(foreign)
