from __future__ import annotations

import json

import pytest

from jlora.decoding.hypothesis import Hypothesis
from jlora.decoding.predictions import (
    Prediction,
    make_prediction,
    read_predictions,
    rerank,
    write_lines,
    write_predictions,
)
from jlora.system.errors import UserError

SHORT = Hypothesis([1, 9], -2.0, 2, True, "short")
LONG = Hypothesis([1, 2, 3, 9], -3.0, 4, True, "a long one")
OPEN = Hypothesis([1, 2, 3, 4], -3.0, 4, False, "an open one")


def test_the_penalty_decides_between_short_and_long():
    # Per token: short -1, long -0.75; as plain sums: -2, -3.
    made = Prediction("p", "?", [SHORT, LONG])
    assert rerank([made], 0.0)[0].prediction == "short"
    assert rerank([made], 1.0)[0].prediction == "a long one"
    assert LONG.score(0.5) == pytest.approx(-1.5)
    assert rerank([made], 1.0)[0].hypotheses == [SHORT, LONG]


def test_ties_keep_the_stored_order_and_unfinished_ones_compete():
    assert rerank([Prediction("p", "", [SHORT, OPEN, LONG])], 1.0)[0].prediction == "an open one"
    assert rerank([Prediction("p", "", [SHORT, LONG, OPEN])], 1.0)[0].prediction == "a long one"


def test_ranking_needs_hypotheses():
    with pytest.raises(UserError, match="prediction 2 has no hypotheses"):
        rerank([Prediction("p", "a", [SHORT]), Prediction("q", "b")], 0.8)
    for penalty in (float("nan"), float("inf"), 11.0):
        with pytest.raises(UserError, match="length penalty"):
            rerank([Prediction("p", "a", [SHORT])], penalty)


def test_from_beam_search():
    beams = [
        Hypothesis(ids=[1, 9], logprob=-2.0, length=2, finished=True),
        Hypothesis(ids=[1, 2, 3, 4], logprob=-3.0, length=4, finished=False),
    ]
    made = make_prediction("p", beams, lambda ids: " " + "-".join(map(str, ids)) + " ", 1.0)
    assert made.prediction == "1-2-3-4"
    # The end token is no text, whether or not the tokenizer calls it special.
    assert made.hypotheses[0] == Hypothesis([1, 9], -2.0, 2, True, "1")
    for penalty in (0.0, 0.8, 1.3):
        scores = [hypothesis.score(penalty) for hypothesis in made.hypotheses]
        assert scores == [hypothesis.score(penalty) for hypothesis in beams]


def test_written_and_read_again(tmp_path):
    predictions = [Prediction("Café", "a\nb", [SHORT, OPEN]), Prediction("q", "")]
    path = tmp_path / "run" / "predictions.jsonl"
    write_predictions(path, predictions)
    assert read_predictions(path) == predictions
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert list(first) == ["prompt", "prediction", "hypotheses"]
    assert first["hypotheses"][0] == {
        "text": "short", "ids": [1, 9], "logprob": -2.0, "length": 2, "finished": True,
    }  # fmt: skip


def test_one_line_a_prediction(tmp_path):
    texts = ["one", "two\nlines \r\n here", "", "line\u2028separator"]
    write_lines(tmp_path / "hyp.txt", [Prediction("p", text) for text in texts])
    written = (tmp_path / "hyp.txt").read_text(encoding="utf-8")
    assert written == "one\ntwo lines here\n\nline separator\n"
    assert len(written.splitlines()) == len(texts)


def test_a_log_probability_that_is_no_number_leaves_nothing_behind(tmp_path):
    path = tmp_path / "predictions.jsonl"
    bad = Prediction("p", "t", [Hypothesis([1], float("nan"), 1, True, "t")])
    with pytest.raises(UserError, match="prediction 2 has a log-probability"):
        write_predictions(path, [Prediction("p", "t"), bad])
    assert list(tmp_path.iterdir()) == []


def line(**changes):
    return {"text": "a", "ids": [1], "logprob": -1, "length": 1, "finished": True, **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prediction": "a"}, ":2: no key 'prompt'"),
        ({"prompt": "a"}, ":2: no key 'prediction'"),
        ({"prompt": "a", "prediction": 3}, ":2: 'prediction' is a number"),
        ({"hypotheses": {}}, ":2: 'hypotheses' is not a list"),
        ({"hypotheses": ["a"]}, ":2: a hypothesis is a string, not an object"),
        ({"hypotheses": [{"text": "a"}]}, ":2: a hypothesis has no key 'ids'"),
        ({"hypotheses": [line(text=None)]}, "'text' is not a string"),
        ({"hypotheses": [line(ids=[1.5])]}, "'ids' is not a list of token ids"),
        ({"hypotheses": [line(ids=[True])]}, "'ids' is not a list of token ids"),
        ({"hypotheses": [line(logprob="x")]}, "'logprob' is not a finite number"),
        ({"hypotheses": [line(logprob=float("nan"))]}, "'logprob' is not a finite number"),
        ({"hypotheses": [line(logprob=-(10**400))]}, "'logprob' is not a finite number"),
        ({"hypotheses": [line(length=0)]}, "'length' is not a number of tokens"),
        ({"hypotheses": [line(finished=1)]}, "'finished' is not true or false"),
    ],
)
def test_bad_lines(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    good = {"prompt": "p", "prediction": "t"}
    if "hypotheses" in row:
        row = {**good, **row}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_an_empty_predictions_file(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        read_predictions(tmp_path / "p.jsonl")
