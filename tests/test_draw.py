"""Drawing a token from logits, and from a head's product: by the probabilities of all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_bf16
from plain_draws import interval, is_drawn

from jlora.kernels import packed_linear, topk
from jlora.kernels.decoder import head_logits, head_topk
from jlora.kernels.topk import Draw, log_softmax_topk, log_softmax_topk_numpy
from jlora.system.runtime import jt

SETTINGS = [
    {"temperature": 0.8},
    {"temperature": 1.0},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.97},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.4, "top_k": 500, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 3.0, "top_k": 90, "top_p": 0.9, "min_p": 0.3},
    {"temperature": 1e6, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 1.0},
]


def draws_of(rows, seed=0, settings=SETTINGS):
    """A draw for each row, with the settings in turn, and the settings."""
    random = np.random.default_rng(seed)
    own = [settings[row % len(settings)] for row in range(rows)]
    return [Draw(u=random.random(), **setting) for setting in own], own


def some_logits(rows, size, seed=0):
    """Rows of several kinds: normal ones, few values (so ties), peaked, equal, with -inf."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, size)) * 3
    for row in range(rows):
        kind = row // len(SETTINGS) % 5
        if kind == 1:
            logits[row] = np.round(logits[row])
        elif kind == 2:
            logits[row, random.integers(0, size, 3)] += 25
        elif kind == 3:
            logits[row] = 0
        elif kind == 4:
            logits[row, random.random(size) < 0.7] = -np.inf
            logits[row, 0] = 1
    return logits.astype(np.float32)


def check(logits, draws, settings, values, ids):
    for row, draw, setting, found, token in zip(logits, draws, settings, values[:, 0], ids[:, 0]):
        assert is_drawn(row, token, draw.u, **setting), (setting, draw.u)
        x = row.astype(np.float64)
        np.testing.assert_allclose(
            found, x[token] - x.max() - np.log(np.exp(x - x.max()).sum()), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("size", [1, 7, 128, 2000])
@pytest.mark.parametrize("choose", [log_softmax_topk, log_softmax_topk_numpy])
def test_draws_by_the_probabilities_of_all_tokens(size, choose):
    rows = 5 * len(SETTINGS)
    logits, (draws, settings) = some_logits(rows, size), draws_of(rows)
    values, ids = choose(logits, 3, draws=draws)
    check(logits, draws, settings, values, ids)
    likeliest = choose(logits, 3)
    np.testing.assert_array_equal(values[:, 1:], likeliest[0])
    np.testing.assert_array_equal(ids[:, 1:], likeliest[1])
    for k in (1, 30):  # however many of the likeliest are wanted besides
        np.testing.assert_array_equal(choose(logits, k, draws=draws)[1][:, 0], ids[:, 0])


@pytest.mark.parametrize("choose", [log_softmax_topk, log_softmax_topk_numpy])
def test_every_token_has_its_own_numbers(choose):
    """And those beside the ends of an interval are told apart."""
    logits = some_logits(1, 40)[0]
    for setting in SETTINGS[:8]:
        draws, tokens = [], []
        for token in range(40):
            low, high = interval(logits, token, **setting)
            if high - low > 1e-4:
                for u in (low + 1e-5, (low + high) / 2, high - 1e-5):
                    draws.append(Draw(u=u, **setting))
                    tokens.append(token)
        ids = choose(np.tile(logits, (len(draws), 1)), 1, draws=draws)[1]
        assert ids[:, 0].tolist() == tokens


@pytest.mark.parametrize("choose", [log_softmax_topk, log_softmax_topk_numpy])
def test_the_ends_of_the_numbers(choose):
    logits = np.array([[2, 5, -np.inf, 1, 4]], np.float32)
    last = 1 - 2**-53
    for temperature in (1e-30, 1e-3, 1.0, 30.0, 1e6):
        assert choose(logits, 1, draws=[Draw(temperature, 0.0)])[1][0, 0] == 1
        end = 3 if temperature >= 1 else 1
        assert choose(logits, 1, draws=[Draw(temperature, last)])[1][0, 0] == end
        for setting, token in (({"top_k": 2}, 4), ({"top_p": 0.5}, 1), ({"min_p": 1.0}, 1)):
            if temperature == 1:
                assert choose(logits, 1, draws=[Draw(1.0, last, **setting)])[1][0, 0] == token


@pytest.mark.parametrize("choose", [log_softmax_topk, log_softmax_topk_numpy])
def test_edits_come_before_the_draw(choose):
    logits = np.zeros((4, 70), np.float32)
    allowed = np.zeros((4, 3), np.int32)
    allowed[:, 2] = 0b111000  # tokens 67, 68, 69
    allowed[3] = -1
    edits = {
        "banned": [[68], [], [69, 67, 68], [0, 1]],
        "biased": [[], [67, 69], [], [5]], "biases": [[], [np.log(2), np.log(5)], [], [1e6]],
        "allowed": allowed,
    }  # fmt: skip
    tokens_of = {0.45: (67, 69, 5), 0.55: (69, 69, 5), 0.7: (69, 67, 5), 0.9: (69, 68, 5)}
    for u, tokens in tokens_of.items():
        values, ids = choose(logits, 2, draws=[Draw(1.0, u)] * 4, **edits)
        assert ids[[0, 1, 3], 0].tolist() == [*tokens]
        assert values[2, 0] == -np.inf  # none may come
        np.testing.assert_allclose(values[0, 0], np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("choose", [log_softmax_topk, log_softmax_topk_numpy])
def test_rows_that_are_not_drawn_or_broken(choose):
    logits = some_logits(4, 50)
    logits[1, 7], logits[3, 3] = np.nan, np.inf
    draws = [Draw(), Draw(1.0, 0.5), Draw(1.0, 0.5), Draw()]
    values, ids = choose(logits, 1, draws=draws)
    np.testing.assert_array_equal(np.isnan(values).all(1), [False, True, False, True])
    assert values[0, 0] == values[0, 1] and ids[0, 0] == ids[0, 1] == logits[0].argmax()
    with pytest.raises(ValueError):
        choose(logits, 1, draws=draws[:3])


def test_without_compiled_operators_the_twin_draws(monkeypatch):
    logits, (draws, _) = some_logits(30, 90), draws_of(30)
    expected = log_softmax_topk(logits, 2, draws=draws)
    monkeypatch.setattr(topk, "problem", lambda: "no compiler")
    found = log_softmax_topk(jt.array(logits), 2, draws=draws)
    np.testing.assert_array_equal(found[1], expected[1])


@needs_bf16
@pytest.mark.parametrize(("vocabulary", "rows"), [(23, 150), (3001, 70)])
def test_the_head_draws_from_its_product(vocabulary, rows):
    """Whichever rows stand beside one, drawn or not, more of them than are drawn together."""
    random = np.random.default_rng(vocabulary)
    weight = random.standard_normal((vocabulary, 12)).astype(np.float32)
    hidden = random.standard_normal((rows, 12)).astype(np.float32)
    hidden[5] = np.nan
    packed = packed_linear.PackedWeight(jt.array(weight), False)
    banned = random.integers(0, vocabulary, (rows, 4)).astype(np.int32)
    draws, _ = draws_of(rows, settings=[{"temperature": 0.0}, *SETTINGS])
    values, ids = head_topk(hidden, packed.address, 5, banned, draws=draws)
    expected = log_softmax_topk(head_logits(hidden, packed.address), 5, banned, draws=draws)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(values, expected[0], rtol=1e-6, atol=2e-6)
    assert np.isnan(values[5]).all()
    for row in (0, 1, 8, 64, rows - 1):
        own = slice(row, row + 1)
        alone = head_topk(hidden[own], packed.address, 2, banned[own], draws=draws[own])
        np.testing.assert_array_equal(alone[0][0], values[row, :3])
        np.testing.assert_array_equal(alone[1][0], ids[row, :3])
