"""What the README tells people to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jlora import cli
from jlora.runs.recipe import find_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (jlora .*)$", README, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_one_that_jlora_takes(command):
    arguments = cli.parser().parse_args(shlex.split(command, comments=True)[1:])
    if getattr(arguments, "recipe", None):
        load_recipe(find_recipe(arguments.recipe))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make ([\w-]+)", README, re.MULTILINE)
    assert targets == ["demo", "test", "parity"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_layers_example_runs(capsys):
    exec(PYTHON[1], {})
    assert "'lora_A': [8,768,]" in capsys.readouterr().out


@pytest.mark.slow
def test_the_model_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[0], {})
    out = capsys.readouterr().out
    assert "49152" in out and "trainable params: 230,400" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_recipes_are_whole():
    for path in sorted((ROOT / "jlora" / "recipes").glob("*.yaml")):
        load_recipe(path)
