from __future__ import annotations

import numpy as np
import pytest
from plain_draws import is_drawn
from plain_gpt2 import PlainGPT2

from jlora.decoding.sampling import GenerateConfig, generate, stream
from jlora.system.errors import UserError


def greedy(model, prompt, config):
    """The likeliest token, again and again, over whole sequences."""
    ids, logprob = [], 0.0
    while len(ids) < config.max_new_tokens:
        row = model.logits([*prompt, *ids])[-1].astype(np.float64)
        for token in set(prompt) | set(ids):
            factor = config.repetition_penalty
            row[token] = row[token] * factor if row[token] < 0 else row[token] / factor
        ids.append(int(row.argmax()))
        logprob += row.max() - np.log(np.exp(row).sum())
        if ids[-1] in config.eos_token_ids:
            break
    return ids, logprob


def some_prompts(count, vocabulary=25):
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocabulary, n).tolist() for n in generator.integers(1, 9, count)]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("seed", range(5))
def test_greedy(seed, penalty):
    model = PlainGPT2.random(seed, 25)
    config = GenerateConfig(tuple(range(8)), 12, repetition_penalty=penalty, batch_size=4)
    prompts = some_prompts(7)
    results = generate(model, prompts, config)
    for prompt, result in zip(prompts, results):
        ids, logprob = greedy(model, prompt, config)
        assert result.ids == ids
        assert result.length == len(ids)
        assert result.finished == (ids[-1] in config.eos_token_ids)
        np.testing.assert_allclose(result.logprob, logprob, rtol=1e-5, atol=1e-5)
    assert len({result.length for result in results}) > 1  # rows did leave at different times


def test_sampling_does_not_depend_on_the_batch():
    model = PlainGPT2.random(1, 25, scale=0.4)
    prompts = some_prompts(9)

    def run(batch_size, seed=3):
        config = GenerateConfig(
            (0,), 10, temperature=0.9, top_k=15, top_p=0.95, seed=seed, batch_size=batch_size
        )
        return [h.ids for h in generate(model, prompts, config)]

    assert run(1) == run(4) == run(9)
    assert run(4) != run(4, seed=4)


def test_equal_prompts_are_sampled_apart():
    model = PlainGPT2.random(1, 25, scale=0.4)
    results = generate(model, [[1, 2]] * 6, GenerateConfig((), 8, temperature=1.0))
    assert len({tuple(h.ids) for h in results}) > 1


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.8},
        {"min_p": 0.25},
        {"temperature": 1.5, "top_p": 0.95, "min_p": 0.1},
    ],
)
def test_tokens_are_drawn_with_their_probability(setting):
    """4,000 draws of one token against temperature, top-k, top-p, then min-p in plain numpy."""
    model = PlainGPT2.random(2, 10, scale=0.4)
    setting = {"temperature": 1.0, **setting}
    row = model.logits([4, 2])[-1].astype(np.float64) / setting["temperature"]
    p = np.exp(row - row.max())
    p /= p.sum()
    order = np.argsort(-p)
    p[order[setting.get("top_k", 10) :]] = 0
    p /= p.sum()
    kept, mass = [], 0.0
    for token in order:  # until the mass is reached, the token that reaches it included
        if mass < setting.get("top_p", 1.0) and p[token] > 0:
            kept.append(token)
            mass += p[token]
    p[[token for token in range(10) if token not in kept]] = 0
    p[p < setting.get("min_p", 0) * p.max()] = 0
    p /= p.sum()

    config = GenerateConfig((), max_new_tokens=1, batch_size=500, **setting)
    drawn = [h.ids[0] for h in generate(model, [[4, 2]] * 4000, config)]
    share = np.bincount(drawn, minlength=10) / 4000
    assert (share[p == 0] == 0).all()
    np.testing.assert_allclose(share, p, atol=4.5 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    "setting",
    [{}, {"temperature": 0.4}, {"temperature": 1.0}, {"temperature": 2.0, "top_p": 0.7},
     {"min_p": 0.2}, {"top_k": 12}, {"temperature": 1.5, "top_p": 0.9, "min_p": 0.05}],
)  # fmt: skip
def test_a_draw_is_a_number_s_place_among_all_tokens(setting):
    """The numbers are those of numpy's generator with the seed and the prompt's number."""
    model, setting = PlainGPT2.random(1, 25, scale=0.5), {"temperature": 0.8, **setting}
    prompts = some_prompts(6)
    config = GenerateConfig((0,), 12, seed=3, batch_size=4, **setting)
    for number, (prompt, text) in enumerate(zip(prompts, generate(model, prompts, config))):
        random = np.random.default_rng([3, number])
        rows = model.logits([*prompt, *text.ids[:-1]])[len(prompt) - 1 :]
        for row, token in zip(rows, text.ids, strict=True):
            assert is_drawn(row, token, random.random(), rounding=1e-4, **setting)


def test_a_tiny_top_p_or_temperature_is_greedy():
    model = PlainGPT2.random(3, 25, scale=0.6)
    prompts = some_prompts(4)
    expected = [h.ids for h in generate(model, prompts, GenerateConfig((0,), 8))]
    for setting in ({"top_p": 1e-9}, {"top_k": 1}):
        config = GenerateConfig((0,), 8, temperature=1.0, **setting)
        assert [h.ids for h in generate(model, prompts, config)] == expected
    config = GenerateConfig((0,), 8, temperature=1e-4)
    assert [h.ids for h in generate(model, prompts, config)] == expected


class Letters:
    """A tokenizer whose even ids are letters and whose odd ids are halves of a two-byte one."""

    def decode(self, ids):
        data = bytearray()
        for i in ids:
            data += bytes([97 + i // 2]) if i % 2 == 0 else (b"\xc3" if i % 4 == 1 else b"\xa4")
        return data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("seed", range(6))
def test_stream(seed):
    model = PlainGPT2.random(seed, 25, scale=0.6)
    config = GenerateConfig((0, 8), 12, temperature=1.0, seed=seed)
    (result,) = generate(model, [[5, 6]], config)
    assert "".join(stream(model, Letters(), [5, 6], config)) == Letters().decode(result.text_ids)


def test_stream_waits_for_whole_characters():
    class Fixed(PlainGPT2):
        def lm_head_logits(self, hidden):
            logits = np.full((1, 25), -50, dtype=np.float32)
            logits[0, self.script.pop(0)] = 0
            from jlora.system.runtime import jt

            return jt.array(logits)

    model = Fixed.random(0, 25)
    model.script = [2, 1, 3, 4, 1, 0]
    pieces = list(stream(model, Letters(), [5], GenerateConfig((0,), 12)))
    assert pieces == ["b", "\u00e4", "c", "\ufffd"]


def test_progress_and_nothing_to_do():
    model, calls = PlainGPT2.random(0, 25), []
    config = GenerateConfig((), 2, batch_size=2)
    generate(model, [[1], [2], [1]], config, progress=lambda *args: calls.append(args))
    assert calls == [(2, 3), (3, 3)]
    assert generate(model, [], config) == []


def test_prompts_that_do_not_fit():
    model = PlainGPT2.random(0, 25)
    for prompt, message in (([], "no tokens"), ([1] * 60, "context of 64"), ([25], "vocabulary")):
        with pytest.raises(UserError, match=message):
            generate(model, [prompt], GenerateConfig((0,), 10))
        with pytest.raises(UserError, match=message):
            list(stream(model, Letters(), prompt, GenerateConfig((0,), 10)))


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"stops": ("a", "")},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"batch_size": 0},
    ],
)
def test_settings_out_of_range(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"{name} is"):
        GenerateConfig((0,), **setting)
