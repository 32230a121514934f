"""The project's own files agree with each other: versions, what an installation needs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import jlora

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = re.search(r'^version = "([^"]+)"', PROJECT, re.MULTILINE)[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_said_in_one_place():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == VERSION
    assert citation["license"] == re.search(r'^license = "([^"]+)"', PROJECT, re.MULTILINE)[1]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "jlora").rglob("*.py")]
    assert not any(re.search(rf'version\w* = "{re.escape(VERSION)}"', each) for each in sources)


def test_conda_s_environment_is_one_that_jlora_runs_in():
    environment = yaml.safe_load(text("environment.yml"))
    pip = environment["dependencies"].pop()
    assert pip == {"pip": ["."]}
    wanted = dict(
        re.fullmatch(r"([\w-]+?)(?:[>=]+(.*))?", each).groups()
        for each in environment["dependencies"]
    )
    low, high = re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"', PROJECT, re.M).groups()
    assert int(low) <= int(wanted["python"].split(".")[1]) < int(high)
    assert wanted["gxx"] == wanted["libstdcxx-ng"], "a compiler newer than its library"
    assert environment["channels"] == ["conda-forge", "nodefaults"]


def test_docker_installs_what_the_page_says():
    commands = re.sub(r"\\\n", " ", text("Dockerfile"))
    packages = re.search(r"apt-get install -y --no-install-recommends (.*?) &&", commands)[1]
    page = re.search(r"apt-get install -y (python3-venv.*)", text("docs/install.md"))[1]
    assert set(packages.split()) == set(page.split()) - {"make"}  # which only a clone needs
    kept = {line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")}
    readme = re.search(r'^readme = "(.*)"', PROJECT, re.MULTILINE)[1]
    assert kept == {"jlora", "pyproject.toml", readme, "LICENSE"}
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 1


def test_both_languages_have_the_same_commands():
    blocks = re.compile(r"^    (\S.*?)(?:\s+#.*)?$", re.MULTILINE)  # comments are translated
    english, chinese = (blocks.findall(text(f"docs/install{end}.md")) for end in ("", ".cn"))
    assert english == chinese and len(english) > 20


def test_type_checkers_see_what_the_package_has():
    tree = ast.parse(text("jlora/__init__.py"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        for alias in node.names
    }  # fmt: skip
    assert set(seen) == set(jlora.__all__)
    for name, (module, real) in seen.items():
        target = jlora._NAMES.get(name) or jlora._MODULES[name]
        assert target in (module, f"{module}.{real}")
    assert (ROOT / "jlora" / "py.typed").is_file()
