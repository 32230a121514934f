"""The running batch over a toy decoder: every request gets what it gets alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from toy_decoder import (
    PER_TOKEN,
    WORDS,
    ToyBank,
    ToyDecoder,
    after,
    logits_of,
)

from jlora.decoding import beam, sampling
from jlora.decoding.beam import BeamConfig, beam_search
from jlora.decoding.job import prompt_pieces
from jlora.decoding.requests import Request, TooLarge, Usage
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.decoding.scheduler import Scheduler
from jlora.kernels.topk import Draw, log_softmax_topk_numpy
from jlora.system.errors import UserError

CONTEXT = 400


class Told:
    """The events of a request; checks that one end comes, and comes last."""

    def __init__(self):
        self.tokens, self.logprobs, self.tops = [], [], []
        self.prompt = self.last = None

    def __call__(self, event):
        assert self.last is None
        if event.kind == "token":
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
            self.tops.append(event.top)
        elif event.kind == "prompt":
            assert self.prompt is None and not self.tokens
            self.prompt = event.prompt_logprobs
        else:
            self.last = event

    @property
    def result(self):
        return self.tokens, self.last.reason, self.last.usage.completion


def batch(bank=None, rows=64, memory=10**6, cache=0, chunk=16, words=WORDS, poison=None):
    """A scheduler and the list of the decoders that it has made."""
    made, bank = [], bank or ToyBank()

    def new():
        made.append(ToyDecoder(bank, words, poison))
        return made[-1]

    config = SimpleNamespace(vocab_size=words, max_positions=CONTEXT)
    return Scheduler(new, config, rows, memory, cache, chunk), made


def run(scheduler, most=10_000):
    for _ in range(most):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def answers(requests, slots=None, **settings):
    """What requests get that come at once."""
    scheduler, _ = batch(**settings)
    told = [Told() for _ in requests]
    for request, slot, tell in zip(requests, slots or [-1] * len(requests), told):
        scheduler.add(request, slot, tell)
    run(scheduler)
    return told


class Digits:
    """A constraint: tokens 10 to 19, from the third on any; the text has four tokens at least."""

    def __init__(self):
        self.seen = []

    def mask(self):
        if len(self.seen) >= 2:
            return None
        mask = np.zeros(-(-WORDS // 32), np.int32)
        mask[0] = sum(1 << token for token in range(10, 20))
        return mask

    def accept(self, token):
        self.seen.append(token)

    def may_end(self):
        return len(self.seen) >= 4


def biases_of(request, told):
    """What is added to which logits."""
    biases = dict(request.logit_bias)
    for token, count in Counter(told).items():
        lost = request.presence_penalty + count * request.frequency_penalty
        biases[token] = biases.get(token, 0.0) - lost
    return biases


def alone(request, weights=0, words=WORDS):
    """Tokens, log-probabilities and reason of one row, by plain loops over the whole vocabulary."""
    state = after(0, 1000 + weights)
    for token in request.prompt:
        state = after(state, token)
    random = np.random.default_rng([request.seed, 0])
    constraint = Digits() if request.constraint else None
    told, logprobs = [], []
    while len(told) < request.max_new_tokens:
        logits = logits_of(np.array([[state >> 24, state & 0xFFFFFF]], np.float32), words)[0]
        for token in {*request.prompt, *told}:
            penalty = np.float32(request.repetition_penalty)
            logits[token] = (
                logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            )
        for token, bias in biases_of(request, told).items():
            logits[token] += np.float32(bias)
        n = request.no_repeat_ngram_size
        for token in range(words if n else 0):
            grams = list(zip(*[[*told, token][i:] for i in range(n)]))
            if grams and grams[-1] in grams[:-1]:
                logits[token] = -np.inf
        if constraint:
            if len(told) < 2:
                logits[[t for t in range(words) if not 10 <= t < 20]] = -np.inf
            if len(told) < 4:
                logits[list(request.eos_token_ids)] = -np.inf
        values, ids = (found[0] for found in log_softmax_topk_numpy(logits[None], words))
        place = 0
        if request.temperature > 0:
            chances = request.top_k, request.top_p, request.min_p
            place = Draw(request.temperature, random.random(), *chances).place(values)
        told.append(int(ids[place]))
        logprobs.append(float(values[place]))
        if told[-1] in request.eos_token_ids:
            return told[:-1], logprobs[:-1], "stop"
        if constraint:
            constraint.accept(told[-1])
        state = after(state, told[-1])
    return told, logprobs, "length"


class OneAdapter:
    """The decoder that `sampling.generate` and `beam_search` want, over the toy one.

    Args:
        biases: gives what is added to which logits after generated tokens.
    """

    enters = False

    def __init__(self, slot=-1, bank=None, biases=lambda told: {}):
        self._toy, self._slot, self._biases = ToyDecoder(bank), slot, biases
        self.advance = self._toy.advance

    def enter(self, prompts):
        new = [self._toy.begin(prompt, self._slot) for prompt in prompts]
        self._toy.run(new, [len(prompt) for prompt in prompts])
        self._toy._rows = []
        self._toy.enter(new)

    def best(self, k, banned=None, penalised=None, penalty=1.0, draws=None):
        logits = logits_of(self._toy.hidden, WORDS)
        for row, (line, (_, told, _)) in enumerate(zip(logits, self._toy._rows)):
            for token in {t for t in (penalised[row] if penalised is not None else ()) if t >= 0}:
                factor = np.float32(penalty)
                line[token] = line[token] * factor if line[token] < 0 else line[token] / factor
            for token, bias in self._biases(told).items():
                line[token] += np.float32(bias)
        return log_softmax_topk_numpy(logits, k, banned, draws=draws)


MODEL = SimpleNamespace(config=SimpleNamespace(vocab_size=WORDS, max_positions=CONTEXT))


@pytest.fixture
def toy(monkeypatch):
    """`generate` and `beam_search` decode with the toy's base model."""
    for module in (sampling, beam):
        monkeypatch.setattr(module, "decoder_of", lambda model: OneAdapter())


def best_beam(request, slot, bank, monkeypatch):
    """Tokens and reason by `jlora.decoding.beam`, one prompt alone."""
    decoder = OneAdapter(slot, bank, partial(biases_of, request))
    monkeypatch.setattr(beam, "decoder_of", lambda model: decoder)
    config = BeamConfig(
        request.eos_token_ids,
        request.num_beams,
        request.length_penalty,
        request.no_repeat_ngram_size,
        request.max_new_tokens,
        repetition_penalty=request.repetition_penalty,
    )
    best = beam_search(MODEL, [request.prompt], config)[0][0]
    return best.text_ids, "stop" if best.finished else "length", best.length


def some_request(random, beams=True, shared=()):
    """A request of random settings; half of the prompts begin with one of ``shared``."""
    prompt = random.integers(0, WORDS, random.integers(1, 40)).tolist()
    if len(shared) and random.random() < 0.5:
        prompt = [*shared[random.integers(len(shared))], *prompt]
    settings = {
        "prompt": tuple(map(int, prompt)),
        "eos_token_ids": tuple(random.choice(WORDS, random.integers(0, 4), False).tolist()),
        "max_new_tokens": int(random.integers(1, 12)),
        "no_repeat_ngram_size": int(random.choice([0, 0, 1, 3])),
        "repetition_penalty": float(random.choice([1, 1, 1.3, 0.8])),
        "seed": int(random.integers(1000)),
        "presence_penalty": float(random.choice([0, 0, 0.7])),
        "frequency_penalty": float(random.choice([0, 0, 0.4, -0.3])),
        "logit_bias": {int(random.integers(WORDS)): 3.0, 7: -9.0} if random.random() < 0.3 else {},
    }
    if beams and random.random() < 0.25:
        settings["num_beams"] = int(random.integers(2, 6))
        settings["length_penalty"] = float(random.choice([-0.5, 0, 0.8, 2]))
        return Request(**settings)
    settings |= {
        "temperature": float(random.choice([0, 0, 0.7, 1, 1.5])),
        "top_k": int(random.choice([0, 0, 5])),
        "top_p": float(random.choice([1, 1, 0.8])),
        "min_p": float(random.choice([0, 0, 0.1])),
        "top_logprobs": int(random.choice([0, 0, 3])),
        "constraint": Digits() if random.random() < 0.2 else None,
    }  # fmt: skip
    if settings["constraint"] and settings["no_repeat_ngram_size"] == 1:
        settings["no_repeat_ngram_size"] = 0
    return Request(**settings)


@pytest.mark.parametrize("group", range(10))
def test_every_request_of_a_mix_gets_what_it_gets_alone(group, monkeypatch):
    """Of adapters, lengths, settings and beams, with cancellations, little memory and a cache."""
    for seed in range(16 * group, 16 * group + 16):
        random = np.random.default_rng(seed)
        bank = ToyBank()
        slots = [-1, *(bank.add() for _ in range(3))]
        rows, memory = int(random.integers(5, 30)), PER_TOKEN * int(random.integers(160, 800))
        scheduler, made = batch(
            bank,
            rows=rows,
            memory=memory,
            cache=PER_TOKEN * int(random.choice([0, 100, 1000])),
            chunk=int(random.choice([4, 16, 64])),
        )
        shared = [random.integers(0, WORDS, 25) for _ in range(2)]
        coming, jobs = [], []
        for _ in range(int(random.integers(1, 20))):
            request = some_request(random, shared=shared)
            coming.append((request, int(random.choice(slots)), Told()))
        cancelled = set()
        while coming or not scheduler.idle:
            while coming and random.random() < 0.4:
                request, slot, told = coming.pop()
                jobs.append((request, slot, told, scheduler.add(request, slot, told)))
            if jobs and random.random() < 0.03:
                cancelled.add(int(random.integers(len(jobs))))
                scheduler.cancel(jobs[max(cancelled)][-1])
            scheduler.step()
            assert scheduler.rows <= rows and made[0].memory <= scheduler.used <= memory
            assert scheduler.cache.bytes <= scheduler.cache.budget
        assert len(made) == 1 and made[0].most_memory <= memory
        assert made[0].rows == made[0].memory == scheduler.used == 0
        for request, slot, told, _ in jobs:
            assert told.last.kind == "end", told.last.error
            if request.num_beams > 1:
                expected = best_beam(request, slot, bank, monkeypatch)
            else:
                tokens, logprobs, reason = alone(request, bank.weights[slot])
                expected = tokens, reason, len(tokens) + (reason == "stop")
            if told.last.reason == "cancelled":
                assert told.tokens == expected[0][: len(told.tokens)]
                continue
            assert told.result == expected
            if request.num_beams == 1:
                assert told.logprobs == logprobs
            assert all(len(top) == request.top_logprobs for top in told.tops)
        if not any(told.last.reason == "cancelled" for _, _, told, _ in jobs):
            usages = [told.last.usage for _, _, told, _ in jobs]
            counts = scheduler.counts
            assert sum(u.cached for u in usages) == counts["cached tokens"]
            assert sum(u.prompt - u.cached for u in usages) == counts["prompt tokens"]
            assert sum(u.completion for u in usages) == counts["generated tokens"]
            assert sum(u.cached > 0 for u in usages) == counts["hits"]


def test_equals_generate(toy):
    random = np.random.default_rng(0)
    for setting in ({}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.3, "top_k": 9},
                    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2}):  # fmt: skip
        prompts = [random.integers(0, WORDS, n).tolist() for n in (3, 17, 40)]
        config = GenerateConfig((1, 2, 3), 20, seed=5, **setting)
        expected = [generate(MODEL, [prompt], config)[0] for prompt in prompts]
        requests = [
            Request(tuple(p), eos_token_ids=(1, 2, 3), max_new_tokens=20, seed=5, **setting)
            for p in prompts
        ]
        for told, one in zip(answers(requests), expected):
            assert told.result == (one.text_ids, "stop" if one.finished else "length", one.length)


def test_draws_from_a_large_flat_vocabulary():
    """Each row's head is asked once a step, whatever is drawn."""
    requests = [
        Request((3, n), max_new_tokens=4, seed=n, temperature=temperature, top_logprobs=n)
        for n, temperature in enumerate([1.0, 3.0, 0.2, 0.0] * 3)
    ]
    scheduler, made = batch(words=3000)
    told = [Told() for _ in requests]
    for request, tell in zip(requests, told):
        scheduler.add(request, -1, tell)
    run(scheduler)
    for request, tell in zip(requests, told):
        tokens, logprobs, _ = alone(request, words=3000)
        assert (tell.tokens, tell.logprobs) == (tokens, logprobs)
    calls = Counter(call[0] for call in made[0].calls)
    assert calls["best_of"] == 4 and calls["advance"] >= 4


@pytest.mark.parametrize("width", [65, 300])
def test_more_words_than_the_first_look_gives(width):
    (told,) = answers([Request((1,), max_new_tokens=2, top_logprobs=width)], words=3000)
    assert [len(top) for top in told.tops] == [width] * 2
    assert told.tops[0][0] == (told.tokens[0], told.logprobs[0])
    requests = [Request((1,), max_new_tokens=3, num_beams=n) for n in (2, width)]
    assert [t.last.reason for t in answers(requests, words=3000, rows=400)] == ["length"] * 2


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alternatives", [0, 2])
def test_log_probabilities_of_the_prompt(alternatives):
    """In pieces, beside others, with the prefix in the cache, which may not spare them."""
    random = np.random.default_rng(1)
    scheduler, _ = batch(cache=10**5, chunk=8)
    scores = [
        Request(tuple(random.integers(0, WORDS, n).tolist()), max_new_tokens=new,
                prompt_logprobs=alternatives)
        for n, new in ((1, 0), (2, 0), (33, 3), (8, 0), (400, 0))
    ]  # fmt: skip
    jobs = [(replace(r, prompt_logprobs=None, max_new_tokens=1), Told()) for r in scores]
    jobs += [(request, Told()) for request in scores]
    for request, told in jobs:
        if request.prompt_logprobs is None and len(request.prompt) == 400:
            continue
        scheduler.add(request, -1, told)
    run(scheduler)
    for request, told in jobs[len(scores) :]:
        assert told.last.reason == "length" and len(told.tokens) == request.max_new_tokens
        assert told.last.usage.cached == 0
        state, expected = after(0, 1000), [None]
        for token, following in zip(request.prompt, request.prompt[1:]):
            state = after(state, token)
            logits = logits_of(np.array([[state >> 24, state & 0xFFFFFF]], np.float32), WORDS)
            values, ids = (found[0] for found in log_softmax_topk_numpy(logits, WORDS))
            own = float(values[ids == following][0])
            few = values[:alternatives].tolist()
            expected.append((own, tuple(zip(ids[:alternatives].tolist(), few))))
        assert told.prompt == expected


def test_a_long_prompt_holds_up_neither_rows_nor_a_short_one():
    scheduler, made = batch(chunk=16)
    streams = [Told() for _ in range(16)]
    for number, told in enumerate(streams):
        scheduler.add(Request((number,), max_new_tokens=100), -1, told)
    scheduler.step()
    long = Told()
    scheduler.add(Request(tuple(range(WORDS)) * 6, max_new_tokens=2), -1, long)  # 300 tokens
    scheduler.step()
    steps, advances = 0, [0]

    def passes(told):
        advances.append(sum(call[0] == "advance" for call in made[0].calls))

    for length in (1, 8):  # the half of a piece that is not the long one's
        before = sum(call[0] == "advance" for call in made[0].calls)
        scheduler.add(Request((5,) * length, max_new_tokens=1), -1, passes)
        scheduler.step()
        scheduler.step()
        # Told after a single pass over the model, in which its prompt was run.
        assert advances[-1] == before + 1
        steps += 2
    while long.last is None:
        before = [len(told.tokens) for told in streams]
        scheduler.step()
        steps += 1
        assert [len(told.tokens) for told in streams] == [n + 1 for n in before]
    assert all(sum(call[1]) <= 16 for call in made[0].calls if call[0] == "run")
    assert steps <= 300 // 16 + 3


def test_many_short_prompts_do_not_starve_a_long_one():
    scheduler, _ = batch(chunk=16)
    scheduler.add(Request((1,), max_new_tokens=300), -1, Told())
    scheduler.step()
    long = Told()
    scheduler.add(Request((3,) * 160, max_new_tokens=1), -1, long)
    for step in range(21):
        for _ in range(3):
            scheduler.add(Request((step,) * 6, max_new_tokens=1), -1, Told())
        scheduler.step()
    assert long.last is not None


def test_pieces_share_out_the_budget():
    jobs = [SimpleNamespace(rest=rest) for rest in (100, 3, 9, 40)]
    pieces = prompt_pieces([_Hashed(job) for job in jobs], 32)
    assert [pieces.get(_Hashed(job), 0) for job in jobs] == [16, 3, 9, 4]
    assert prompt_pieces([], 32) == {}
    only = _Hashed(SimpleNamespace(rest=100))
    assert prompt_pieces([only], 32) == {only: 32}


class _Hashed:
    def __init__(self, job):
        self.job, self.rest = job, job.rest

    def __hash__(self):
        return id(self.job)

    def __eq__(self, other):
        return self.job is other.job


def test_rows_of_an_adapter_stand_together():
    bank = ToyBank()
    slots = [bank.add(), bank.add()]
    scheduler, made = batch(bank)
    for number in range(9):
        slot = [-1, *slots][number % 3]
        request = Request((number,), max_new_tokens=4, num_beams=1 + number % 2)
        scheduler.add(request, slot, Told())
    run(scheduler)
    seen = [call[1] for call in made[0].calls if call[0] == "advance"]
    assert any(len(set(adapters)) == 3 for adapters in seen)
    assert all(adapters == sorted(adapters) for adapters in seen)


# The cache ---------------------------------------------------------------------------------------


def conversation(scheduler, prompt, slot=-1, new=4):
    told = Told()
    scheduler.add(Request(tuple(prompt), max_new_tokens=new), slot, told)
    run(scheduler)
    return told.tokens, told.last.usage.cached


def test_a_conversation_goes_on_where_it_was():
    scheduler, _ = batch(cache=10**5)
    prompt = list(range(20))
    answer, cached = conversation(scheduler, prompt)
    assert cached == 0
    longer = [*prompt, *answer, 30, 31]
    again, cached = conversation(scheduler, longer)
    assert cached == 23  # the last token of an answer is never run
    assert again == alone(Request(tuple(longer), max_new_tokens=4))[0]
    assert len(scheduler.cache) == 1  # the longer one stands for the shorter
    assert conversation(scheduler, prompt)[1] == 19  # a prompt's last token is always run
    assert len(scheduler.cache) == 1


def test_nothing_is_found_across_adapters_or_their_slots():
    bank = ToyBank()
    first, second = bank.add(), bank.add()
    scheduler, _ = batch(bank, cache=10**5)
    prompt = list(range(20))
    for slot in (first, second, -1):
        assert conversation(scheduler, prompt, slot)[1] == 0
        assert conversation(scheduler, prompt, slot)[1] == 19
    scheduler.cache.forget(first)
    bank.remove(first)
    assert bank.add() == first  # other weights in the same place
    answer, cached = conversation(scheduler, prompt, first)
    assert cached == 0
    assert answer == alone(Request(tuple(prompt), max_new_tokens=4), bank.weights[first])[0]


def test_the_least_recently_used_leaves():
    size = 23 * PER_TOKEN  # of a prompt of 20 tokens and its answer
    scheduler, _ = batch(cache=3 * size)
    prompts = [[number] * 20 for number in range(4)]
    for prompt in prompts[:3]:
        conversation(scheduler, prompt)
    conversation(scheduler, prompts[0])  # used again
    conversation(scheduler, prompts[3])
    assert scheduler.cache.bytes == 3 * size
    assert [conversation(scheduler, prompts[n])[1] for n in (0, 3, 2)] == [19] * 3
    assert conversation(scheduler, prompts[1])[1] == 0
    assert conversation(scheduler, [9] * 100)[1] == 0  # larger than the cache: nothing leaves
    assert scheduler.cache.bytes == 3 * size


def test_requests_that_come_at_once_share_a_prompt():
    """Of equal prompts one is run; of one whose row goes on, what it has is copied."""
    scheduler, made = batch(cache=10**5, chunk=16)
    prompt, told = tuple(range(50)), [Told() for _ in range(5)]
    for number in range(4):
        request = Request(prompt, max_new_tokens=9, seed=number, temperature=1.0)
        scheduler.add(request, -1, told[number])
    unlike = Told()
    scheduler.add(Request((4,) * 50, max_new_tokens=9), -1, unlike)
    while not told[3].tokens:
        scheduler.step()
    scheduler.add(Request((*prompt, 3, 4), max_new_tokens=2), -1, told[4])
    run(scheduler)
    assert [each.last.usage.cached for each in told] == [0, 49, 49, 49, 50]
    assert scheduler.counts["prompt tokens"] == 50 + 3 + 2 + 50
    assert len({tuple(each.tokens) for each in told}) == 5
    begun = [call for call in made[0].calls if call[0] == "begin"]
    assert [call[1] for call in begun] == [0, 0, 49, 49, 49, 50]  # `unlike` waited for no one


def test_a_short_prompt_does_not_wait_for_a_long_one_with_its_beginning():
    scheduler, _ = batch(cache=10**5, chunk=16)
    scheduler.add(Request((1,), max_new_tokens=90), -1, Told())
    scheduler.step()
    scheduler.add(Request(tuple(range(WORDS)) * 5, max_new_tokens=1), -1, Told())
    scheduler.step()
    short = Told()
    scheduler.add(Request(tuple(range(20)), max_new_tokens=1), -1, short)
    for _ in range(4):
        scheduler.step()
    assert short.last is not None


def test_one_that_is_waited_for_may_be_cancelled():
    scheduler, _ = batch(cache=10**5, chunk=4)
    told = [Told(), Told()]
    jobs = [scheduler.add(Request((7,) * 40, max_new_tokens=1), -1, each) for each in told]
    scheduler.step()
    assert jobs[1] in scheduler.waiting
    scheduler.cancel(jobs[0])
    run(scheduler)
    assert told[0].last.reason == "cancelled" and told[1].last.reason == "length"


def test_keys_of_long_and_short_angles_are_not_mixed():
    """rope_type longrope turns all keys of a text beyond its limit by other angles."""
    rope = SimpleNamespace(limit=30, long=1)
    scheduler, _ = batch(cache=10**5)
    config = SimpleNamespace(vocab_size=WORDS, max_positions=CONTEXT, ropes=lambda: [rope])
    scheduler = Scheduler(ToyDecoder, config, 8, 10**6, 10**5)
    short, long = list(range(25)), list(range(45))
    assert conversation(scheduler, short)[1] == 0
    assert conversation(scheduler, long)[1] == 0
    assert conversation(scheduler, [*short, 9])[1] == 25
    assert conversation(scheduler, long)[1] == 44
    with pytest.raises(UserError, match="outgrow the 30"):
        scheduler.add(Request(tuple(range(28)), max_new_tokens=4), -1, Told())


# Limits and faults -------------------------------------------------------------------------------


def test_what_never_fits_is_refused_and_what_fits_later_waits():
    scheduler, made = batch(rows=4, memory=100 * PER_TOKEN)
    for request, text in (
        (Request((1,) * 60, max_new_tokens=41), "60 tokens of prompt and 1 x 41 new"),
        (Request((1,), max_new_tokens=34, num_beams=3), "1 tokens of prompt and 3 x 34 new"),
        (Request((1,), max_new_tokens=2, num_beams=5), "5 beams, and the server runs 4 rows"),
    ):
        with pytest.raises(TooLarge, match=text):
            scheduler.add(request, -1, Told())
    for request, text in (
        (Request((1,) * 400, max_new_tokens=2), "exceed the model's context of 400"),
        (Request((1, WORDS), max_new_tokens=2), "outside the model's vocabulary"),
        (Request((1,), logit_bias={WORDS: 1.0}), "logit_bias: token 50 is not in the model"),
        (Request((1,), eos_token_ids=(WORDS,)), "eos_token_ids: token 50"),
    ):
        with pytest.raises(UserError, match=text):
            scheduler.add(request, -1, Told())
    told = [Told() for _ in range(5)]
    for each in told:
        scheduler.add(Request((1,) * 30, max_new_tokens=15), -1, each)
    scheduler.step()
    assert len(scheduler.waiting) == 3  # two of 45 tokens fit
    run(scheduler)
    assert len({tuple(each.tokens) for each in told}) == 1
    assert made[0].most_memory <= 100 * PER_TOKEN


def test_a_large_request_is_not_passed_for_ever():
    scheduler, _ = batch(rows=4)
    large = Told()
    for number in range(3):
        scheduler.add(Request((number,), max_new_tokens=5 + number), -1, Told())
    scheduler.step()
    scheduler.add(Request((9,), max_new_tokens=2, num_beams=4), -1, large)
    for step in range(12):
        scheduler.add(Request((step,), max_new_tokens=5), -1, Told())
        scheduler.step()
    assert large.last is not None


def test_a_broken_row_is_its_own_request_s_fault():
    """NaN, a dead end, exceptions of a constraint and of on_event: the others go on."""

    class Broken(Digits):
        def __init__(self, **parts):
            super().__init__()
            vars(self).update(parts)

    def fail(*_):
        raise ZeroDivisionError("its own")

    nothing = np.zeros(2, np.int32)
    bad = [
        (Request((1, 13), max_new_tokens=9), "logits are not finite"),
        (Request((1,), constraint=Broken(mask=lambda: nothing)), "no token may come next"),
        (Request((1,), constraint=Broken(mask=fail)), "its own"),
        (Request((1,), constraint=Broken(accept=fail)), "its own"),
        (Request((1,), constraint=Broken(mask=lambda: np.zeros(9, np.int32))), r"shape \(9,\)"),
        (Request((1, 13, 2), max_new_tokens=0, prompt_logprobs=1), "logits are not finite"),
        (Request((2, 13), max_new_tokens=9, num_beams=3), "logits are not finite"),
    ]
    good = [Request((n, 2), max_new_tokens=9, logit_bias={13: -100.0}) for n in range(4)]
    expected = [each.result for each in answers(good)]
    scheduler, made = batch(poison=13, cache=10**5)
    told = [Told() for _ in (*bad, *good)]
    for request, each in zip([*(request for request, _ in bad), *good], told):
        scheduler.add(request, -1, each)
    silent = []

    def deaf(event):
        silent.append(event.kind)
        raise OSError("gone")

    scheduler.add(Request((2, 4), max_new_tokens=9), -1, deaf)
    run(scheduler)
    for (_, text), each in zip(bad, told):
        assert each.last.kind == "error"
        with pytest.raises(Exception, match=text):
            raise each.last.error
    assert [each.result for each in told[len(bad) :]] == expected
    assert silent == ["token", "end"]
    assert len(made) == 1 and scheduler.used == 0
    # Nothing of the broken ones is kept.
    assert sorted(len(call) for call in made[0].calls if call[0] == "keep") == [2] * (len(good) + 1)


def test_a_constraint_whose_text_is_complete_ends_it():
    class Pair(Digits):
        def mask(self):
            mask = np.zeros(2, np.int32)
            mask[0] = 0 if len(self.seen) == 2 else 1 << 11
            return mask

        def may_end(self):
            return len(self.seen) == 2

    with_end, without = answers(
        [
            Request((1,), eos_token_ids=(31, 40), constraint=Pair()),
            Request((1,), constraint=Pair()),
        ]
    )
    assert with_end.result == ([11, 11], "stop", 3)
    assert without.result == ([11, 11], "stop", 2)


def test_a_fault_of_the_decoder_is_told_to_all_that_run():
    scheduler, made = batch(rows=3)
    told = [Told() for _ in range(5)]
    for each in told:
        scheduler.add(Request((1, 2), max_new_tokens=3), -1, each)
    scheduler.step()
    made[0].fault = MemoryError("no memory")
    with pytest.raises(MemoryError):
        scheduler.step()
    scheduler.fail(MemoryError("no memory"))
    assert [each.last and each.last.kind for each in told] == ["error"] * 3 + [None] * 2
    run(scheduler)
    assert [each.last.kind for each in told[3:]] == ["end"] * 2
    assert len(made) == 2 and scheduler.used == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2000}, "num_beams is 2000"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"top_logprobs": 2000}, "top_logprobs is 2000"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of 3 is nan"),
        ({"logit_bias": {3: -1e39}}, "logit_bias of 3 is -1e"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias is for token -3"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature is 0.5, but must be 0 with num_beams"),
        ({"num_beams": 2, "top_logprobs": 1}, "top_logprobs is 1"),
        ({"num_beams": 2, "constraint": Digits()}, "constraint is"),
        ({"num_beams": 2, "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_a_request_checks_itself(settings, text):
    with pytest.raises(UserError, match=text):
        Request(**{"prompt": (1,), **settings})


def test_usage_of_a_cancelled_request():
    scheduler, _ = batch(cache=10**5)
    told = Told()
    job = scheduler.add(Request((1,) * 20, max_new_tokens=50), -1, told)
    for _ in range(4):
        scheduler.step()
    scheduler.cancel(job)
    scheduler.cancel(job)
    scheduler.step()
    assert scheduler.idle and scheduler.rows == 0
    assert told.last.usage == Usage(20, 0, 3)
    # What it has run is found again: a stop text ends a turn by a cancellation.
    assert conversation(scheduler, [*([1] * 20), *told.tokens, 5])[1] == 23
