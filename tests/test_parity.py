"""jlora against results of loralib, transformers and PEFT that `parity.golden` keeps."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import tiny_gpt2

from jlora.system.runtime import jt
from parity import __main__ as driver
from parity.case import Case, Outcome, compare
from parity.files import INPUTS, TOPICS, topic_module
from parity.golden import FIXTURES, golden_cases, reference_file
from parity.sampling import our_chances
from parity.table import make_lines, markdown

KEPT = [topic for topic in TOPICS if (FIXTURES / f"{topic}.zip").is_file()]
CASES = [(topic, case) for topic in KEPT for case in golden_cases(topic)]


@pytest.fixture(scope="session")
def kept_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    for topic in KEPT:
        zipfile.ZipFile(FIXTURES / f"{topic}.zip").extractall(root / topic)
    return root


@pytest.mark.parametrize(("topic", "case"), CASES, ids=[f"{t}-{c.name}" for t, c in CASES])
def test_jlora_computes_what_the_reference_computed(topic, case, kept_files):
    folder = kept_files / topic / case.name
    (function,) = [f for side, f in topic_module(topic).STAGES if side == "jlora"]
    found = function(case, load_file(folder / INPUTS), folder)
    expected = load_file(folder / reference_file(topic))
    # jlora's side also gives what the reference would check in a later stage.
    outcome = compare(case, expected, {n: a for n, a in found.items() if n in expected})
    assert outcome.passed, outcome.problem


def test_every_kept_case_is_still_listed():
    for topic in KEPT:
        names = zipfile.ZipFile(FIXTURES / f"{topic}.zip").namelist()
        kept = {name.split("/")[0] for name in names}
        assert kept == {case.name for case in golden_cases(topic)}, topic


ARRAY = np.array([1.0, -4.0, 0.5])


@pytest.mark.parametrize(
    ("rule", "tolerance", "change", "passes"),
    [
        ("largest", 1e-2, [0.03, 0, 0], True),
        ("largest", 1e-2, [0, 0, 0.05], False),
        ("each", 1e-2, [0, 0, 0.004], True),
        ("each", 1e-2, [0, 0, 0.03], False),
        ("exact", 1.0, [0, 1e-9, 0], False),
        ("exact", 0.0, [0, 0, 0], True),
        ("largest", 1e-2, [math.nan, 0, 0], False),
    ],
)
def test_when_two_sides_agree(rule, tolerance, change, passes):
    case = Case("row", "name", tolerance=tolerance, relative_to=rule)
    outcome = compare(case, {"x": ARRAY, "y": ARRAY}, {"x": ARRAY, "y": ARRAY + change})
    assert outcome.passed is passes
    assert passes or "y" in outcome.problem


@pytest.mark.parametrize(
    ("reference", "ours", "problem"),
    [
        ({}, {}, "nothing"),
        ({"x": ARRAY}, {}, "only one side gave x"),
        ({"x": ARRAY}, {"x": ARRAY, "z": ARRAY}, "only one side gave z"),
        ({"x": ARRAY}, {"x": ARRAY[:2]}, r"x is \(2,\) instead of \(3,\)"),
        ({"x": ARRAY * 0}, {"x": ARRAY}, "x differs by inf"),
    ],
)
def test_sides_that_cannot_agree(reference, ours, problem):
    with pytest.raises(AssertionError, match=problem):
        outcome = compare(Case("row", "name"), reference, ours)
        assert outcome.passed, outcome.problem


def test_a_row_is_as_good_as_its_worst_case():
    good, bad = Outcome(1e-9, 1e-8, "x", ""), Outcome(0.5, 2.0, "y", "y differs")
    first, second = Case("A", "a1"), Case("A", "a2")
    (line,) = make_lines("topic", [(first, good), (second, bad)])
    assert (line.cases, line.failed, line.absolute, line.relative) == (2, 1, 0.5, 2.0)
    assert "FAIL (1 of 2)" in markdown([line]) and "a2: y differs" in line.worst


@pytest.mark.parametrize("warp", [{}, {"top_k": 3, "temperature": 2.0}])
def test_the_chances_of_sampling_are_measured(warp):
    """Without the reference: of every token, or of the likeliest three, by the model's logits."""
    model, prompts = tiny_gpt2(vocab_size=24), [[3, 1, 4], [5, 9, 2]]
    (chances,) = our_chances(model, prompts, warp).values()
    with jt.no_grad():
        logits = model(jt.array(np.array(prompts, np.int32))).numpy()[:, -1].astype(np.float64)
    weights = np.exp(logits / warp.get("temperature", 1.0))
    if warp:
        weights[weights < np.sort(weights)[:, -3:-2]] = 0
    expected = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(chances, expected, atol=1e-5)


def test_a_process_that_dies_fails_its_topic(monkeypatch, tmp_path, capsys):
    """Though all its results are there."""
    monkeypatch.setattr(
        driver.subprocess, "run", lambda *_, **__: driver.subprocess.CompletedProcess([], -11)
    )
    monkeypatch.setattr(driver, "judge", lambda *_: Outcome(0.0, 0.0, "", ""))
    outcomes = driver.run_topic("chat", 1, tmp_path / "chat")
    failed = [case.name for case, outcome in outcomes if not outcome.passed]
    assert failed == ["chat-0-reference", "chat-1-jlora"]
    assert "exit code -11" in outcomes[-1][1].problem
