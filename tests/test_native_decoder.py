"""The native decoder against the model's own layers, which are the definition."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import randomise_adapter, tiny_gpt2, tiny_llama

from jlora import LoraConfig, engine, get_peft_model
from jlora.decoding import native_decoder, slabs
from jlora.decoding.beam import BeamConfig, beam_search
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.native_weights import native_model
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.kernels import packed_linear
from jlora.kernels.block import ACTIVATIONS
from jlora.models import gpt2, llama

pytestmark = needs_bf16

PANELS = {
    "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip
LORA = {"r": 2, "lora_alpha": 4}


def adapted(base, names, **settings):
    config = LoraConfig(target_modules=names, **LORA, **settings)
    return randomise_adapter(get_peft_model(base, config))


def merged():
    model = adapted(tiny_llama(), ["q_proj", "down_proj"])
    model.merge_adapter()
    return model


MAKE = {
    "gpt2": tiny_gpt2,
    "gpt2-merged-linear": lambda: adapted(
        tiny_gpt2(), ["c_attn"], enable_lora=[True, False, True]
    ),
    "gpt2-lora-everywhere": lambda: adapted(tiny_gpt2(), ["c_attn", "c_proj", "c_fc"]),
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
    "llama-biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama-one-key-head": lambda: tiny_llama(num_key_value_heads=1),
    "llama-many-heads": lambda: tiny_llama(num_attention_heads=22, num_key_value_heads=22),
    "llama-whole-panels": lambda: tiny_llama(**PANELS),
    "llama-whole-panels-lora": lambda: adapted(tiny_llama(**PANELS), ["q_proj", "up_proj"]),
    "gpt2-whole-panels": lambda: tiny_gpt2(n_embd=96),
    "qwen2": lambda: tiny_llama(model_type="qwen2"),
    "llama-lora": lambda: adapted(
        tiny_llama(), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ),
    "llama-merged": merged,
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5], [8, 9]]
# Rows after each step: beams that grow, change places and vanish; whole prompts that leave; rows
# of a prompt that stand apart.
ROWS = [[0, 0, 1, 1, 2, 3], [1, 0, 0, 3, 2, 4, 4, 5], [2, 2, 0, 3, 6, 5], [0, 3, 3, 5], [2, 0, 1]]


def wide_decoder(model):
    """With keys and values in float32, whatever the weights are kept in."""
    native = native_model(model)
    native.narrow, native.model["narrow"] = False, 0
    return NativeDecoder(native, model)


def close(actual, expected, tolerance=2e-4):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def states(decoder):
    """Hidden states of every step of decoding the prompts."""
    generator = np.random.default_rng(0)
    decoder.enter(PROMPTS)
    found = [np.array(decoder.hidden)]
    for rows in ROWS:
        decoder.advance(np.array(rows), generator.integers(0, 23, len(rows)))
        found.append(np.array(decoder.hidden))
    return found


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_states_of_every_step(make):
    model = make()
    expected = states(Decoder(model))
    # bf16 is up to 0.15 from float32, by the model's own layers as by the native ones.
    for precision, tolerance in (("fp32", 2e-4), ("bf16", 0.2)):
        engine.prepare(model, precision)
        decoder = decoder_of(model)
        assert isinstance(decoder, NativeDecoder)
        for actual, step in zip(states(decoder), expected):
            close(actual, step, tolerance)


def test_a_processor_without_bf16_products_decodes_floats(monkeypatch):
    model = tiny_llama()
    engine.prepare(model, "fp32")
    monkeypatch.setattr(packed_linear, "available", lambda kind: False)
    assert isinstance(decoder_of(model), NativeDecoder)


@pytest.mark.parametrize("kind", ["llama", "llama-whole-panels"])
def test_activation_and_positions_are_chosen_each_by_itself(kind, monkeypatch):
    """A gated GELU without positions, which no family has."""
    model = MAKE[kind]()
    with monkeypatch.context() as patch:
        patch.setattr(llama.SwiGLU, "execute", lambda self, gate, up: gpt2.GELU()(gate) * up)
        patch.setattr(llama.Rotary, "execute", lambda self, x, cos, sin: x)
        expected = states(Decoder(model))
    usual = states(Decoder(model))
    for precision, tolerance in (("fp32", 2e-4), ("bf16", 0.2)):
        engine.prepare(model, precision)
        decoder = decoder_of(model)
        decoder.model.model["activation"] = ACTIVATIONS["gelu_tanh"]
        decoder.model.model["frequencies"] = 0
        for actual, step in zip(states(decoder), expected):
            close(actual, step, tolerance)
    assert max(np.abs(a - b).max() for a, b in zip(usual, expected)) > 0.4


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_layer_that_is_trained_in_full_beside_quantised_ones(precision):
    """It is packed in bf16, and may not be multiplied together with its neighbours."""
    if not packed_linear.available(precision):
        pytest.skip(f"no {precision} products here")
    model = adapted(tiny_llama(**PANELS), ["q_proj"], modules_to_save=["k_proj", "gate_proj"])
    engine.prepare(model, precision)
    decoder = wide_decoder(model)  # as the layers' cache is
    for actual, step in zip(states(decoder), states(Decoder(model))):
        close(actual, step, 0.05)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "llama-whole-panels-lora"])
def test_states_where_the_packed_weights_are_kept_alone(kind, precision):
    """Against the same model's layers, which read the same packed weights."""
    if not packed_linear.available(precision):
        pytest.skip(f"no {precision} products here")
    model = MAKE[kind]()
    engine.prepare(model, precision, keep_weights=False)
    decoder = wide_decoder(model)  # as the layers' cache is
    for actual, expected in zip(states(decoder), states(Decoder(model))):
        close(actual, expected, 0.1)


@pytest.mark.parametrize("kind", ["gpt2", "llama-whole-panels-lora"])
def test_keys_and_values_in_bf16(kind):
    """Half the memory; next to float32 ones the states differ by bf16's rounding, and do differ."""
    model = MAKE[kind]()
    engine.prepare(model, "bf16")
    narrow, wide = decoder_of(model), wide_decoder(model)
    assert narrow.model.narrow and narrow.model.model["narrow"] == 1
    found, expected = states(narrow), states(wide)
    (small, *_), (large, *_) = narrow._prompts.values(), wide._prompts.values()
    assert 2 * small.numbers().nbytes == large.numbers().nbytes
    apart = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected)]
    assert 0 < max(apart) < 2**-5  # a few roundings of 2**-9, of a number that others are small to
    engine.prepare(model, "fp32")
    decoder = decoder_of(model)
    decoder.enter(PROMPTS)
    assert not decoder.model.narrow
    assert all(p.numbers().dtype == np.float32 for p in decoder._prompts.values())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_prompts_that_enter_later(make):
    """Each row is what it is alone, whenever its prompt entered and whatever has left."""
    model = make()
    engine.prepare(model, "fp32")
    alone = [Decoder(model) for _ in PROMPTS]
    decoder, tokens, live = decoder_of(model), np.random.default_rng(1), []
    for step in range(8):
        if step % 2 == 0:
            number = step // 2
            decoder.enter([PROMPTS[number]])
            alone[number].enter([PROMPTS[number]])
            live.append(number)
        for row, number in enumerate(live):
            close(decoder.hidden[row], alone[number].hidden.numpy()[0])
        if step == 5:
            kept = np.array([0, 2])  # the second prompt leaves
        else:
            kept = np.arange(len(live))
        live = [live[row] for row in kept]
        new = tokens.integers(0, 23, len(live))
        decoder.advance(kept, new)
        for number, token in zip(live, new):
            alone[number].advance(np.array([0]), np.array([token]))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_row_goes_on_after_some_of_its_tokens(make, native):
    """A conversation's next turn: each state is that of a decoder which ran all tokens anew."""
    model = make()
    engine.prepare(model, "fp32")
    goes_on(model, decoder_of(model) if native else Decoder(model))


def goes_on(model, decoder):
    tokens = [3, 1, 4, 1, 5]
    decoder.enter([tokens])
    # After all there is, within the generated tokens, within the first and the second prompt.
    for kept, more in ((9, [7, 2, 8]), (10, [6]), (4, [1, 2]), (1, [9, 9, 3, 3])):
        for token in (11, 12, 13, 14):
            decoder.advance(np.array([0]), np.array([token]))
            tokens = [*tokens, token]
        decoder.resume(kept, more)
        tokens = [*tokens[:kept], *more]
        anew = Decoder(model)
        anew.enter([tokens])
        close(np.array(decoder.hidden), anew.hidden.numpy())
    decoder.advance(np.array([0]), np.array([7]))
    anew.advance(np.array([0]), np.array([7]))
    close(np.array(decoder.hidden), anew.hidden.numpy())


def some_prompts(count):
    generator = np.random.default_rng(5)
    return [generator.integers(0, 23, n).tolist() for n in generator.integers(1, 9, count)]


SEARCH = BeamConfig(
    tuple(range(9)), num_beams=4, max_new_tokens=12, no_repeat_ngram_size=3, min_length=1,
    repetition_penalty=1.1, batch_size=4,
)  # fmt: skip


@functools.cache
def found_by_layers(kind, rank_up_to):
    return beam_search(MAKE[kind](), some_prompts(10), replace(SEARCH, rank_up_to=rank_up_to))


@pytest.mark.parametrize("rank_up_to", [None, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-lora"])
def test_beam_search_finds_the_same(kind, batch_size, rank_up_to):
    model = MAKE[kind]()
    engine.prepare(model, "fp32")
    config = replace(SEARCH, rank_up_to=rank_up_to, batch_size=batch_size)
    found = beam_search(model, some_prompts(10), config)
    for actual, right in zip(found, found_by_layers(kind, rank_up_to)):
        assert [h.ids for h in actual] == [h.ids for h in right]
        close([h.logprob for h in actual], [h.logprob for h in right])
    assert len({h.length for each in found for h in each if h.finished}) > 3


def test_sampling_draws_the_same():
    model = tiny_llama()
    config = GenerateConfig((0,), 10, temperature=0.8, top_k=9, seed=4, batch_size=3)
    prompts = some_prompts(7)
    expected = generate(model, prompts, config)
    engine.prepare(model, "fp32")
    assert [h.ids for h in generate(model, prompts, config)] == [h.ids for h in expected]


def test_two_threads_with_two_models_give_what_one_gives():
    """ctypes lets go of Python's lock, so the operators of both would run at once."""
    models = []
    for name in ("llama-whole-panels-lora", "gpt2-whole-panels"):
        model = MAKE[name]()
        engine.prepare(model, "bf16")
        models.append((native_model(model), model))

    def decode(number):
        found = []
        for _ in range(5):
            decoder = NativeDecoder(*models[number])
            found += [*states(decoder), *decoder.best(3)]
        return found

    alone = [decode(0), decode(1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(decode, range(2)))
    for expected, found in zip(alone, together):
        for a, b in zip(expected, found):
            np.testing.assert_array_equal(a, b)


def test_memory_does_not_grow_with_the_prompts(monkeypatch):
    for module in (native_decoder, slabs):
        monkeypatch.setattr(module, "SLAB", 64)  # 680 tokens would take eleven
    model = tiny_llama()
    engine.prepare(model, "fp32")
    decoder = decoder_of(model)
    decoder.enter([PROMPTS[0]])
    for step in range(136):
        if step % 8 == 0:  # the old prompt leaves, a new one takes its place
            decoder.enter([PROMPTS[step % 3]])
            rows = [len(decoder.hidden) - 1] * 5
        else:
            rows = [0, 0, 1, 2, 4]
        decoder.advance(np.array(rows), np.zeros(5, np.int32))
    assert len(decoder._prompts) == 1
    assert len(decoder._slabs.addresses) == 1


def test_what_it_cannot_do_runs_on_the_models_own_layers():
    model = tiny_llama()
    assert native_model(model) is None  # not prepared: the plain layers are the definition
    with_embedding = adapted(tiny_llama(), ["embed_tokens", "q_proj"])
    engine.prepare(with_embedding, "fp32")
    assert native_model(with_embedding) is None
    assert type(decoder_of(with_embedding)) is Decoder
    dropping = adapted(tiny_llama(), ["q_proj"], lora_dropout=0.5)
    engine.prepare(dropping, "bf16")
    assert native_model(dropping) is not None
    dropping.train()
    assert native_model(dropping) is None
