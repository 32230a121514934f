"""Messages that the documents quote are in the program."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
QUOTES = [
    (name, quote)
    for name in ("troubleshooting.md", "install.md")
    for quote in re.findall(
        r"^    jlora: (?:(?:error|warning): )?(.*)$",
        (ROOT / "docs" / name).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
]


def texts() -> list[str]:
    """Every string in the package's sources; fields of f-strings become a zero character."""
    found = []
    for path in sorted((ROOT / "jlora").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(getattr(part, "value", None) if isinstance(part, ast.Constant)
                                     else "\0" for part in node.values))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def fragments(quote: str) -> list[str]:
    """The parts of a quoted message between <placeholders> and between clauses."""
    parts = re.split(r"<[^<>]*>|; ", quote)
    return [part.strip() for part in parts if part.strip(" :,.()`")]


def missing(quote: str, sources: list[str]) -> list[str]:
    """The fragments that are in no string of the sources."""
    return [part for part in fragments(quote) if not any(part in text for text in sources)]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return texts()


@pytest.mark.parametrize(("name", "quote"), QUOTES)
def test_quoted_messages_are_in_the_code(name: str, quote: str, sources):
    assert max(map(len, fragments(quote)), default=0) >= 8, "quotes nothing but placeholders"
    assert missing(quote, sources) == []


def test_a_message_that_is_not_there_is_seen(sources):
    assert len(QUOTES) > 50
    assert missing("the loss is <nan> at step <1>", sources) == []
    assert missing("the loss was <nan> at step <1>", sources) == ["the loss was"]


def test_oldest_jittor_of_the_table_is_the_one_that_pip_accepts():
    tried = re.findall(r"^\| (1\.3\.[\d.]+) \|.*passes", INSTALL, re.MULTILINE)
    bound = re.search(r'"jittor>=([\d.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert min(tried, key=lambda v: [int(part) for part in v.split(".")]) == bound[1]


def dry_run(*arguments: str) -> str:
    """The commands that make would run, independent of this process's environment."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    environment = {k: v for k, v in os.environ.items() if k not in ("JITTOR", "VENV", "PYTHON")}
    environment = {k: v for k, v in environment.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        [make, "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_make_takes_another_jittor():
    plain, other = dry_run("test"), dry_run("test", "JITTOR=1.3.8.5")
    assert "jittor" not in plain and "\n.venv/bin/python -m pytest" in plain
    assert "pip install" in other and "jittor==1.3.8.5\n" in other
    assert "\n.venv-jittor-1.3.8.5/bin/python -m pytest" in other
    assert ".venv/" not in other
