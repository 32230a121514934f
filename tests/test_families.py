"""Every family's fast forms against its plain one, which `make parity` holds to transformers."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_bf16
from test_native_decoder import close, goes_on, states
from tiny_families import ALL, LAYERS, OTHER_LAYERS, tiny
from tiny_models import ids_of, randomise_adapter

from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.decoding.session import Session
from jlora.models.attention import Stream
from jlora.system.errors import UserError
from jlora.system.runtime import jt

LENGTHS = [7, 1, 40, 9]
IDS, TARGETS = ids_of((1, 57)), ids_of((57,), seed=1)


def adapted(name, **settings):
    names = OTHER_LAYERS.get(name, LAYERS)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, **settings)
    model = randomise_adapter(get_peft_model(tiny(name), config), scale=0.1)
    model.train()
    return model


def loss_and_gradient(model):
    hidden = model.hidden_states(jt.array(IDS), Stream(LENGTHS))[0]
    loss = model.target_losses(hidden, jt.array(TARGETS), 0.1).mean()
    named = sorted(model.trainable_parameters())
    gradients = jt.grad(loss, [parameter for _, parameter in named])
    return loss.item(), [gradient.numpy() for gradient in gradients]


def fused(model) -> list[int]:
    """How often each block has planned to run as one operator."""
    blocks = model.get_base_model().model.layers
    return [sum(p is not None for p in vars(b).get("_plans", {}).values()) for b in blocks]


def difference(a, b):
    a, b = (np.concatenate([x.ravel() for x in each]) for each in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@needs_bf16
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("name", ALL)
def test_fused_blocks_train_as_plain_ones_do(name, bias):
    """Over sequences longer and shorter than the window, the norms trained as well or not."""
    model = adapted(name, bias=bias)
    if bias == "all":
        for _, parameter in model.named_parameters():
            if len(parameter.shape) == 1:
                parameter.start_grad()
    loss, expected = loss_and_gradient(model)
    engine.prepare(model, "fp32")
    same, gradients = loss_and_gradient(model)
    assert abs(same - loss) < 1e-5 and difference(gradients, expected) < 1e-4
    engine.prepare(model, "bf16")
    near, gradients = loss_and_gradient(model)
    assert fused(model) == [1, 1]
    assert abs(near - loss) < 0.01 and difference(gradients, expected) < 0.025
    for found, wanted in zip(gradients, expected):
        least = 0.02 * max(np.linalg.norm(g) for g in expected)
        assert np.linalg.norm(found - wanted) < 0.1 * max(np.linalg.norm(wanted), least)


@needs_bf16
@pytest.mark.parametrize("name", ALL)
def test_native_decoding_is_the_plain_models(name):
    """Beams that branch and vanish, with texts longer than the window."""
    model = adapted(name)
    model.eval()
    expected = states(Decoder(model))
    for precision, tolerance in (("fp32", 3e-4), ("bf16", 0.2)):
        engine.prepare(model, precision)
        decoder = decoder_of(model)
        assert isinstance(decoder, NativeDecoder)
        for found, step in zip(states(decoder), expected):
            close(found, step, tolerance)
        values, ids = decoder.best(5)
        plain = Decoder(model)
        plain.hidden = jt.array(decoder.hidden)
        wanted, same = plain.best(5)
        close(values, wanted, 0.03)
        assert (ids == same).mean() > 0.8


@needs_bf16
@pytest.mark.parametrize(
    ("name", "native"), [(name, True) for name in ALL] + [("mistral", False), ("gemma3", False)]
)
def test_a_conversation_goes_on_after_some_of_its_tokens(name, native):
    """With windows that are shorter than what is kept."""
    model = tiny(name)
    engine.prepare(model, "fp32")
    goes_on(model, decoder_of(model) if native else Decoder(model))


@pytest.mark.parametrize("native", [True, False])
def test_a_conversation_that_outgrows_the_short_angles(native):
    """Its keys, which were turned by the short ones, are computed anew."""
    model = tiny("phi3", original_max_position_embeddings=20)
    if native:
        engine.prepare(model, "fp32")
    session, prompt = Session(model), list(range(1, 12))
    assert session.room(prompt) == 10  # up to the limit, the last one not being read
    for length in (10, 3, 3):
        config = GenerateConfig((), length)
        found = list(session.tokens(prompt, config))
        (anew,) = generate(model, [prompt], config)
        assert found == anew.ids
        prompt = [*prompt, *found]
        assert session.room(prompt) == 64 - len(prompt) + 1  # beyond, the context is the limit
    with pytest.raises(UserError, match="outgrow the 20 .* ask for 16 new tokens at most"):
        generate(model, [[1] * 5], GenerateConfig((), 17))


@pytest.mark.parametrize("keys", ["none", "cache"])
def test_a_text_that_outgrows_the_short_angles(keys):
    model = tiny("phi3", original_max_position_embeddings=8)
    ids = ids_of((1, 12))
    long = model(jt.array(ids)).numpy()
    short = model(jt.array(ids[:, :8])).numpy()
    assert np.abs(long[:, :8] - short).max() > 1e-3  # all of it is turned by the long ones
    cache = model.new_cache()
    model(jt.array(ids[:, :8]), cache=cache)
    with pytest.raises(ValueError, match="outgrows original_max_position_embeddings 8"):
        model(jt.array(ids[:, 8:9]), cache=cache)


def test_no_text_is_longer_than_dynamic_positions_are_computed():
    scaling = {"type": "dynamic", "factor": 2.0}
    model = tiny("internlm2", rope_scaling=scaling, max_position_embeddings=8)
    model(jt.array(ids_of((1, 8))))
    with pytest.raises(ValueError, match="9 tokens is longer than max_position_embeddings 8"):
        model(jt.array(ids_of((1, 9))))
