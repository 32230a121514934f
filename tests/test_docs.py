"""Messages that the documents quote are in the program."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from doc_commands import PAGES, commands, plain

from jlora import cli
from jlora.runs.recipe import find_recipe, load_recipe
from jlora.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
QUOTES = [
    (name, quote)
    for name in ("troubleshooting.md", "troubleshooting.cn.md", "install.md", "install.cn.md")
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


#: Every command of the program on every page, once.
COMMANDS = {
    command.line: command.page
    for page in PAGES
    for command in commands(page)
    if command.line.startswith("jlora ") and not re.search(r"\.\.\. |\[--|\$p| N ", command.line)
}


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_one_that_jlora_takes(line):
    arguments = cli.parser().parse_args(shlex.split(line)[1:])
    recipe = getattr(arguments, "recipe", None)
    if recipe and not recipe.endswith("mine.yaml"):
        load_recipe(find_recipe(recipe))


def test_commands_are_found_and_a_wrong_one_is_seen():
    assert len(COMMANDS) > 45
    with pytest.raises(UserError, match="no recipe e2e-gpt2-huge"):
        find_recipe("e2e-gpt2-huge")


CHINESE = [page for page in PAGES if page.name.endswith(".cn.md") and page.name != "index.cn.md"]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_both_languages_have_the_same_commands_and_sections(page):
    other = page.with_name(page.name.replace(".cn.md", ".md"))
    ours, chinese = (
        [plain(c.line) for c in commands(each) if c.line.startswith(("jlora", "make", "pip"))]
        for each in (other, page)
    )
    assert [line for line in ours if line not in chinese] == []
    assert [line for line in chinese if line not in ours] == []
    assert f"]({page.name})" in other.read_text(encoding="utf-8")[:400]
    assert f"]({other.name})" in page.read_text(encoding="utf-8")[:400]
    sections, chinese = (
        len(re.findall(r"^## ", each.read_text(encoding="utf-8"), re.MULTILINE))
        for each in (other, page)
    )
    assert chinese == sections


HEADINGS = ("环境配置", "数据准备脚本", "训练脚本", "测试脚本",
            "与 PyTorch 实现对齐的实验 log", "性能 log")  # fmt: skip


def test_headings_of_the_replication_are_those_of_the_student_programme():
    text = (ROOT / "docs" / "replication.cn.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == HEADINGS


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
    assert "jittor==" not in plain and "\n.venv/bin/python -m pytest" in plain
    assert "pip install" in other and "jittor==1.3.8.5\n" in other
    assert "\n.venv-jittor-1.3.8.5/bin/python -m pytest" in other
    assert ".venv/" not in other
