"""The metrics that need Java, and all of E2E's, against official scripts and by hand."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest

import jlora.metrics
from jlora.metrics import (
    E2E_METRICS,
    METRICS,
    evaluate,
    evaluate_e2e,
    read_hypotheses,
    read_references,
)
from jlora.metrics.bleu import bleu
from jlora.metrics.cider import cider
from jlora.metrics.meteor import Meteor
from jlora.metrics.ngrams import matches, tokenize
from jlora.metrics.nist import nist
from jlora.metrics.ptb import ptb_tokenize
from jlora.metrics.rouge import rouge_l
from jlora.system.errors import UserError

# Sentences written for this project; scores by tuetschek/e2e-metrics (-p), unrounded. Where its
# NIST divides by zero ("all_empty") its BLEU and NIST are null.
GOLDEN = json.loads(
    (Path(__file__).parent / "fixtures" / "e2e_metrics.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def tokenized() -> dict[str, tuple[list[str], list[list[str]]]]:
    """The golden cases through the PTB tokeniser, all in one Java run."""
    sentences = []
    for case in GOLDEN.values():
        sentences += case["hypotheses"] + [text for group in case["references"] for text in group]
    tokens = iter(ptb_tokenize(sentences))
    return {
        name: (
            [next(tokens) for _ in case["hypotheses"]],
            [[next(tokens) for _ in group] for group in case["references"]],
        )
        for name, case in GOLDEN.items()
    }


@pytest.fixture(scope="module")
def meteor() -> Meteor:
    with Meteor() as process:
        yield process


@pytest.fixture
def one_meteor(meteor, monkeypatch):
    """`evaluate` uses a METEOR that has started: loading its table takes seconds."""
    monkeypatch.setattr(jlora.metrics, "Meteor", lambda java: contextlib.nullcontext(meteor))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_case_agrees_with_the_official_script(name, tokenized, meteor):
    case = GOLDEN[name]
    words = [tokenize(text) for text in case["hypotheses"]]
    reference_words = [[tokenize(text) for text in group] for group in case["references"]]
    hypotheses, references = tokenized[name]
    scores = {
        "BLEU": bleu(words, reference_words),
        "NIST": nist(words, reference_words),
        "METEOR": meteor.score(hypotheses, references),
        "ROUGE_L": rouge_l(hypotheses, references),
        "CIDEr": cider(hypotheses, references),
    }
    for metric, expected in case["scores"].items():
        if expected is not None:
            assert scores[metric] == pytest.approx(expected, rel=1e-9, abs=1e-12), metric


GENERATION_EVAL = json.loads(
    (Path(__file__).parent / "fixtures" / "generation_eval.json").read_text(encoding="utf-8")
)["cases"]


@pytest.mark.parametrize("name", GENERATION_EVAL)
def test_meteor_of_webnlg_agrees_with_generation_eval(name, one_meteor):
    case = GENERATION_EVAL[name]
    scores = evaluate(["METEOR-WebNLG"], case["hypotheses"], case["references"])
    assert scores["METEOR-WebNLG"] == pytest.approx(case["scores"]["METEOR-WebNLG"], rel=1e-9)


def official_case(shared_data, name):
    folder = shared_data / "metrics"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[name]
    scores = evaluate_e2e(
        read_hypotheses(folder / f"{name}.hyp.txt"), read_references(folder / f"{name}.ref.txt")
    )
    assert tuple(scores) == E2E_METRICS
    assert {metric: round(score, 4) for metric, score in scores.items()} == expected


def test_official_baseline_to_four_decimals(shared_data):
    official_case(shared_data, "baseline")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["human", "jittor_gpt2m"])
def test_official_cases_to_four_decimals(shared_data, name):
    official_case(shared_data, name)


# --- words and n-grams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", [""]),
        ("   ", [""]),
        ("The Mill.", ["the", "mill", "."]),
        ("It's 3.5 of 5, not $1,250.", "it's 3.5 of 5 , not $ 1,250 .".split()),
        ("child-friendly 10-12", ["child-friendly", "10", "-", "12"]),
        ("&quot;a&quot; &amp;lt; b/c", ['"', "a", '"', "<", "b", "/", "c"]),
        ("<skipped>a b", ["a", "b"]),
        ("£20", ["£20"]),
        ("a\u00a0b", ["a", "b"]),
        ("wait...", ["wait", ".", ".", "."]),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text) == words


def test_matches_are_clipped_by_the_best_reference():
    found = matches("a a a b c".split(), ["a b".split(), "a a d".split()], 1)
    assert dict(found) == {("a",): 2, ("b",): 1}


# --- BLEU and NIST by hand


def test_bleu_by_hand():
    # 6 words: 5, 3, 2, 1 matched n-grams of 6, 5, 4, 3; one word shorter than the reference.
    score = bleu(["a b c d x e".split()], [["a b c d y e z".split()]])
    assert score == pytest.approx(math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_takes_the_nearest_length_and_of_two_the_shorter():
    # References of 3 and 7 words are equally near to 5, so there is no brevity penalty.
    score = bleu(["a b c d e".split()], [["a b c".split(), "a b c d e f g".split()]])
    assert score == pytest.approx(1.0)


def test_nist_by_hand():
    # One reference "a b a": info(a) = log2(3/2), info(b) = log2(3/1), info(ab) = log2(2/1),
    # info(ba) = log2(1/1) = 0, info(aba) = log2(1/1) = 0.
    score = nist(["a b a c d".split()], [["a b a".split()]])
    unigrams = (2 * math.log2(3 / 2) + math.log2(3)) / 5
    bigrams = math.log2(2) / 4
    assert score == pytest.approx(unigrams + bigrams)


def test_nist_penalty_is_a_half_at_two_thirds_of_the_length():
    reference = "a b c d e f g h i".split()
    assert nist(["a b c d e f".split()], [[reference]]) == pytest.approx(0.5 * math.log2(9))


def test_nist_is_defined_where_the_official_script_divides_by_zero():
    # Lengths 1 and 3 give (1 - 2) + (3 - 2) = 0 trigrams. Of four words "a" matches: log2(2/1).
    score = nist([["yes"], ["a", "b", "c"]], [[["no"]], [["a"]]])
    assert score == pytest.approx(math.log2(2) / 4)
    assert nist([[""]], [[["a", "pub"]]]) == 0.0


# --- ROUGE-L and CIDEr by hand


def test_rouge_l_by_hand():
    # Longest common subsequence 3 of 4 and 5 words; beta = 1.2.
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l(["a b c x"], [["a y b z c"]]) == pytest.approx(expected)
    assert rouge_l(["a b", "p"], [["a b"], ["q"]]) == pytest.approx(0.5)
    assert rouge_l([""], [["a"]]) == 0.0


def test_cider_by_hand():
    # Two inputs without a common word: every idf is log 2. The first has cosine 1/2 in 1-grams and
    # 0 in the other three orders, the second 0; equal lengths, so no length penalty.
    expected = 10 * (0.5 / 4 + 0) / 2
    assert cider(["a x", "q"], [["y a"], ["r s"]]) == pytest.approx(expected)


def test_cider_of_references_without_words_is_zero():
    assert cider(["a", "b"], [[""], ["", ""]]) == 0.0


# --- PTB


def test_ptb_tokenize_drops_punctuation_and_keeps_every_line():
    sentences = ["", 'It\'s (not) cheap -- "really"!', "", "£5 at café Olé...", "1 1/2", ""]
    assert ptb_tokenize(sentences) == [
        "",
        "it 's -lrb- not -rrb- cheap really",
        "",
        "# 5 at café olé",
        "1\u00a01/2",
        "",
    ]


# --- evaluate_e2e


def test_line_breaks_inside_texts_do_not_shift_lines(one_meteor):
    broken = ["The Old\nMill serves\u2028Greek food.", "The Blue Door is a pub."]
    references = [["The Old Mill serves Greek food."], ["The Blue Door\r\nis a pub."]]
    scores = evaluate_e2e(broken, references)
    assert scores["BLEU"] == scores["METEOR"] == scores["ROUGE_L"] == 1.0
    assert scores["CIDEr"] == pytest.approx(10.0)


def test_empty_references_beside_others_change_no_score(one_meteor):
    hypotheses = ["The Mill is a cheap pub .", "The Blue Door is by the river ."]
    references = [
        ["The Mill is a pub .", "A cheap pub is The Mill ."],
        ["The Door is at the river ."],
    ]
    padded = [["", *references[0], " "], [references[1][0], "", "\t"]]
    plain = evaluate(METRICS, hypotheses, references)
    assert evaluate(METRICS, hypotheses, padded) == plain
    assert plain["NIST"] > 0  # was changed most by an empty reference
    # The first six are those with text.
    many = [["", *["x y z"] * 5, "a b c d e"]]
    assert evaluate(["TER"], ["a b c d e"], many) == {"TER": 0.0}


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a"], [["a"], ["b", "c"]], "rows of one input must follow one another"),
        (["a"], [["a"], ["b", "c"]], "1 hypotheses but 2 groups of references"),
        (["a"], [["a"], ["b"]], "without empty lines"),
        ([], [], "no hypotheses"),
        (["a", "b"], [["a"], []], "input 2 has no references"),
    ],
)
def test_inputs_that_cannot_be_scored(hypotheses, references, message, one_meteor):
    with pytest.raises(UserError, match=message):
        evaluate_e2e(hypotheses, references)
