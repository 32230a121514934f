"""What `make docs` changes in the pages: the first page is README, and links that leave docs/.

The line with which a page leads to its other language goes: the head of the site does that. On the
site there is nothing but docs/. A link to another file of the repository becomes its text; one to a
file that does not exist is an error (under --strict) as every other dead link is.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHER_LANGUAGE = re.compile(r"^\[(?:中文|English)\]\([\w.]+\)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)]*)?\)")
HOME = {"index.md": "README.md", "index.cn.md": "README.cn.md"}
log = logging.getLogger("mkdocs.plugins.site_hook")


def on_page_markdown(markdown: str, page, **_) -> str:
    name = page.file.src_uri
    source = f"docs/{name}"
    if name in HOME:
        source = HOME[name]
        markdown = (ROOT / source).read_text(encoding="utf-8").partition("\n")[2]
    markdown = OTHER_LANGUAGE.sub("", markdown)
    return "".join(
        part if is_code else LINK.sub(lambda match: link(match, source), part)
        for part, is_code in split_code(markdown)
    )


def split_code(markdown: str) -> list[tuple[str, bool]]:
    """The text in parts, and whether each is a block of code."""
    parts = re.split(r"(^```.*?^```$|^ {4}[^\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return [(part, index % 2 == 1) for index, part in enumerate(parts)]


def link(match: re.Match, source: str) -> str:
    """A link as it is to stand on the site; ``source`` is the page's path in the repository."""
    mark, text, target, anchor = match.group(1, 2, 3, 4)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        log.warning("%s: a link to %s, and there is no such file", source, path)
    if path in HOME.values():
        path = next(f"docs/{page}" for page, readme in HOME.items() if readme == path)
    if not path.startswith("docs/"):
        return text
    return f"{mark}[{text}]({path[len('docs/') :]}{anchor or ''})"
