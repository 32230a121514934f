from __future__ import annotations

import numpy as np
import plain_llama
import pytest
from needs import needs_bf16
from plain_gpt2 import PlainGPT2
from tiny_models import (
    GPT2,
    LLAMA,
    ids_of,
    randomise_adapter,
    tiny_gpt2,
    tiny_llama,
    weights,
    wide_gpt2,
    wide_llama,
)

from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.models.attention import KeyRange, Stream
from jlora.models.gpt2 import GELU, GPT2Config
from jlora.models.head import cross_entropy
from jlora.models.llama import LlamaConfig
from jlora.system.runtime import jt

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
KINDS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "odd-heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6},
    "one-key-head": {"num_attention_heads": 5, "num_key_value_heads": 1},
    "attention-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral"},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3-rope": {"rope_scaling": LLAMA3, "head_dim": 8},
}


def models():
    return [pytest.param(tiny_gpt2, id="gpt2"), pytest.param(tiny_llama, id="llama")]


def run(model, ids, mask=None, cache=None) -> np.ndarray:
    mask = None if mask is None else jt.array(np.asarray(mask, dtype=np.int32))
    return model(jt.array(np.asarray(ids, dtype=np.int32)), mask, cache).numpy()


# --- logits ---


def test_gpt2_computes_what_float64_computes():
    model, ids = tiny_gpt2(), ids_of((2, 9))
    plain = PlainGPT2(weights(model), heads=3)
    for row, logits in zip(ids, run(model, ids)):
        np.testing.assert_allclose(logits, plain.logits(list(row)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_llama_computes_what_float64_computes(changes):
    model, ids = tiny_llama(**changes), ids_of((2, 9))
    config = {**LLAMA, **changes}
    for row, logits in zip(ids, run(model, ids)):
        expected = plain_llama.logits(weights(model), config, list(row))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_llama3_scaling_has_long_short_and_middle_waves():
    """Else the case above would check a part of the formula only."""
    config = {**LLAMA, **KINDS["llama3-rope"]}
    ratio = plain_llama.frequencies({**config, "rope_scaling": None}) / plain_llama.frequencies(
        config
    )
    assert ratio.min() == 1 and ratio.max() == 8
    assert ((ratio > 1.01) & (ratio < 7.9)).any()


def test_qwen2_has_biases_on_q_k_and_v_alone():
    names = [name for name in weights(tiny_llama(model_type="qwen2")) if "bias" in name]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_rope_parameters_of_transformers_5_mean_the_same():
    old = {**LLAMA, "rope_theta": 50.0, "rope_scaling": LLAMA3}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_theta": 50.0, **LLAMA3}
    a, b = LlamaConfig.from_dict(old), LlamaConfig.from_dict(new)
    assert a.rope_theta == b.rope_theta and b.rope_scaling["factor"] == 8.0
    plain = LlamaConfig.from_dict(
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    )
    assert plain.rope_theta == 7.0 and plain.rope_scaling is None


# --- padding and cache ---


@pytest.mark.parametrize("make", models())
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(make, side):
    model, ids = make(), ids_of((3, 8))
    mask = np.ones((3, 8), dtype=np.int32)
    for row, padding in enumerate((0, 3, 7)):
        if side == "left":
            mask[row, :padding] = 0
        else:
            mask[row, 8 - padding :] = 0
    padded = run(model, ids, mask)
    assert np.isfinite(padded).all()
    for row in range(3):
        alone = run(model, ids[row : row + 1, mask[row] == 1])[0]
        np.testing.assert_allclose(padded[row, mask[row] == 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", models())
@pytest.mark.parametrize("masks", [False, True], ids=["cache-remembers", "masks-given"])
def test_decoding_with_a_cache_equals_the_whole_sequence(make, masks):
    model, ids = make(), ids_of((2, 9))
    mask = np.ones((2, 9), dtype=np.int32)
    mask[1, :2] = 0
    whole = run(model, ids, mask)
    cache, pieces, start = model.new_cache(), [], 0
    assert cache.length == 0
    for end in (4, 5, 6, 9):  # a prompt, single tokens, several tokens
        given = mask[:, :end] if masks or start == 0 else None
        pieces.append(run(model, ids[:, start:end], given, cache))
        start = end
        assert cache.length == end
    stepwise = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(stepwise[mask == 1], whole[mask == 1], rtol=1e-4, atol=1e-4)


# --- streams ---

LENGTHS = [7, 1, 12, 3]
ENDS = np.cumsum(LENGTHS)
PRECISIONS = ["plain", "fp32", pytest.param("bf16", marks=needs_bf16)]


@pytest.mark.parametrize("make", [*models(), wide_gpt2, wide_llama])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sequences_of_a_stream_do_not_see_each_other(make, precision):
    model, ids = make(), ids_of((1, 23))
    for parameter in model.parameters():
        parameter.stop_grad()
    engine.prepare(model, precision)
    stream = model(jt.array(ids), Stream(LENGTHS)).numpy()
    assert stream.shape == (1, 23, 23)
    for length, end in zip(LENGTHS, ENDS):
        alone = run(model, ids[:, end - length : end])
        own = stream[:, end - length : end]
        if precision == "bf16":  # sums in another order may round to the next bf16 number
            assert np.linalg.norm(own - alone) < 5e-3 * np.linalg.norm(alone)
        else:
            np.testing.assert_allclose(own, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", models())
@pytest.mark.parametrize("precision", ["plain", "fp32"])
def test_gradients_of_a_stream_are_those_of_its_sequences(make, precision):
    names = ["c_attn"] if make is tiny_gpt2 else ["q_proj", "v_proj"]
    model = randomise_adapter(get_peft_model(make(), LoraConfig(r=2, target_modules=names)))
    model.train()
    engine.prepare(model, precision)
    ids, targets = ids_of((1, 23)), ids_of((23,), seed=1)
    parameters = [parameter for _, parameter in model.trainable_parameters()]

    def gradients(begin, end, keys=None):
        hidden = model.hidden_states(jt.array(ids[:, begin:end]), keys)[0]
        loss = model.target_losses(hidden, jt.array(targets[begin:end])).sum()
        return [gradient.numpy() for gradient in jt.grad(loss, parameters)]

    apart = [gradients(end - length, end) for length, end in zip(LENGTHS, ENDS)]
    for found, *parts in zip(gradients(0, 23, Stream(LENGTHS)), *apart):
        assert np.linalg.norm(found - sum(parts)) < 1e-4 * np.linalg.norm(found)


def test_positions_of_a_stream_begin_again():
    stream = Stream([3, 1, 2])
    column = jt.array(np.arange(6, dtype=np.int32)[None])
    assert stream.positions(column).numpy().tolist() == [[0, 1, 2, 0, 0, 1]]
    assert stream.starts.tolist() == [0, 3, 4, 6] and stream.longest == 3
    seen = stream.mask(6, 6).numpy()[0] & np.tri(6, dtype=bool)
    assert seen.sum(1).tolist() == [1, 2, 3, 1, 1, 2]


@pytest.mark.parametrize("make", models())
def test_stream_that_does_not_fit(make):
    model = make()
    for shape in ((1, 5), (1, 7), (2, 3)):
        with pytest.raises(ValueError, match=r"stream of 6 tokens needs .* shape \(1, 6\)"):
            model(jt.array(ids_of(shape)), Stream([4, 2]))
    with pytest.raises(ValueError, match="and no cache"):
        model(jt.array(ids_of((1, 6))), Stream([4, 2]), model.new_cache())


def test_a_stream_may_be_longer_than_gpt2_s_positions_and_its_sequences_not():
    model, ids = tiny_gpt2(n_positions=4), jt.array(ids_of((1, 9)))
    assert model(ids, Stream([4, 4, 1])).shape == [1, 9, 23]
    with pytest.raises(ValueError, match="5 tokens are more than the model's 4 positions"):
        model(ids, Stream([5, 4]))


# --- the cache ---


@pytest.mark.parametrize("make", models())
def test_reordered_cache_goes_on_as_the_rows_it_took(make):
    model, ids = make(), ids_of((2, 6))
    mask = np.ones((2, 6), dtype=np.int32)
    mask[1, :3] = 0
    rows, token = [1, 1, 0], np.array([[4], [5], [6]])
    cache = model.new_cache()
    run(model, ids, mask, cache)
    cache.reorder(rows)
    new_mask = np.concatenate([mask[rows], np.ones((3, 1), dtype=np.int32)], axis=1)
    whole = run(model, np.concatenate([ids[rows], token], axis=1), new_mask)
    np.testing.assert_allclose(run(model, token, None, cache)[:, 0], whole[:, -1], 1e-4, 1e-4)


@pytest.mark.parametrize("make", models())
def test_cache_with_padding_on_the_right_cannot_go_on(make):
    model, cache = make(), None
    cache = model.new_cache()
    run(model, ids_of((2, 3)), [[1, 1, 1], [1, 1, 0]], cache)
    cache.reorder([1, 0])
    with pytest.raises(ValueError, match="pad on the left"):
        run(model, [[1], [2]], None, cache)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], "row 0 has padding inside"),
        ([[1, 1], [1, 1]], "2 rows of 2 tokens, but there are 2 rows of 0 past and 3 new"),
        ([[1, 1, 1]], "1 rows of 3 tokens, but there are 2 rows"),
        ([1, 1, 1], r"shape \(B, S\)"),
    ],
)
def test_attention_mask_that_does_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_llama(), ids_of((2, 3)), mask)


def test_key_range_of_numpy_lists_and_empty_rows():
    keys = KeyRange.from_mask([[0, 1, 1], [1, 1, 0], [0, 0, 0], [2, 2, 2]])
    assert keys.first.numpy().tolist() == [1, 0, 0, 0]
    assert keys.last.numpy().tolist() == [3, 2, 0, 3]


def test_gpt2_refuses_more_tokens_than_it_has_positions():
    model = tiny_gpt2(n_positions=4)
    cache = model.new_cache()
    run(model, ids_of((1, 4)), None, cache)
    for ids, past in ((ids_of((1, 5)), None), (ids_of((1, 1)), cache)):
        with pytest.raises(ValueError, match="5 tokens are more than the model's 4 positions"):
            run(model, ids, None, past)


# --- configs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_head": 5}, "n_embd 12 is not a multiple of n_head 5"),
    ],
)
def test_gpt2_config_refuses_what_is_not_built(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_dict({**GPT2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "gemma.*llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "mistral", "sliding_window": 4.5}, "sliding_window is 4.5, no whole"),
        ({"use_sliding_window": True}, "use_sliding_window true is not computed for llama"),
        ({"num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "'dynamic'"),
    ],
)
def test_llama_config_refuses_what_is_not_built(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({**LLAMA, **changes})


@pytest.mark.parametrize("config", [GPT2Config.from_dict(GPT2), LlamaConfig.from_dict(LLAMA)])
def test_config_survives_its_own_dict(config):
    again = type(config).from_dict(config.to_dict())
    assert again == config
    assert config.to_dict()["architectures"][0].endswith(("LMHeadModel", "ForCausalLM"))


def test_configs_read_older_and_leaner_files():
    assert GPT2Config.from_dict({"n_ctx": 512}).max_positions == 512
    config = LlamaConfig.from_dict({"hidden_size": 64, "num_attention_heads": 4})
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    # Qwen2 files name a window that they do not use.
    LlamaConfig.from_dict({**LLAMA, "model_type": "qwen2", "sliding_window": 4096})


# --- gradients ---


@pytest.mark.parametrize("make", models())
def test_lora_gradients_equal_finite_differences(make):
    jt.set_global_seed(0)
    names = ["c_attn", "c_fc"] if make is tiny_gpt2 else ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(make(), LoraConfig(r=2, lora_alpha=4, target_modules=names))
    generator = np.random.default_rng(1)
    for _, parameter in model.trainable_parameters():
        values = 0.3 * generator.standard_normal(parameter.shape)
        parameter.assign(jt.array(values.astype(np.float32)))
        parameter.start_grad()
    ids, targets = jt.array(ids_of((2, 7))), jt.array(ids_of((14,), seed=1))
    mask = np.ones((2, 7), dtype=np.int32)
    mask[0, 5:] = 0

    def loss():
        hidden = model.hidden_states(ids, mask).reshape(14, -1)
        real = jt.array(mask.reshape(-1).astype(np.float32))
        return (model.target_losses(hidden, targets, 0.1) * real).sum()

    parameters = [parameter for _, parameter in model.trainable_parameters()]
    for parameter, gradient in zip(parameters, jt.grad(loss(), parameters)):
        gradient, start = gradient.numpy(), parameter.numpy()
        direction = generator.standard_normal(start.shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            parameter.assign(jt.array(start + sign * 1e-2 * direction))
            ends.append(loss().item())
        parameter.assign(jt.array(start))
        parameter.start_grad()
        slope = (ends[0] - ends[1]) / 2e-2
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(slope - (gradient * direction).sum()) < 5e-3 * scale
        assert np.linalg.norm(gradient) > 0


def test_the_gradient_of_gelu_is_finite_for_large_inputs():
    """Jittor's tanh has NaN gradients there: an activation of 11 ended a training."""
    x = np.array([-200, -30, -12, -11, -3, -0.5, 0, 0.5, 3, 11, 12, 30, 200], np.float64)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    expected = 0.5 * (1 + np.tanh(inner)) + 0.5 * x * (1 - np.tanh(inner) ** 2) * slope
    given = jt.array(x.astype(np.float32)).start_grad()
    y = GELU()(given)
    np.testing.assert_allclose(y.numpy(), 0.5 * x * (1 + np.tanh(inner)), atol=1e-6)
    np.testing.assert_allclose(jt.grad(y.sum(), [given])[0].numpy(), expected, atol=1e-6)


def test_loss_behind_a_likely_word_counts_the_unlikely_ones():
    """50,000 words of which one has nearly all: float32 added in a row would lose the others."""
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((4, 50_257)) - 3).astype(np.float32)
    logits[np.arange(4), rng.integers(0, 50_257, 4)] += 22
    targets = rng.integers(0, 50_257, 4).astype(np.int32)
    exact = logits.astype(np.float64)
    log_sums = np.log(np.exp(exact).sum(1))
    expected = log_sums - 0.9 * exact[np.arange(4), targets] - 0.1 * exact.mean(1)
    found = cross_entropy(jt.array(logits), jt.array(targets), 0.1).numpy()
    assert np.abs(found - expected).max() < 2e-5
