"""The benchmarks' arithmetic and their way of asking processes; no timings."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import sides, work


def test_flops_of_a_step_counted_one_product_at_a_time():
    config = {**work.GPT2, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    lengths, targets = np.array([3, 5]), 4
    forward = 0
    for length in lengths:
        for _ in range(config["n_layer"]):
            forward += sum(2 * length * i * o for i, o in ((8, 24), (8, 8), (8, 32), (32, 8)))
    head = 2 * targets * 8 * 50
    # Half of the T x T scores lie below the diagonal; two products forward, four backward.
    attention = sum(6 * 2 * length * length * 8 / 2 for length in lengths) * config["n_layer"]
    assert work.training_flops(config, lengths, targets) == 2 * forward + 2 * head + attention


def test_flops_of_the_llama_family_follow_its_layers():
    config = work.MODELS["smollm2-135m"]
    one = work.training_flops(config, np.array([1]), 0)
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert one == pytest.approx(4 * weights, rel=1e-3)


def test_batches_have_the_lengths_and_targets_asked_for(tmp_path):
    path = tmp_path / "batches.npz"
    rng, lengths, starts = np.random.default_rng(0), [np.array([3, 5])], [np.array([1, 4])]
    work.write_batches(path, rng, 11, lengths, starts)
    arrays = np.load(path)
    assert arrays["mask0"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert arrays["lengths0"].tolist() == [3, 5] and arrays["ids0"][0, 3:].tolist() == [0, 0]
    # A target is the next input.
    assert arrays["targets0"][1, :4].tolist() == arrays["ids0"][1, 1:].tolist()


def test_sides_answer_every_round_and_a_dead_one_is_named(monkeypatch):
    monkeypatch.setitem(sides.PYTHON, "here", sys.executable)
    side = sides.Side("peak", "peak", "here", {"rows": 4, "n": 8, "k": 8})
    sides.alternate([side], rounds=3, warmup=1)
    assert len(side.seconds) == 3 and side.first_seconds > 0 and side.peak_mb > 1
    with pytest.raises(RuntimeError, match="missing ended with exit code 1"):
        sides.Side("missing", "no_such_module", "here", {}).start()
