"""The attention of the block operator (tile_attention.h) against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import tiny_gpt2, tiny_llama

from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.layers import assign
from jlora.models.attention import Stream
from jlora.system import runtime
from jlora.system.runtime import jt

pytestmark = pytest.mark.skipif(
    runtime.find_onednn() is None, reason="the engine needs oneDNN, which Jittor has not installed"
)

STREAM = (1, 31, 32, 33, 64, 100)


def model_of(kind: str, head_size: int):
    """One block whose attention matters: queries and keys large enough for uneven weights."""
    if kind == "gpt2":
        size = {"n_embd": 4 * head_size, "n_head": 4, "n_layer": 1, "n_positions": 512}
        base, names = tiny_gpt2(**size), ["c_attn"]
        several = {"enable_lora": [True, True, True]}
    else:
        size = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
        base = tiny_llama(**size, head_dim=head_size)
        names, several = ["q_proj", "k_proj", "v_proj"], {}
    for parameter in base.parameters():
        if len(parameter.shape) == 2:
            parameter.assign(parameter * (2 / parameter.shape[-1] ** 0.5))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, **several))
    generator = np.random.default_rng(3)
    for _, parameter in model.trainable_parameters():
        values = 0.1 * generator.standard_normal(parameter.shape)
        assign(parameter, jt.array(values.astype("f")))
    return model


def results(model, lengths):
    """Hidden states (tokens, width) and the gradients of the adapters."""
    generator = np.random.default_rng(4)
    ids = jt.array(generator.integers(0, 23, (1, sum(lengths))).astype(np.int32))
    hidden = model.hidden_states(ids, Stream(lengths))
    factor = jt.array(generator.standard_normal(hidden.shape).astype("f"))
    names, parameters = zip(*model.trainable_parameters())
    gradients = jt.grad((hidden * factor).sum(), list(parameters))
    return hidden.numpy()[0], {n: g.numpy() for n, g in zip(names, gradients)}


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize(
    "lengths", [(1,), (2,), (31,), (32,), (33,), (100,), (129,), (300,), STREAM, (5, 290, 1, 140)]
)
def test_block_attention_equals_the_plain_one(kind, head_size, lengths):
    model = model_of(kind, head_size)
    hidden, gradients = results(model, lengths)
    engine.prepare(model, "bf16")
    fused_hidden, fused = results(model, lengths)
    for row, fused_row in zip(hidden, fused_hidden):
        assert difference(fused_row, row) < 2.5e-2
    assert difference(fused_hidden, hidden) < 1e-2
    everything = [np.concatenate([g.ravel() for g in all.values()]) for all in (fused, gradients)]
    assert difference(*everything) < 1.5e-2
    for name, gradient in gradients.items():
        assert np.isfinite(fused[name]).all()
        assert np.linalg.norm(fused[name] - gradient) < 3e-2 * np.linalg.norm(gradient) + 1e-4, name
