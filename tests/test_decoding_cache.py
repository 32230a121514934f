"""The cache of decoding under the fused layers against the same under the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import ids_of, tiny_gpt2, tiny_llama

from jlora import engine
from jlora.system.runtime import jt

MAKE = {"gpt2": tiny_gpt2, "llama": tiny_llama}
# Rows after each step: beams that grow, change places, vanish; whole prompts that leave.
BEAMS = [[0, 0, 1, 1, 2], [1, 0, 0, 3, 2, 4, 4], [2, 2, 0, 3, 6, 5], [0, 3, 3, 5], [1, 2], [1]]
APART = [[0, 1, 2, 0, 1], [4, 0, 3, 1, 2], [2, 0, 2]]


def run(model, orders, widths=(1,), prompt=6, lengths=(6, 4, 5)):
    """Logits of every step of decoding three prompts, padded on the left."""
    cache = model.new_cache()
    mask = np.zeros((3, prompt), np.int32)
    for row, length in enumerate(lengths):
        mask[row, prompt - length :] = 1
    mask = None if mask.all() else mask
    found = [model(jt.array(ids_of((3, prompt))), mask, cache)[:, -1].numpy()]
    for step, rows in enumerate(orders):
        cache.reorder(rows)
        ids = ids_of((len(rows), widths[step % len(widths)]), seed=step + 1)
        found.append(model(jt.array(ids), cache=cache)[:, -1].numpy())
    return cache.length, found


@pytest.mark.parametrize("lengths", [(6, 4, 5), (6, 6, 6)], ids=["padded", "even"])
@pytest.mark.parametrize("widths", [(1,), (1, 1, 2)], ids=["one", "some-of-two"])
@pytest.mark.parametrize("orders", [BEAMS, APART], ids=["beams", "rows-apart"])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_logits_of_every_step(make, orders, widths, lengths):
    model = make()
    length, plain = run(model, orders, widths, lengths=lengths)
    engine.prepare(model, "fp32")
    fused_length, fused = run(model, orders, widths, lengths=lengths)
    assert fused_length == length
    for step, (actual, expected) in enumerate(zip(fused, plain)):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4, err_msg=str(step))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_steps_without_reordering_equal_the_whole_sequence(make):
    model, ids = make(), ids_of((2, 12))
    whole = model(jt.array(ids)).numpy()
    engine.prepare(model, "fp32")
    cache = model.new_cache()
    parts = [model(jt.array(ids[:, :5]), cache=cache)]
    parts += [model(jt.array(ids[:, at : at + 1]), cache=cache) for at in range(5, 12)]
    found = np.concatenate([part.numpy() for part in parts], axis=1)
    np.testing.assert_allclose(found, whole, rtol=2e-4, atol=2e-4)
