"""Tasks and metrics of other packages, registered or found by entry points."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

import jlora
from jlora.data import tasks
from jlora.data.tasks import Task, get_task, register_task, task_names
from jlora.metrics import Metric, check_names, evaluate, register_metric, registry
from jlora.report.tables import metrics_of, score_table
from jlora.runs.recipe import make_recipe
from jlora.system import plugins
from jlora.system.errors import UserError

DATA_MD = Path(__file__).resolve().parents[1] / "docs" / "data.md"
TASK = Task("limericks", lambda path: [], metrics=("words",), splits={})
WORDS = Metric(
    "words", "Words", scale=2, decimals=1, score=lambda texts: float(len(texts.hypotheses))
)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(tasks, "_registered", {})
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    plugins.plugins.cache_clear()
    yield
    plugins.plugins.cache_clear()


@pytest.fixture
def package(monkeypatch):
    """Entry points of a package called ``limericks``, with what is given in it."""

    def make(group: str, name: str, **content):
        module = types.ModuleType("limericks")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, "limericks", module)
        point = importlib.metadata.EntryPoint(name, "limericks:IT", group)

        class Points(list):
            def select(self, group):
                return [each for each in self if each.group == group]

        monkeypatch.setattr(importlib.metadata, "entry_points", lambda: Points([point]))
        plugins.plugins.cache_clear()

    return make


def test_the_file_of_the_documentation(tmp_path):
    code = re.search(r"```python\n(.*?)```", DATA_MD.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "limericks.py").write_text(code)
    (tmp_path / "refs.txt").write_text("a b\n\nc d\n")
    (tmp_path / "hyps.txt").write_text("a b c\nc\n")
    (tmp_path / "data.tsv").write_text("sea\ta b c\n")
    command = [sys.executable, "limericks.py"]

    def run(*arguments):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, said = run("evaluate", "limericks", "--refs", "refs.txt", "--hyps", "hyps.txt")
    assert code == 0 and re.search(r"^words +2\.0000$", said, re.MULTILINE)
    code, said = run("evaluate", "limerick", "--refs", "refs.txt", "--hyps", "hyps.txt")
    assert code == 2 and "did you mean limericks" in said


def test_every_module_of_the_folder_is_a_task():
    assert {"e2e", "webnlg", "dart", "boolq", "jsonl", "restaurants"} <= set(tasks.NAMES)
    for name in tasks.NAMES:
        assert get_task(name).name == name


def test_what_is_registered_is_known_everywhere():
    jlora.register_task(TASK)
    jlora.register_metric(WORDS)
    assert get_task("limericks") is TASK and "limericks" in task_names()
    recipe = make_recipe({"model": "m", "data": {"task": "limericks", "metrics": ["words"]}}, "x")
    assert recipe.data.task == "limericks"
    assert evaluate(["words", "TER"], ["a", "b"], [["a"], ["b"]]) == {"words": 2.0, "TER": 0.0}
    assert score_table(None, {"words": 2.0, "words/unseen": 1.5, "BLEU": 0.5}).splitlines() == [
        "       BLEU  Words  Words unseen",
        "--------------------------------",
        "after  50.0    4.0           3.0",
    ]
    with pytest.raises(UserError, match="no metric 'wrds'; did you mean words"):
        check_names(["wrds"])


@pytest.mark.parametrize("name", ["e2e", "limericks", "", "a b", "a/b", "a,b"])
def test_names_that_a_task_cannot_have(name):
    register_task(TASK)
    with pytest.raises(UserError, match="already|cannot name a task"):
        register_task(replace(TASK, name=name))


@pytest.mark.parametrize("key", ["BLEU", "accuracy", "words", " ", "a/b", "a,b"])
def test_names_that_a_metric_cannot_have(key):
    register_metric(WORDS)
    with pytest.raises(UserError, match="already|cannot name a metric"):
        register_metric(replace(WORDS, key=key))
    with pytest.raises(UserError, match="has no function `score`"):
        register_metric(Metric("none"))


def test_a_metric_that_is_computed_elsewhere_cannot_be_asked_for():
    with pytest.raises(UserError, match="no metric 'accuracy'"):
        check_names(["accuracy"])


def test_entry_points_are_loaded_when_asked_for(package):
    package("jlora.tasks", "limericks", IT=TASK)
    assert "limericks" in task_names() and "limericks" not in tasks._registered
    assert get_task("limericks") is TASK
    package("jlora.metrics", "words", IT=WORDS)
    assert evaluate(["words"], ["a"], [["a"]]) == {"words": 1.0}
    assert [metric.label for metric in metrics_of({"words": 1.0})] == ["Words"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "cannot be imported: .*IT.*; repair or uninstall"),
        ({"IT": 3}, "is no Task; repair"),
        ({"IT": replace(TASK, name="sonnets")}, "the entry point limericks .* holds the task"),
    ],
)
def test_entry_points_that_are_broken(package, content, said):
    package("jlora.tasks", "limericks", **content)
    with pytest.raises(UserError, match=said):
        get_task("limericks")
    package("jlora.metrics", "words", **dict.fromkeys(content, 3))
    with pytest.raises(UserError, match="words of another package"):
        evaluate(["words"], ["a"], [["a"]])
    assert [metric.label for metric in metrics_of({"words": 1.0})] == ["words"]  # as any number
