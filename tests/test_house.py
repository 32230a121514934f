"""Rules of the house that no linter knows. The direction of imports is checked by import-linter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jlora"
MODULES = sorted(PACKAGE.rglob("*.py"))
ENVIRONMENT_WRITERS = {"setdefault", "update", "pop", "popitem", "clear", "__setitem__"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_environ(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def environment_writes(tree: ast.Module) -> list[int]:
    """Lines that change os.environ: assignment, deletion, putenv, a method that writes."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            if not isinstance(node.ctx, ast.Load):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func
            if method.attr in ("putenv", "unsetenv") or (
                is_environ(method.value) and method.attr in ENVIRONMENT_WRITERS
            ):
                lines.append(node.lineno)
    return lines


def all_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, module) of every import, those in functions too; `from a.b import c` is a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append((node.lineno, node.module))
    return names


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_only_the_runtime_sets_environment_variables(path: Path):
    if path != PACKAGE / "system" / "runtime.py":
        assert environment_writes(parse(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.environ['x'] = '1'",
        "import os; del os.environ['x']",
        "from os import environ; environ.setdefault('x', '1')",
        "import os; os.putenv('x', '1')",
    ],
)
def test_environment_writes_are_seen(code: str):
    assert environment_writes(ast.parse(code)) == [1]


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_only_the_runtime_imports_jittor(path: Path):
    """`import jittor` elsewhere would skip what jlora.runtime prepares."""
    if path != PACKAGE / "system" / "runtime.py":
        found = {name for _, name in all_imports(parse(path))}
        assert not {name for name in found if name.split(".")[0] in ("jittor", "jittor_utils")}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_no_other_framework_is_imported(path: Path):
    frameworks = {"torch", "transformers", "peft", "loralib", "tensorflow"}
    found = {name for _, name in all_imports(parse(path)) if name.split(".")[0] in frameworks}
    assert not found


def test_every_folder_has_its_place_in_the_import_contract():
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = contract.partition("[[tool.importlinter.contracts]]")[2]
    for folder in {
        path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE
    }:
        assert f'"jlora.{folder}"' in layers, f"{folder} is missing in pyproject.toml"


def test_no_module_stands_outside_the_folders():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_says_what_it_is(path: Path):
    tree = parse(path)
    if tree.body:
        assert ast.get_docstring(tree), f"{named(path)} has no docstring"
