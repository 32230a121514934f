from __future__ import annotations

import numpy as np
import pytest
from needs import needs_bf16

from jlora.kernels import packed_linear, topk
from jlora.kernels.decoder import head_logits, head_logprobs, head_topk
from jlora.kernels.topk import LARGEST_K, log_softmax_topk, log_softmax_topk_numpy
from jlora.system.runtime import jt


def both(logits, k, **edits):
    logits = np.asarray(logits, dtype=np.float32)
    fast = log_softmax_topk(jt.array(logits), k, **edits)
    for found, same in zip(fast, log_softmax_topk(logits, k, **edits)):  # without Jittor
        np.testing.assert_array_equal(found, same)
    return fast, log_softmax_topk_numpy(logits, k, **edits)


def assert_equal(fast, plain):
    np.testing.assert_array_equal(fast[1], plain[1])
    # A difference of 1e-6 relative in the log-probability, and as much in the probability.
    np.testing.assert_allclose(fast[0], plain[0], rtol=1e-6, atol=1e-6)
    assert fast[0].dtype == plain[0].dtype == np.float32
    assert fast[1].dtype == plain[1].dtype == np.int32


@pytest.mark.parametrize("size", [1, 2, 7, 127, 128, 129, 1000, 50257])
@pytest.mark.parametrize("rows", [1, 6])
def test_equals_its_twin(rows, size):
    generator = np.random.default_rng(size)
    logits = generator.standard_normal((rows, size)) * generator.uniform(0.1, 30)
    for k in (1, 3, 20):
        fast, plain = both(logits, k)
        assert fast[0].shape == (rows, min(k, size))
        assert_equal(fast, plain)


def test_twin_against_plain_softmax():
    logits = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    values, ids = log_softmax_topk_numpy(logits, 50)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(values), np.take_along_axis(p, ids, 1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(values).sum(1), 1, rtol=1e-5)
    assert (np.diff(values, axis=1) <= 0).all()


def test_log_probabilities_of_a_long_row_are_exact():
    """49,152 equal logits: each has probability 1 / 49,152, whatever their size."""
    for value in (0.0, 1e4, -1e4, 3e38):
        values, ids = log_softmax_topk(jt.array(np.full((1, 49152), value, dtype=np.float32)), 3)
        np.testing.assert_allclose(values, -np.log(49152), rtol=2e-7)
        np.testing.assert_array_equal(ids, [[0, 1, 2]])


def test_equal_logits_stand_in_order_of_id():
    logits = np.random.default_rng(1).integers(0, 4, (5, 700))
    assert_equal(*both(logits, 300))


@pytest.mark.parametrize("as_array", [False, True])
def test_bans_renormalise(as_array):
    logits = np.random.default_rng(2).standard_normal((3, 400)) * 5
    best = np.argsort(-logits, axis=1)
    banned = [[int(best[0, 0]), int(best[0, 2])], [-1, -1], [int(best[2, 0])] * 2]
    if as_array:
        banned = np.array(banned)
    fast, plain = both(logits, 5, banned=banned)
    assert_equal(fast, plain)
    np.testing.assert_array_equal(fast[1][0], best[0, [1, 3, 4, 5, 6]])
    left = np.delete(logits[0], best[0, [0, 2]])
    expected = np.sort(left)[::-1][:5] - np.log(np.exp(left).sum())
    np.testing.assert_allclose(fast[0][0], expected, rtol=1e-5)


def test_repetition_penalty():
    logits = np.random.default_rng(3).standard_normal((2, 300)) * 3
    penalised = [np.arange(0, 300, 2).tolist(), [5, 5, 5]]
    for penalty in (1.5, 0.7):
        fast, plain = both(logits, 30, penalised=penalised, penalty=penalty, banned=[[2], []])
        assert_equal(fast, plain)
    changed = logits[1].copy()
    changed[5] = changed[5] * 0.7 if changed[5] < 0 else changed[5] / 0.7  # once, not three times
    expected = np.sort(changed)[::-1][:30] - np.log(np.exp(changed).sum())
    np.testing.assert_allclose(fast[0][1], expected, rtol=1e-5, atol=1e-6)


def test_infinities_and_nan():
    logits = np.zeros((6, 200), dtype=np.float32)
    logits[0] = -np.inf
    logits[0, 150] = 3.0  # one token has all the probability
    logits[1] = -np.inf  # none has any
    logits[2, 70] = np.nan
    logits[3, 70] = np.inf
    logits[4] = np.finfo(np.float32).min  # what masks write for -inf
    fast, plain = both(logits, 3)
    assert_equal(fast, plain)
    np.testing.assert_array_equal(fast[0][0], [0, -np.inf, -np.inf])
    np.testing.assert_array_equal(fast[1][0], [150, 0, 1])
    assert np.isneginf(fast[0][[1, 4]]).all()
    assert np.isnan(fast[0][2:4]).all()
    np.testing.assert_allclose(fast[0][5], -np.log(200), rtol=1e-6)


def test_all_but_one_banned():
    fast, plain = both(np.random.default_rng(4).standard_normal((1, 5)), 5, banned=[[0, 1, 3, 4]])
    assert_equal(fast, plain)
    np.testing.assert_array_equal(fast[0], [[0, *[-np.inf] * 4]])
    np.testing.assert_array_equal(fast[1], [[2, 0, 1, 3, 4]])


def test_large_k():
    logits = np.random.default_rng(5).standard_normal((2, 3000))
    for k in (LARGEST_K, LARGEST_K + 1, 5000):
        fast, plain = both(logits, k)
        assert_equal(fast, plain)
        assert fast[0].shape == (2, min(k, 3000))


def test_without_compiled_operators_the_twin_answers(monkeypatch):
    def operator(*_):
        raise AssertionError("there is none")

    monkeypatch.setattr(topk, "problem", lambda: "no compiler")
    monkeypatch.setattr(topk, "operator", operator)
    assert_equal(*both(np.arange(12).reshape(2, 6), 3, banned=[[5], [-1]]))


@needs_bf16
@pytest.mark.parametrize(
    ("vocabulary", "width", "rows", "k"),
    [(1003, 64, 37, 10), (23, 12, 5, 23), (23, 12, 5, 30), (4100, 96, 3, 1)],
)
def test_the_heads_product_and_its_best_words_together(vocabulary, width, rows, k):
    generator = np.random.default_rng(vocabulary)
    weight = generator.standard_normal((vocabulary, width)).astype(np.float32)
    weight[vocabulary - 1] = weight[5] = weight[3]  # equal logits stand in the order of their ids
    hidden = generator.standard_normal((rows, width)).astype(np.float32)
    hidden[0] = weight[3]
    hidden[1] = np.nan
    banned = generator.integers(-1, vocabulary, (rows, 5)).astype(np.int32)
    penalised = generator.integers(-1, vocabulary, (rows, 9)).astype(np.int32)
    packed = packed_linear.PackedWeight(jt.array(weight), False)
    logits = packed(jt.array(hidden))
    expected = log_softmax_topk(logits, k, banned, penalised, 1.3)
    own = head_logits(hidden, packed.address)
    np.testing.assert_allclose(own, logits.numpy(), rtol=1e-5, atol=1e-5)
    for row in range(rows):  # whichever rows stand beside it
        alone = head_logits(hidden[row : row + 1], packed.address)[0]
        np.testing.assert_array_equal(own[row], alone)
    values, ids = head_topk(hidden, packed.address, k, banned, penalised, 1.3)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_allclose(values, expected[0], rtol=1e-6, atol=2e-6)


@needs_bf16
@pytest.mark.parametrize("vocabulary", [64, 5000], ids=str)
def test_a_rows_words_and_their_log_probabilities_do_not_depend_on_the_others(vocabulary):
    """Not in a single bit: panels of words go to the same threads however many rows there are."""
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((vocabulary, 64)).astype(np.float32)
    hidden = generator.standard_normal((1000, 64)).astype(np.float32)
    targets = generator.integers(0, vocabulary, 1000).astype(np.int32)
    packed = packed_linear.PackedWeight(jt.array(weight), False)
    best = [head_topk(row[None], packed.address, 3) for row in hidden]
    values, ids = (np.concatenate(of_all) for of_all in zip(*best))
    logprobs = [head_logprobs(hidden[i : i + 1], targets[i : i + 1], packed.address)[0]
                for i in range(1000)]  # fmt: skip
    for rows in (2, 4, 5, 33, 641, 1000):
        together = head_topk(hidden[:rows], packed.address, 3)
        np.testing.assert_array_equal(together[1], ids[:rows])
        np.testing.assert_array_equal(together[0], values[:rows])
        found = head_logprobs(hidden[:rows], targets[:rows], packed.address)
        np.testing.assert_array_equal(found, logprobs[:rows])


@needs_bf16
def test_the_heads_sums_lose_no_unlikely_words():
    """Each of 32,768 words weighs less than the last bit of the likely one."""
    head, hidden = np.zeros((2**15, 1), np.float32), np.ones((1, 1), np.float32)
    head[5] = 17.0
    values, ids = head_topk(hidden, head.ctypes.data, 1, words=len(head))
    assert ids[0, 0] == 5
    assert values[0, 0] == pytest.approx(-np.log1p((len(head) - 1) * np.exp(-17.0)), abs=3e-6)
