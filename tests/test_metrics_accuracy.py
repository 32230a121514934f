"""Choices: the answer of a text, accuracy with its interval, reading right answers."""

from __future__ import annotations

import pytest

from jlora.metrics import read_answers
from jlora.metrics.accuracy import accuracy, parse_choice, wilson_interval
from jlora.system.errors import UserError

BOOLEAN = ("true", "false")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("true", "true"),
        (" False.", "false"),
        ("\n\tTRUE, because the passage says so", "true"),
        ('"false"', "false"),
        ("**true**", "true"),
        ("true false", "true"),
        ("", None),
        ("...", None),
        ("yes", None),
        ("truthful", None),
        ("true2", None),
        ("untrue", None),
        ("It is true", None),
        ("1", None),
    ],
)
def test_parse_choice(text, answer):
    assert parse_choice(text, BOOLEAN) == answer


def test_choices_of_several_words_and_signs():
    cities = ["New", "New York", "york"]
    assert parse_choice("new-york is it", cities) == "New York"
    assert parse_choice("New: York", ["New York", "New"]) == "New York"
    assert parse_choice("new yorker", cities) == "New"
    assert parse_choice("(b) the second", ["(A)", "(B)"]) == "(B)"
    assert parse_choice("ÜBER", ["über", "unter"]) == "über"


def test_accuracy():
    gold = ["true"] * 6 + ["false"] * 4
    predicted = ["true"] * 4 + ["false", None] + ["false"] * 3 + ["true"]
    scores = accuracy(predicted, gold, BOOLEAN)
    low, high = wilson_interval(7, 10)
    assert scores == {
        "accuracy": 0.7,
        "accuracy_low": low,
        "accuracy_high": high,
        "majority": 0.6,
        "unparseable": 1,
        "confusion/true->true": 4,
        "confusion/true->false": 1,
        "confusion/true->unparseable": 1,
        "confusion/false->true": 1,
        "confusion/false->false": 3,
        "confusion/false->unparseable": 0,
    }
    assert type(scores["unparseable"]) is int


def test_wilson_interval_is_where_the_score_test_just_holds():
    # Both ends solve |share - p| = z sqrt(p (1 - p) / n).
    for right, total in ((7, 10), (1, 3), (313, 470), (0, 5), (5, 5)):
        share = right / total
        for end in wilson_interval(right, total):
            spread = 1.959963984540054 * (end * (1 - end) / total) ** 0.5
            assert abs(share - end) == pytest.approx(spread, abs=1e-9)
    # Two examples of Newcombe 1998.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert high == pytest.approx(0.1611, abs=5e-5)


@pytest.mark.parametrize(
    ("predicted", "gold", "choices", "message"),
    [
        (["true"], ["true", "false"], BOOLEAN, "1 predicted answers but 2 right ones"),
        ([], [], BOOLEAN, "no answers to score"),
        (["true"], ["yes"], BOOLEAN, "right answer 1 is 'yes', which is none of true, false"),
        (["true"], [None], BOOLEAN, "right answer 1 is None"),
        (["true", "no"], ["true"] * 2, BOOLEAN, "predicted answer 2 is 'no'"),
        (["true"], ["true"], ["true"], "at least two answers"),
        (["true"], ["true"], "true", "give a list"),
        (["a"], ["a"], ["a", "A."], "have to differ"),
        (["a"], ["a"], ["a", "?"], "have to differ"),
    ],
)
def test_answers_that_cannot_be_scored(predicted, gold, choices, message):
    with pytest.raises(UserError, match=message):
        accuracy(predicted, gold, choices)
    if "differ" in message or "list" in message:
        with pytest.raises(UserError, match=message):
            parse_choice("a", choices)


def test_right_answers_are_read_one_a_line(tmp_path):
    path = tmp_path / "gold.txt"
    path.write_text("true\nfalse \n")
    assert read_answers(path, BOOLEAN) == ["true", "false"]
    path.write_text("true\n\nfalse\n")
    with pytest.raises(UserError, match=r"gold.txt:2: '' is no answer; write true or false"):
        read_answers(path, BOOLEAN)
    path.write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        read_answers(path, BOOLEAN)
