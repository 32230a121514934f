"""Every family's fast forms against its plain one, which `make parity` holds to transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from needs import needs_bf16
from test_native_decoder import close, goes_on, states
from tiny_families import ALL, LAYERS, OTHER_LAYERS, tiny
from tiny_models import ids_of, randomise_adapter

from jlora import engine
from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.decoding.session import Session
from jlora.engine.blocks import BLOCKS, learn
from jlora.models import phi3, rope
from jlora.models.attention import Stream
from jlora.models.families import FAMILIES
from jlora.system.errors import UserError
from jlora.system.runtime import jt

LENGTHS = [7, 1, 40, 9]
IDS, TARGETS = ids_of((1, 57)), ids_of((57,), seed=1)


def adapted(name, window=None):
    names = OTHER_LAYERS.get(name, LAYERS)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names)
    base = tiny(name) if window is None else tiny(name, sliding_window=window)
    model = randomise_adapter(get_peft_model(base, config), scale=0.1)
    model.train()
    return model


def loss_and_gradient(model, ids=IDS, lengths=LENGTHS, targets=TARGETS):
    hidden = model.hidden_states(jt.array(ids), Stream(lengths))[0]
    loss = model.target_losses(hidden, jt.array(targets), 0.1).mean()
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
@pytest.mark.parametrize(
    ("name", "norms"),
    [*((name, False) for name in ALL), ("qwen3", True), ("olmo2", True), ("gemma3", True)],
)
def test_fused_blocks_train_as_plain_ones_do(name, norms):
    """Over sequences longer and shorter than the window, the norms trained as well or not."""
    model = adapted(name)
    for _, parameter in model.named_parameters():
        if norms and len(parameter.shape) == 1:
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
@pytest.mark.parametrize("window", [1, 33, 150, 400])
def test_windows_of_any_length(window):
    """Which end inside and between the blocks of 32 keys that attention takes at a time."""
    model = adapted("mistral", window=window)
    long = {"ids": ids_of((1, 330)), "lengths": [300, 30], "targets": ids_of((330,), seed=1)}
    _, expected = loss_and_gradient(model, **long)
    engine.prepare(model, "bf16")
    assert difference(loss_and_gradient(model, **long)[1], expected) < 0.025
    assert fused(model) == [1, 1]


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


def test_what_no_family_has_together_is_left_to_the_layers():
    plain = FAMILIES["qwen3"].parts
    own = type("Block", (plain.block,), {})
    learn(replace(plain, block=own, modules={own: {}}, grouped=True))
    assert own not in BLOCKS


@pytest.mark.parametrize("name", ["phi3", "internlm2", "gemma2"])
def test_adapters_are_saved_loaded_and_merged(name, tmp_path):
    """On fused projections by PEFT's names; the parity cases load what PEFT has saved."""
    model = adapted(name)
    model.eval()
    ids = jt.array(ids_of((1, 9)))
    expected = model(ids).numpy()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny(name), tmp_path / "adapter")
    np.testing.assert_array_equal(again(ids).numpy(), expected)
    close(model.merge_and_unload()(ids).numpy(), expected, 1e-4)


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
    # And a new one that begins alike is short again.
    config = GenerateConfig((), 4)
    (anew,) = generate(model, [prompt[:15]], config)
    assert list(session.tokens(prompt[:15], config)) == anew.ids
    with pytest.raises(UserError, match="outgrow the 20 .* ask for 16 new tokens at most"):
        generate(model, [[1] * 5], GenerateConfig((), 17))


def test_a_text_that_outgrows_the_short_angles():
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


def each(attribute, value):
    """Another value of an attribute of every layer's attention."""

    def change(model):
        for block in model.get_base_model().model.layers:
            attention = getattr(block, block.names[0])
            holder = attention if hasattr(attention, attribute) else attention.attention
            setattr(holder, attribute, value)

    return change


def wider(model):
    for block in model.get_base_model().model.layers:
        scores = block.self_attn.attention
        scores.window = scores.window and scores.window + 1


def other_ropes(model):
    model.get_base_model().model.layer_ropes = [0, 0]


def no_amplitude(model):
    backbone = model.get_base_model().model
    backbone.ropes = [replace(rope, amplitude=1.0) for rope in backbone.ropes]


def no_norm(place):
    def change(model):
        for block in model.get_base_model().model.layers:
            norm = getattr(block, block.norms[place])
            norm.execute = lambda x: x

    return change


def no_norm_of_keys(model):
    for block in model.get_base_model().model.layers:
        block.self_attn.k_norm.execute = lambda x: x


def all_queries_first(model):
    for block in model.get_base_model().model.layers:
        attention = block.attention
        attention.qkv_proj = attention.wqkv
        attention.project = partial(phi3.Attention.project, attention)


def no_cap_of_logits(model):
    model.get_base_model().head.cap = None


#: What a fast path could leave out, or do by another family's rule.
OTHERWISE = [
    ("mistral", wider), ("qwen2", wider), ("phi3", wider), ("gemma2", wider),
    ("qwen3", no_norm_of_keys), ("gemma3", no_norm_of_keys), ("olmo2", no_norm_of_keys),
    ("smollm3", each("rotary", rope.Rotary())), ("glm", each("rotary", rope.Rotary())),
    ("gemma2", each("cap", None)), ("gemma2", no_cap_of_logits), ("gemma3", each("scale", 0.25)),
    ("gemma3", other_ropes), ("phi3", no_amplitude), ("internlm2", all_queries_first),
    *((name, no_norm(place)) for name in ("gemma3", "glm4") for place in range(4)),
    ("olmo2", no_norm(1)), ("olmo2", no_norm(3)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), OTHERWISE)
def test_each_part_is_seen(name, change):
    """Else the bound of the tests above would prove nothing of it."""
    model = adapted(name)
    _, expected = loss_and_gradient(model)
    change(model)
    assert difference(loss_and_gradient(model)[1], expected) > 0.05
