"""What README and README.cn tell people to type works, and both say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jlora import cli
from jlora.models.families import FAMILIES
from jlora.runs.recipe import find_recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "README.cn.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
COMMANDS = {
    name: re.findall(r"^    (jlora .*)$", text, re.MULTILINE) for name, text in TEXTS.items()
}
PYTHON = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)


def without_comment(line: str) -> str:
    return re.sub(r"\s+# .*$", "", line)


@pytest.mark.parametrize("command", dict.fromkeys(sum(COMMANDS.values(), [])))
def test_command_is_one_that_jlora_takes(command):
    arguments = cli.parser().parse_args(shlex.split(command, comments=True)[1:])
    if getattr(arguments, "recipe", None):
        load_recipe(find_recipe(arguments.recipe))


def test_both_languages_tell_the_same():
    ours, chinese = (list(map(without_comment, COMMANDS[name])) for name in NAMES)
    assert len(ours) >= 15 and ours == chinese
    code = [
        [
            list(map(without_comment, block.splitlines()))
            for block in re.findall(pattern, text, re.S)
        ]
        for text in TEXTS.values()
        for pattern in [r"```\w+\n(.*?)```"]
    ]
    assert code[0] == code[1]
    headings, chinese = (re.findall(r"^#+ ", text, re.MULTILINE) for text in TEXTS.values())
    assert headings == chinese
    numbers, chinese = (re.findall(r"\d[\d.,]*\d", text) for text in TEXTS.values())
    assert sorted(set(chinese) - set(numbers)) == []


def test_each_leads_to_the_other_in_its_first_line():
    first, chinese = (text.splitlines()[0] for text in TEXTS.values())
    assert "(README.cn.md)" in first and "(README.md)" in chinese


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    targets = re.findall(r"\]\(([^)#:\s]+)[^):]*\)", TEXTS[name])
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_number_of_architectures():
    assert f"| models | {len(FAMILIES)} architectures |" in TEXTS["README.md"]


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make ([\w-]+)", TEXTS[name], re.MULTILINE)
    assert targets == ["demo", "test", "parity", "align"]
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
    for path in sorted((ROOT / "jlora" / "runs" / "recipes").glob("*.yaml")):
        load_recipe(path)
