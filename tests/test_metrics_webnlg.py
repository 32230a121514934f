"""WebNLG's and DART's metrics against GenerationEval and by hand; metrics by name and by part."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora.metrics
from jlora.metrics import METRICS, check_metrics, evaluate, evaluate_parts
from jlora.metrics.generation_eval import prepare, word_tokenize
from jlora.metrics.sacre import chrf_pp, multi_bleu, sacre_bleu
from jlora.metrics.ter import edit_distance_to, mean_ter, ter
from jlora.system.errors import UserError

# The file says how its scores were made.
GOLDEN = json.loads(
    (Path(__file__).parent / "fixtures" / "generation_eval.json").read_text(encoding="utf-8")
)["cases"]
WITHOUT_JAVA = ("multi-BLEU", "TER", "chrF++")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_case_agrees_with_generation_eval(name):
    case = GOLDEN[name]
    scores = evaluate(WITHOUT_JAVA, case["hypotheses"], case["references"])
    assert tuple(scores) == WITHOUT_JAVA
    for metric, score in scores.items():
        assert score == pytest.approx(case["scores"][metric], abs=1e-11), metric


@pytest.mark.parametrize("name", GOLDEN)
def test_words_are_those_of_nltk(name):
    case = GOLDEN[name]
    assert [word_tokenize(prepare(text)) for text in case["hypotheses"]] == case["words"]


# --- preparation


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("Don't, 3.5", "don ' t , 3 . 5"),
        ("  A\tb\u00a0C\n", "a b c"),
        ("x_y Straße-ÉCOLE", "x_y straße - école"),
        ("", ""),
    ],
)
def test_prepare(text, prepared):
    assert prepare(text) == prepared


@settings(deadline=None)
@given(st.text())
def test_a_prepared_text_stays_as_it_is(text):
    once = prepare(text)
    assert prepare(once) == once


def test_prepared_and_plain_files_have_the_same_scores():
    hypotheses, references = (
        GOLDEN["punctuation"]["hypotheses"],
        GOLDEN["punctuation"]["references"],
    )
    prepared = [prepare(text) for text in hypotheses]
    prepared_references = [[prepare(text) for text in group] for group in references]
    assert evaluate(WITHOUT_JAVA, prepared, prepared_references) == evaluate(
        WITHOUT_JAVA, hypotheses, references
    )


def test_only_the_first_six_references_count():
    references = [[*["a b c d e"] * 5, "p q r s t", "v w x y z"]]
    assert evaluate(["TER"], ["p q r s t"], references) == {"TER": 0.0}
    assert evaluate(["TER"], ["v w x y z"], references) == {"TER": 1.0}
    assert evaluate(["sacreBLEU"], ["v w x y z"], references)["sacreBLEU"] == pytest.approx(1.0)


# --- BLEU and chrF++ by hand


def test_multi_bleu_by_hand():
    # Of 7 words 6, 4, 3, 2 n-grams match; nearest reference of 8 words.
    score = multi_bleu(["a b c d e x f"], [["a b c d e y f g", "z"]])
    assert score == pytest.approx(math.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)


def test_the_two_bleus_differ_in_smoothing_and_case():
    # Matches 4 of 5, 2 of 4, 0 of 3, 0 of 2; smoothing makes the zeros 1/2 and 1/4.
    arguments = ["a b x c d"], [["a b y c d"]]
    assert multi_bleu(*arguments) == 0.0
    expected = (4 / 5 * 2 / 4 * (1 / 2) / 3 * (1 / 4) / 2) ** 0.25
    assert sacre_bleu(*arguments) == pytest.approx(expected)
    scores = evaluate(["multi-BLEU", "sacreBLEU"], ["A b C d"], [["a b c d"]])
    assert scores["multi-BLEU"] == pytest.approx(1.0)
    assert 0 < scores["sacreBLEU"] < 1


def test_chrf_by_hand():
    # "ab" against "ac": characters 1 of 2 match, character pairs 0 of 1, the word not; the other
    # five orders have nothing to match.
    assert chrf_pp(["ab"], [["ac"]]) == pytest.approx(0.5 / 8)
    # F2 of precision 1 and recall 1/2 for one word of two, their 1-grams of 2 characters of 4
    # and so on: only the first of each kind and the character pair (1 of 3) are there.
    f2 = lambda p, r: 5 * p * r / (4 * p + r)  # noqa: E731
    expected = (f2(1, 2 / 4) + f2(1, 1 / 3) + f2(1, 1 / 2)) / 8
    assert chrf_pp(["ab"], [["ab cd"]]) == pytest.approx(expected)


# --- TER


@pytest.mark.parametrize(
    ("hypothesis", "reference", "edits"),
    [
        ("a b c d", "a b c d", 0),
        ("", "a b c", 3),
        ("a b c", "a x c d", 2),
        ("x y z", "a", 3),
        ("d e a b c", "a b c d e", 1),  # one move
        ("d e a x c", "a b c d e", 2),  # a move and a replacement
        ("a a a", "a", 2),
    ],
)
def test_ter_by_hand(hypothesis, reference, edits):
    assert ter(hypothesis.split(), reference.split()) == edits / len(reference.split())


def test_ter_of_its_paper():
    # Snover et al. 2006: "this week" moved, "Saudis" for "Saudi", "Arabia" and "American" missing.
    reference = "saudi arabia denied this week information published in the american new york times"
    hypothesis = "this week the saudis denied information published in the new york times"
    assert ter(hypothesis.split(), reference.split()) == pytest.approx(4 / 13)


def test_ter_takes_each_sentences_nearest_reference_and_their_plain_mean():
    references = [[["a", "b"], ["x", "y", "z"]], [["p"] * 8]]
    assert mean_ter([["x", "y"], ["p"] * 6], references) == pytest.approx((1 / 3 + 2 / 8) / 2)
    assert mean_ter([["x"]], [[[]]]) == 1.0


words = st.lists(st.sampled_from("abcd"), max_size=9)


@settings(deadline=None)
@given(words, words.filter(bool))
def test_edit_distance(hypothesis, reference):
    row = list(range(len(reference) + 1))
    for word in hypothesis:
        above, row = row, [row[0] + 1]
        for index, other in enumerate(reference):
            row.append(min(above[index] + (word != other), above[index + 1] + 1, row[-1] + 1))
    assert edit_distance_to(reference)(tuple(hypothesis)) == row[-1]
    assert ter(hypothesis, reference) <= row[-1] / len(reference)  # moves only help


# --- by name


def test_names_are_computed_in_the_order_asked_for():
    scores = evaluate(["sacreBLEU", "BLEU", "TER"], ["a b c d e"], [["a b c d e"]])
    assert list(scores.items()) == [
        ("sacreBLEU", pytest.approx(1.0)),
        ("BLEU", pytest.approx(1.0)),
        ("TER", 0.0),
    ]
    assert all(type(score) is float for score in scores.values())


def test_no_java_is_needed_where_no_metric_needs_it(monkeypatch):
    monkeypatch.setattr("jlora.metrics.java._candidates", list)
    without = [
        name for name in METRICS if name not in ("ROUGE_L", "CIDEr") and "METEOR" not in name
    ]
    assert len(without) == 7
    assert check_metrics(without) is None
    assert set(evaluate(without, ["a"], [["a", "b"]])) == set(without)
    for name in set(METRICS) - set(without):
        with pytest.raises(UserError, match="Java"):
            check_metrics([name])


@pytest.mark.parametrize("name", [name for name in METRICS if "METEOR" not in name])
def test_empty_texts_have_a_score(name):
    for hypotheses, references in (
        ([""], [["a b"]]),
        (["", "a b"], [["c"], ["a b", "b"]]),
        (["a"], [["", "."]]),
        ([""], [[""]]),
    ):
        score = evaluate([name], hypotheses, references)[name]
        assert math.isfinite(score)
        assert score >= 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["BLEU", "multibleu"], "no metric 'multibleu'; did you mean multi-BLEU"),
        (["chrf"], r"did you mean chrF\+\+"),
        (["ter"], "did you mean TER"),
        (["qqqq"], "there are BLEU, NIST"),
        ([], r"no list of metrics: \[\]"),
        ("BLEU", "no list of metrics: 'BLEU'"),
    ],
)
def test_unknown_metrics(names, message):
    with pytest.raises(UserError, match=message):
        evaluate(names, ["a"], [["a"]])


# --- by part

HYPOTHESES = ["a b c d", "e f g x", "h i j k", "y z"]
REFERENCES = [["a b c d"], ["e f g h", "e f"], ["h i j k l"], ["l m", "n"]]
PARTS = ["unseen", "seen", None, "unseen"]


def test_each_part_is_scored_as_if_alone():
    names = ("TER", "multi-BLEU", "NIST")
    scores = evaluate_parts(names, HYPOTHESES, REFERENCES, PARTS)
    assert list(scores) == [
        *names,
        *(f"{name}/unseen" for name in names),
        *(f"{name}/seen" for name in names),
    ]
    for suffix, chosen in (("", (0, 1, 2, 3)), ("/unseen", (0, 3)), ("/seen", (1,))):
        alone = evaluate(names, [HYPOTHESES[i] for i in chosen], [REFERENCES[i] for i in chosen])
        assert {name: scores[name + suffix] for name in names} == alone
    assert scores["TER"] == pytest.approx((0 + 1 / 4 + 1 / 5 + 1) / 4)


def test_without_parts_there_are_only_plain_names():
    assert evaluate_parts(["TER"], HYPOTHESES, REFERENCES, [None] * 4) == evaluate(
        ["TER"], HYPOTHESES, REFERENCES
    )


def test_meteor_is_started_once_for_all_parts(monkeypatch):
    started = []

    class Counting:
        def score(self, hypotheses, references):
            return len(hypotheses) + sum(map(len, references)) / 10

    def start(java):
        started.append(java)
        return contextlib.nullcontext(Counting())

    monkeypatch.setattr(jlora.metrics, "Meteor", start)
    monkeypatch.setattr(jlora.metrics, "find_java", lambda: "some java")
    names = ["METEOR-WebNLG", "TER"]
    scores = evaluate_parts(names, HYPOTHESES, REFERENCES, PARTS)
    assert started == ["some java"]
    assert [scores[f"METEOR-WebNLG{part}"] for part in ("", "/unseen", "/seen")] == [4.6, 2.3, 1.2]
    assert list(scores)[:2] == names


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["seen"], "1 parts for 4 inputs"),
        (["seen", None, "", None], "input 3: the name of its part is empty"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(UserError, match=message):
        evaluate_parts(["TER"], HYPOTHESES, REFERENCES, parts)


# --- real texts


@pytest.mark.slow
def test_webnlg_agrees_with_generation_eval(shared_data):
    """The last text of each input of WebNLG's development part against its other texts.

    Expected: GenerationEval's numbers, made as the fixture's.
    """
    path = shared_data / "webnlg" / "dev.json"
    if not path.is_file():
        pytest.skip("no webnlg/dev.json in the development data")
    groups: dict[str, list[str]] = {}
    for wrapped in json.loads(path.read_text(encoding="utf-8"))["entries"]:
        (entry,) = wrapped.values()
        good = [text["lex"] for text in entry["lexicalisations"] if text["comment"] == "good"]
        groups.setdefault(json.dumps(entry["modifiedtripleset"]), []).extend(good)
    texts = [group for group in groups.values() if len(group) > 1]
    assert len(texts) == 814
    scores = evaluate(
        [*WITHOUT_JAVA, "METEOR-WebNLG"],
        [group[-1] for group in texts],
        [group[:-1] for group in texts],
    )
    assert scores == {
        "multi-BLEU": pytest.approx(0.483847236736, abs=1e-11),
        "TER": pytest.approx(0.44298532419626524, rel=1e-12),
        "chrF++": pytest.approx(0.6966784682140494, rel=1e-12),
        "METEOR-WebNLG": pytest.approx(0.4174591804194142, rel=1e-12),
    }
