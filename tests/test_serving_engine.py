"""The engine's thread over toys: requests, adapters, cancellations and faults."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_scheduler import CONTEXT, Told, alone, some_request
from toy_decoder import PER_TOKEN, WORDS, ToyBank, ToyDecoder

from jlora.decoding.requests import QueueFull, Request, Stopping, TooLarge
from jlora.serving.engine import Engine
from jlora.system.errors import UserError

LONG = 60  # seconds after which a test fails that would hang


class Gate:
    """Where the engine's thread can be held: nothing is open until `open` lets a step pass."""

    def __init__(self):
        self._tokens = threading.Semaphore(0)
        self._reached = threading.Semaphore(0)
        self._free = False

    def wait(self):
        self._reached.release()
        if not self._free:
            assert self._tokens.acquire(timeout=LONG)

    def reached(self):
        """Wait until the thread stands before the gate."""
        assert self._reached.acquire(timeout=LONG)

    def open(self):
        self._tokens.release()

    def open_for_good(self):
        self._free = True
        self._tokens.release(1000)


class ToyModel:
    """A `ServedModel` of toys. An adapter's path is the number that its weights are made of."""

    def __init__(self, gate=None, words=WORDS):
        self.config = SimpleNamespace(vocab_size=words, max_positions=CONTEXT)
        self.tokenizer = None
        self.bank, self.decoders, self._gate = ToyBank(), [], gate
        self.thread = threading.get_ident()
        self.fault = None  # raised where another decoder is made

    def new_decoder(self):
        if self.fault is not None:
            raise self.fault
        decoder = ToyDecoder(self.bank)
        if self._gate is not None:
            run = decoder.advance

            def advance(*arguments):
                self._gate.wait()
                return run(*arguments)

            decoder.advance = advance
        self.decoders.append(decoder)
        return decoder

    def add(self, path):
        assert threading.get_ident() == self.thread
        if path.name == "broken":
            raise UserError("broken: no adapter")
        return self.bank.add(int(path.name))

    def remove(self, slot):
        assert threading.get_ident() == self.thread
        self.bank.remove(slot)


class Answer(Told):
    """Events of a request, which a test can wait for."""

    def __init__(self):
        super().__init__()
        self.done, self.begun = threading.Event(), threading.Event()
        self.threads = set()

    def __call__(self, event):
        self.threads.add(threading.current_thread().name)
        super().__call__(event)
        self.begun.set()
        if self.last is not None:
            self.done.set()

    def wait(self):
        assert self.done.wait(LONG)
        return self


@pytest.fixture
def start():
    """Makes engines of toys, which end with the test."""
    engines, gates = [], []

    def make(gate=None, **settings):
        model = []

        def opened(*_):
            model.append(ToyModel(gate))
            return model[0]

        gates.append(gate)
        engines.append(Engine("toy", open_model=opened, **settings))
        return engines[-1], model[0]

    yield make
    for gate in gates:
        if gate is not None:
            gate.open_for_good()
    for engine in engines:
        engine.close()
    assert not [t for t in threading.enumerate() if t.name == "jlora-engine"]


def ask(engine, prompt=(1, 2), new=4, adapter=None, **settings):
    answer = Answer()
    request = Request(tuple(prompt), adapter, max_new_tokens=new, **settings)
    return engine.submit(request, answer), answer


@pytest.mark.parametrize("seed", range(10))
def test_every_answer_is_its_own_adapter_s(seed, start):
    """Requests, reloads, removals and cancellations, as fast as they come."""
    random = np.random.default_rng(seed)
    engine, model = start(
        max_rows=9,
        token_bytes=PER_TOKEN * 300,
        cache_bytes=PER_TOKEN * int(random.choice([0, 400])),
        chunk=8,
    )
    shared, loaded, asked = [random.integers(0, WORDS, 25)], {}, []
    for _ in range(60):
        act = random.random()
        if act < 0.15 or not loaded:
            name, weights = "abc"[random.integers(3)], int(random.integers(1, 10**6))
            info = engine.add_adapter(name, str(weights)).result(LONG)
            assert info.name == name and engine.adapters()[name] == info
            loaded[name] = weights
        elif act < 0.2:
            name = str(random.choice(list(loaded)))
            engine.remove_adapter(name).result(LONG)
            del loaded[name]
        elif act < 0.3 and asked:
            asked[random.integers(len(asked))][0].cancel()
        else:
            name = random.choice([None, *loaded])
            request = some_request(random, beams=False, shared=shared)
            request = replace(request, adapter=name)
            answer = Answer()
            asked.append((engine.submit(request, answer), request, loaded.get(name, 0), answer))
    for _, request, weights, answer in asked:
        assert answer.wait().last.kind == "end", answer.last.error
        tokens, logprobs, reason = alone(request, weights)
        if answer.last.reason == "cancelled":
            assert answer.tokens == tokens[: len(answer.tokens)]
        else:
            assert answer.result == (tokens, reason, len(tokens) + (reason == "stop"))
            assert answer.logprobs == logprobs
        assert answer.threads == {"jlora-engine"}
    assert set(engine.adapters()) == set(loaded)
    engine.add_adapter("last", "7").result(LONG)  # after it nothing is left to be freed
    assert sorted(model.bank.weights.values()) == sorted([0, 7, *loaded.values()])
    assert len(model.decoders) == 1 and model.decoders[0].most_memory <= PER_TOKEN * 300
    stats = engine.stats()
    assert (stats.rows, stats.running, stats.waiting, stats.used_bytes, stats.failed) == (0,) * 5
    assert stats.stopped + stats.cut + stats.cancelled == len(asked)
    assert stats.cache_bytes <= stats.cache_budget


def test_requests_that_run_keep_the_adapter_that_they_began_with(start):
    gate = Gate()
    engine, model = start(gate)
    adding = engine.add_adapter("a", "5")
    adding.result(LONG)
    _, old = ask(engine, adapter="a")
    gate.reached()
    reload, removal = engine.add_adapter("a", "6"), engine.remove_adapter("b")
    _, still_old = ask(engine, adapter="a")  # handed in before the new one is there
    gate.open()  # the first pass; then orders are taken
    assert reload.result(LONG).path.name == "6"
    with pytest.raises(UserError, match="no adapter is called 'b'; there is a"):
        removal.result(LONG)
    _, new = ask(engine, adapter="a")
    gone = engine.remove_adapter("a")
    gate.open()
    assert gone.result(LONG).path.name == "6"
    with pytest.raises(UserError, match="no adapter is called 'a'; none is loaded"):
        ask(engine, adapter="a")
    assert set(model.bank.weights.values()) == {0, 5, 6}  # both still answer
    gate.open_for_good()
    for answer, weights in ((old, 5), (still_old, 5), (new, 6)):
        expected = alone(Request((1, 2), max_new_tokens=4), weights)[0]
        assert answer.wait().tokens == expected
    engine.add_adapter("c", "8").result(LONG)
    assert set(model.bank.weights.values()) == {0, 8}


def test_a_broken_adapter_is_refused_and_the_others_go_on(start):
    engine, _ = start()
    engine.add_adapter("a", "5").result(LONG)
    for name in ("a", "b"):
        with pytest.raises(UserError, match="broken: no adapter"):
            engine.add_adapter(name, "broken").result(LONG)
    assert list(engine.adapters()) == ["a"] and engine.adapters()["a"].path.name == "5"
    expected = alone(Request((1, 2), max_new_tokens=4), 5)[0]
    assert ask(engine, adapter="a")[1].wait().tokens == expected
    with pytest.raises(UserError, match="no adapter is called 'aa'; there is a"):
        ask(engine, adapter="aa")


def test_too_many_are_refused(start):
    gate = Gate()
    engine, _ = start(gate, max_rows=2, queue_size=1, token_bytes=PER_TOKEN * 100)
    asked = [ask(engine) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests are running or waiting already"):
        ask(engine)
    with pytest.raises(TooLarge):
        ask(engine, new=99)
    with pytest.raises(UserError, match="exceed the model's context"):
        ask(engine, prompt=[1] * CONTEXT)
    assert engine.room((1,) * 390) == 11
    asked[2][0].cancel()
    gate.open_for_good()
    assert asked[2][1].wait().last.reason == "cancelled"
    ask(engine)[1].wait()


def test_a_cancelled_request_s_rows_go_at_once(start):
    gate = Gate()
    engine, model = start(gate, cache_bytes=0)
    ticket, answer = ask(engine, new=300)
    for _ in range(3):
        gate.reached()
        gate.open()
    assert answer.begun.wait(LONG)
    gate.reached()
    ticket.cancel()
    ticket.cancel()
    gate.open()  # the pass that was under way
    gate.reached()
    gate.open()  # and the one that has no row any more
    assert answer.wait().last.reason == "cancelled"
    engine.add_adapter("a", "1").result(LONG)
    assert model.decoders[0].memory == 0
    ticket.cancel()  # nothing to end


def test_an_idle_engine_does_nothing(start, monkeypatch):
    works = []
    work = Engine._work
    monkeypatch.setattr(Engine, "_work", lambda self: works.append(1) or work(self))
    engine, model = start()
    answers = [ask(engine)[1].wait() for _ in range(5)]
    assert engine.drain(LONG)
    passes = sum(call[0] == "advance" for call in model.decoders[0].calls)
    assert passes <= len(works) <= passes + len(answers) + 1
    assert engine.stats().steps == passes and engine.stats().step_seconds > 0


def test_draining_finishes_what_is_there(start):
    gate = Gate()
    engine, _ = start(gate, max_rows=1)
    answers = [ask(engine)[1] for _ in range(3)]
    gate.reached()
    assert not engine.drain(0)
    for refused in (lambda: ask(engine), lambda: engine.add_adapter("a", "1")):
        with pytest.raises(Stopping, match="stopping and takes no more"):
            refused()
    gate.open_for_good()
    assert engine.drain(LONG)
    assert [answer.last.reason for answer in answers] == ["length"] * 3


def test_closing_tells_everyone(start):
    gate = Gate()
    engine, _ = start(gate, max_rows=1)
    answers = [ask(engine, new=300)[1] for _ in range(3)]
    gate.reached()
    futures = [engine.add_adapter("a", "5"), engine.add_adapter("b", "6")]
    futures[1].cancel()
    closing = threading.Thread(target=engine.close)
    closing.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine._closing, LONG)
    gate.open_for_good()
    closing.join(LONG)
    assert not closing.is_alive() and not engine._thread.is_alive()
    for answer in answers:
        with pytest.raises(Stopping, match="has stopped"):
            raise answer.wait().last.error
    with pytest.raises(Stopping):
        futures[0].result(LONG)
    with pytest.raises(CancelledError):
        futures[1].result(LONG)
    with pytest.raises(Stopping):
        ask(engine)
    engine.close()


def test_a_callback_may_close_the_engine(start):
    engine, _ = start()
    answer = Answer()

    def close(event):
        answer(event)
        engine.close()

    engine.submit(Request((1,), max_new_tokens=9), close)
    assert isinstance(answer.wait().last.error, Stopping)
    engine.close()


def test_a_fault_in_a_step_is_told_and_the_engine_goes_on(start):
    gate = Gate()
    engine, model = start(gate)
    answers = [ask(engine)[1] for _ in range(2)]
    gate.reached()
    model.decoders[0].fault = MemoryError("no memory")
    gate.open_for_good()
    for answer in answers:
        assert isinstance(answer.wait().last.error, MemoryError)
    assert ask(engine)[1].wait().tokens == alone(Request((1, 2), max_new_tokens=4))[0]
    assert len(model.decoders) == 2 and engine.stats().failed == 2


@pytest.mark.parametrize("fault", [MemoryError("no memory"), SystemExit("out")])
def test_a_fault_that_cannot_be_mended_ends_the_engine(fault, start):
    gate = Gate()
    engine, model = start(gate, max_rows=1)
    answers = [ask(engine)[1] for _ in range(3)]
    future = engine.add_adapter("a", "5")
    gate.reached()
    model.decoders[0].fault = model.fault = fault
    gate.open_for_good()
    errors = [answer.wait().last.error for answer in answers]
    assert all(isinstance(error, (MemoryError, Stopping)) for error in errors)
    assert isinstance(errors[2], Stopping)
    engine._thread.join(LONG)
    assert not engine._thread.is_alive()
    assert future.done()
    with pytest.raises(Stopping):
        ask(engine)
    assert engine.drain(LONG)


def test_a_model_that_cannot_be_opened(start):
    def fail(name, precision):
        assert (name, precision) == ("toy", "bf16")
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        Engine("toy", precision="bf16", open_model=fail)
