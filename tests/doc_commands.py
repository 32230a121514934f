"""The commands that README and docs/ tell people to type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: First words of a command; ``jlora: ...`` is a message.
FIRST = ("jlora", "make", "python", "pip", "conda", "docker", "sudo", "export", "curl", "echo",
         "ollama", "mpirun", "PIP_INDEX_URL", "OPENAI_API_BASE_URL", "sha256sum")  # fmt: skip
#: A block of indented lines or between fences, and the text block that shows its output, if any.
BLOCK = re.compile(
    r"(?:^```(?:sh|bash)\n(.*?)^```$|((?:^ {4}\S[^\n]*\n(?:^ {5,}\S[^\n]*\n)*)+))"
    r"(?:\n+^```text\n(.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """A line to type; ``shown``: what the page shows as the output of the block that it ends."""

    page: str
    line: str
    shown: str = ""


def commands(page: Path) -> list[Command]:
    """All of a page, in order, without comments; a line that goes on in the next one is one."""
    found = []
    for fenced, indented, shown in BLOCK.findall(page.read_text(encoding="utf-8")):
        lines = re.sub(r"\\\n\s*", "", fenced or indented).splitlines()
        lines = [re.sub(r"\s+# .*$", "", line.strip()) for line in lines]
        lines = [line for line in lines if re.split(r"[ =]", line)[0] in FIRST]
        name = str(page.relative_to(ROOT))
        found += [Command(name, line) for line in lines[:-1]]
        found += [Command(name, line, shown) for line in lines[-1:]]
    return found


def plain(line: str) -> str:
    """A command without the mirror that a Chinese page adds."""
    line = re.sub(r" -i https?://\S+| --build-arg \S+", "", line)
    return re.sub(r"^PIP_INDEX_URL=\S+ ", "", line)
