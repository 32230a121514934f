from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from plain_gpt2 import PlainGPT2

from jlora.decoding.beam import BeamConfig, Hypothesis, beam_search, rank
from jlora.system.errors import UserError


def straightforward(model, prompt, config):
    """The reference's rules for one prompt, step by step over whole sequences.

    Nothing is shared with jlora.decoding.beam: no cache, no batch, the full vocabulary sorted, and
    the best kept as the reference keeps it. Returns its tokens and score, and all that ended.
    """
    best, best_score, ended = None, None, []

    def consider(sequence, score):
        nonlocal best, best_score
        result = np.float32(score) / np.float32(len(sequence) ** config.length_penalty)
        if best is None or best_score < result:
            best, best_score = list(sequence), result
        ended.append((tuple(sequence), float(score)))

    beams = [([], np.float32(0))]
    for step in range(config.max_new_tokens):
        candidates = []
        for sequence, score in beams:
            if score == -np.inf:
                continue
            row = model.logits([*prompt, *sequence])[-1].copy()
            for token in set(sequence):
                if row[token] < 0:
                    row[token] *= np.float32(config.repetition_penalty)
                else:
                    row[token] /= np.float32(config.repetition_penalty)
            if step < config.min_length:
                row[list(config.eos_token_ids)] = -np.inf
            n = config.no_repeat_ngram_size
            if n:
                for token in range(len(row)):
                    grams = list(zip(*[[*sequence, token][i:] for i in range(n)]))
                    if grams and grams[-1] in grams[:-1]:
                        row[token] = -np.inf
            if np.isneginf(row).all():
                continue
            shifted = np.exp(row.astype(np.float64) - row.max())
            with np.errstate(divide="ignore"):
                logs = np.log(shifted / shifted.sum()).astype(np.float32)
            candidates += [([*sequence, t], score + logs[t]) for t in range(len(row))]
        candidates = [c for c in candidates if c[1] > -np.inf]
        beams = sorted(candidates, key=lambda c: -c[1])[: config.num_beams]
        for i, (sequence, score) in enumerate(beams):
            if sequence[-1] in config.eos_token_ids:
                consider(sequence, score)
                beams[i] = (sequence, np.float32(-np.inf))
    for sequence, score in beams:
        if score > -np.inf:
            consider(sequence, score)
    return best, best_score, ended


def merged_reference_model(folder, lora: str) -> PlainGPT2:
    """The reference run's model, its LoRA merged: W += alpha / r * (B A)^T for query and value."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    weights, adapter = load_file(folder / "model.safetensors"), load_file(folder / lora)
    r, scale = expected["r"], expected["lora_alpha"] / expected["r"]
    C = config["n_embd"]
    for i in range(config["n_layer"]):
        name = f"transformer.h.{i}.attn.c_attn"
        A, B = adapter[f"{name}.lora_A"], adapter[f"{name}.lora_B"]  # (2r, C), (2C, r)
        for group, block in enumerate((0, 2)):  # query and value of (query, key, value)
            delta = B[group * C : (group + 1) * C] @ A[group * r : (group + 1) * r]  # (out, in)
            weights[f"{name}.weight"][:, block * C : (block + 1) * C] += scale * delta.T
    return PlainGPT2(weights, config["n_head"], config["layer_norm_epsilon"])


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reference_case(folder):
    expected = json.loads((folder / "expected.json").read_text())
    prompts = [line["context"] for line in json_lines(folder / "queries.jsonl")]
    beams = [line["predict"] for line in json_lines(folder / "beams.jsonl")]
    config = BeamConfig(
        eos_token_ids=(expected["eos_token_id"],),
        num_beams=expected["beam"],
        length_penalty=expected["length_penalty"],
        no_repeat_ngram_size=expected["no_repeat_ngram_size"],
        max_new_tokens=expected["eval_len"],
        min_length=expected["min_length"],
    )
    return prompts, config, beams


def padded(ids, length):
    """beams.jsonl fills up with 0 after the end."""
    return ids + [0] * (length - len(ids))


def test_reference_run_token_for_token(shared_data):
    folder = shared_data / "reference" / "microsoft_lora"
    prompts, config, expected = reference_case(folder)
    results = beam_search(merged_reference_model(folder, "lora_final.safetensors"), prompts, config)
    assert len(results) == 12
    assert [padded(r[0].ids, config.max_new_tokens) for r in results] == expected


def test_reference_run_needs_its_adapter(shared_data):
    folder = shared_data / "reference" / "microsoft_lora"
    prompts, config, expected = reference_case(folder)
    results = beam_search(merged_reference_model(folder, "lora_init.safetensors"), prompts, config)
    assert [padded(r[0].ids, config.max_new_tokens) for r in results] != expected


def test_reference_run_with_jlora_gpt2(shared_data):
    """The same through jlora's own model on Jittor, weights merged by the plain helper."""
    from jlora.models import gpt2
    from jlora.system.runtime import jt

    folder = shared_data / "reference" / "microsoft_lora"
    prompts, config, expected = reference_case(folder)
    settings = gpt2.GPT2Config.from_dict(json.loads((folder / "config.json").read_text()))
    model = gpt2.GPT2LMHeadModel(settings)
    weights = merged_reference_model(folder, "lora_final.safetensors").weights
    for name, parameter in model.named_parameters():
        parameter.assign(jt.array(weights[name].astype(np.float32)))
    results = beam_search(model, prompts, config)
    assert [padded(r[0].ids, config.max_new_tokens) for r in results] == expected


def test_llama_batched_equals_straightforward_search():
    """Left padding, grouped heads and the growing cache of jlora's own model on Jittor."""
    from jlora.models.llama import LlamaConfig, LlamaForCausalLM
    from jlora.system.runtime import jt

    settings = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(settings)
    generator = np.random.default_rng(0)
    for _, parameter in model.named_parameters():
        values = 0.5 * generator.standard_normal(parameter.shape)
        parameter.assign(jt.array(values.astype(np.float32)))
    plain = SimpleNamespace(logits=lambda ids: model(jt.array(np.int32([ids])))[0].numpy())
    config = BeamConfig(eos_token_ids=(0, 3), num_beams=4, max_new_tokens=8, batch_size=3)
    prompts = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11], [12, 13]]
    for prompt, found in zip(prompts, beam_search(model, prompts, config)):
        best, best_score, ended = straightforward(plain, prompt, config)
        assert found[0].ids == best
        np.testing.assert_allclose(found[0].score(config.length_penalty), best_score, rtol=1e-4)
        assert {tuple(h.ids) for h in found} == {ids for ids, _ in ended}


@pytest.mark.parametrize("seed", range(40))
def test_equals_straightforward_search(seed):
    generator = np.random.default_rng(seed)
    vocabulary = int(generator.integers(3, 24))
    model = PlainGPT2.random(seed, vocabulary, scale=float(generator.uniform(0.2, 1.0)))
    ends = generator.choice(vocabulary, int(generator.integers(0, 3)), replace=False)
    config = BeamConfig(
        eos_token_ids=tuple(ends.tolist()),
        num_beams=int(generator.integers(1, 8)),
        length_penalty=float(generator.choice([-0.5, 0.0, 0.8, 1.0, 2.0])),
        no_repeat_ngram_size=int(generator.integers(0, 5)),
        max_new_tokens=int(generator.integers(1, 13)),
        min_length=int(generator.integers(0, 6)),
        repetition_penalty=float(generator.choice([1.0, 1.0, 1.3, 0.8])),
        batch_size=int(generator.integers(1, 5)),
    )
    prompts = [generator.integers(0, vocabulary, n).tolist() for n in generator.integers(1, 9, 5)]
    for prompt, found in zip(prompts, beam_search(model, prompts, config)):
        best, best_score, ended = straightforward(model, prompt, config)
        if best is None:  # n-gram blocking with a tiny vocabulary can leave nothing
            assert found == []
            continue
        assert found[0].ids == best
        np.testing.assert_allclose(
            found[0].score(config.length_penalty), best_score, rtol=1e-5, atol=1e-6
        )
        assert {tuple(h.ids) for h in found} == {ids for ids, _ in ended}
        logprobs = dict(ended)
        for h in found:
            assert h.length == len(h.ids)
            assert h.finished == (h.ids[-1] in config.eos_token_ids)
            np.testing.assert_allclose(h.logprob, logprobs[tuple(h.ids)], rtol=1e-5, atol=1e-6)


def test_leaving_early_keeps_every_winner():
    """With rank_up_to the best result is the full search's, for every penalty up to it."""
    full = BeamConfig(eos_token_ids=(0, 1, 2), num_beams=4, max_new_tokens=40)
    rows_full = rows_early = 0
    for seed in range(8):
        model = PlainGPT2.random(seed, 12)
        prompts = [[1 + (i * 7 + seed) % 11, i] for i in range(6)]
        all_found = beam_search(model, prompts, full)
        rows_full += model.rows_run
        model.rows_run = 0
        some_found = beam_search(model, prompts, replace(full, rank_up_to=1.0))
        rows_early += model.rows_run
        for every, some in zip(all_found, some_found):
            assert set(map(str, some)) <= set(map(str, every))
            for penalty in (-1.0, 0.0, 0.5, 0.8, 1.0):
                assert rank(some, penalty)[0] == rank(every, penalty)[0]
    assert rows_early < 0.9 * rows_full


def test_batched_equals_alone():
    model = PlainGPT2.random(3, 30)
    config = BeamConfig(eos_token_ids=(0,), num_beams=5, max_new_tokens=12, batch_size=8)
    prompts = [[i + 1] * (1 + i % 5) for i in range(8)]
    together = beam_search(model, prompts, config)
    alone = [beam_search(model, [prompt], config)[0] for prompt in prompts]
    assert [[h.ids for h in r] for r in together] == [[h.ids for h in r] for r in alone]


def test_equal_prompts_are_decoded_once_and_order_is_kept():
    model = PlainGPT2.random(4, 20)
    config = BeamConfig(eos_token_ids=(0,), num_beams=3, max_new_tokens=6, batch_size=2)
    prompts = [[5, 6, 7], [1], [5, 6, 7], [2, 3], [1]]
    calls = []
    results = beam_search(model, prompts, config, progress=lambda *args: calls.append(args))
    assert calls == [(2, 3), (3, 3)]
    assert results[0] == results[2] and results[1] == results[4]
    for prompt, result in zip(prompts, results):
        assert [h.ids for h in result] == [h.ids for h in beam_search(model, [prompt], config)[0]]
    assert beam_search(model, [], config) == []


def test_length_penalty_only_ranks():
    model = PlainGPT2.random(5, 15, scale=0.4)
    found = {}
    for penalty in (0.0, 0.8, 3.0):
        config = BeamConfig(eos_token_ids=(0, 1, 2), length_penalty=penalty, max_new_tokens=10)
        found[penalty] = beam_search(model, [[3, 4]], config)[0]
    assert rank(found[0.0], 3.0) == found[3.0]
    assert rank(found[3.0], 0.8) == found[0.8]
    assert found[0.0][0] != found[3.0][0]


def test_rank_breaks_ties_as_the_search_would():
    a = Hypothesis([1, 0], -2.0, 2, True)
    b = Hypothesis([1, 2, 0], -3.0, 3, True)  # the same score per token
    c = Hypothesis([1, 2, 3], -3.0, 3, False)
    for order in ([a, b, c], [c, b, a]):
        assert rank(order, 1.0) == [a, b, c]
    assert a.score(1.0) == -1.0 and a.score(0.0) == -2.0
    assert b.text_ids == [1, 2] and c.text_ids == [1, 2, 3]


def test_min_length_and_ngrams_hold():
    model = PlainGPT2.random(6, 10, scale=0.3)
    config = BeamConfig(eos_token_ids=(0,), no_repeat_ngram_size=2, min_length=4, max_new_tokens=9)
    for h in beam_search(model, [[1, 2, 1, 2]], config)[0]:
        assert h.length > 4
        pairs = list(zip(h.ids, h.ids[1:]))
        assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "input 2 has no tokens"),
        ([1] * 56, "input 2 has 56 tokens, which with 10 new ones exceed .* context of 64"),
        ([1, 20], "outside the model's vocabulary of 20"),
        ([-1], "outside the model's vocabulary of 20"),
    ],
)
def test_prompts_that_do_not_fit(prompt, message):
    config = BeamConfig(eos_token_ids=(0,), max_new_tokens=10)
    with pytest.raises(UserError, match=message):
        beam_search(PlainGPT2.random(7, 20), [[1], prompt], config)


def test_longest_prompt_that_fits():
    config = BeamConfig(eos_token_ids=(), num_beams=2, max_new_tokens=10)
    (result,) = beam_search(PlainGPT2.random(7, 20), [[1] * 55], config)
    assert result[0].length == 10


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 0},
        {"num_beams": 5000},
        {"max_new_tokens": 0},
        {"no_repeat_ngram_size": -1},
        {"min_length": -1},
        {"batch_size": 0},
        {"repetition_penalty": 0.0},
        {"rank_up_to": 0.5},
    ],
)
def test_settings_out_of_range(setting):
    (name,) = setting
    with pytest.raises(UserError, match=f"{name} is"):
        BeamConfig(eos_token_ids=(0,), **setting)


def test_broken_model_is_named():
    model = PlainGPT2.random(8, 10)
    model.weights["transformer.wte.weight"][3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, [[1, 2]], BeamConfig(eos_token_ids=(0,), max_new_tokens=5))


def test_prompts_leave_the_batch():
    """A model that always ends at once: one model call, nothing run after it."""
    calls = []

    class EndsAtOnce:
        config = SimpleNamespace(vocab_size=4, max_positions=100)

        def new_cache(self):
            return SimpleNamespace(reorder=lambda rows: None)

        def hidden_states(self, ids, mask, cache):
            calls.append(tuple(ids.shape))
            from jlora.system.runtime import jt

            return jt.zeros((*ids.shape, 4))

        def lm_head_logits(self, hidden):
            from jlora.system.runtime import jt

            return hidden + jt.array(np.array([0, -1e30, -1e30, -1e30], dtype=np.float32))

    config = BeamConfig(eos_token_ids=(0,), num_beams=1)
    (result,) = beam_search(EndsAtOnce(), [[1, 2]], config)
    assert result == [Hypothesis([0], 0.0, 1, True)]
    assert calls == [(1, 2)]
