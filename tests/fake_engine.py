"""An engine without a model: it says what a script has it say, on a thread of its own."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiny

from jlora.data.tokenizer import Tokenizer
from jlora.decoding.requests import Event, QueueFull, Request, Stopping, Usage
from jlora.system.errors import UserError


def logprob_of(token: int) -> float:
    """What the fake gives every token, wherever it stands."""
    return -0.25 - (token % 8) / 8


class Ticket:
    def __init__(self, request: Request, on_event: Callable[[Event], None], tokens: Sequence[int]):
        self.request, self.on_event, self.tokens = request, on_event, list(tokens)
        self.done: list[int] = []
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Says `script(request)`, a text or token ids, and then the end token.

    Attributes:
        script: set it; by default every answer is "fine".
        requests: all that were handed in.
        gate: while it is cleared, answers stop after their first token.
        ended: how many requests have come to their end.
    """

    def __init__(self, folder: Path, context: int = 128, most: int = 8):
        self.model_name = str(folder)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.model_config = SimpleNamespace(
            max_positions=context, vocab_size=self.tokenizer.vocab_size
        )
        self.script: Callable[[Request], str | Sequence[int]] = lambda request: "fine"
        self.requests: list[Request] = []
        self.gate = threading.Event()
        self.gate.set()
        self.ended = 0
        self.broken: Callable[[Path], None] = lambda path: None
        self._most, self._adapters = most, {}
        self._tickets: list[Ticket] = []
        self._changed = threading.Condition()
        self._closing = self.draining = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.gate.set()
        self._thread.join()

    def room(self, prompt: Sequence[int]) -> int:
        return self.model_config.max_positions - len(prompt) + 1

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        said = self.script(request)
        tokens = self.tokenizer.encode(said) if isinstance(said, str) else said
        with self._changed:
            if self.draining:
                raise Stopping("draining")
            if request.adapter is not None and request.adapter not in self._adapters:
                raise UserError(f"no adapter {request.adapter}")
            if len(self._tickets) >= self._most:
                raise QueueFull(f"{self._most} requests are here already; try again later")
            self.requests.append(request)
            ticket = Ticket(request, on_event, [*tokens, None])
            self._tickets.append(ticket)
            self._changed.notify_all()
        return ticket

    @property
    def running(self) -> int:
        with self._changed:
            return len(self._tickets)

    def wait_until(self, count: int) -> None:
        """Until so many requests are here, which no sleep says."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._tickets) == count, timeout=20)

    def wait_until_idle(self) -> None:
        """Until every request has come to its end."""
        self.wait_until(0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tickets or self._closing)
                if self._closing and not self._tickets:
                    return
                tickets = list(self._tickets)
            for ticket in tickets:
                if self._closing:
                    ticket.cancel()
                try:
                    ended = self._step(ticket)
                except Exception as error:  # of a constraint
                    ticket.on_event(Event("error", error=error))
                    ended = True
                if ended:
                    with self._changed:
                        self._tickets.remove(ticket)
                        self.ended += 1
                        self._changed.notify_all()

    def _step(self, ticket: Ticket) -> bool:
        """One token of an answer; whether that was the last."""
        request, tell = ticket.request, ticket.on_event
        if ticket.cancelled.is_set():
            return self._end(ticket, "cancelled")
        if request.prompt_logprobs is not None and not ticket.done:
            tell(Event("prompt", prompt_logprobs=self._of_prompt(request)))
        if request.max_new_tokens == 0:
            return self._end(ticket, "length")
        place = len(ticket.done)
        token = ticket.tokens[place] if place < len(ticket.tokens) else None
        if isinstance(token, Exception):
            tell(Event("error", error=token))
            return True
        if request.constraint is not None:
            token = self._allowed(request, token)
            if token is not None:
                request.constraint.accept(token)
        if token is None:
            return self._end(ticket, "stop")
        ticket.done.append(token)
        tell(Event("token", token, logprob_of(token), self._top(token, request.top_logprobs)))
        if len(ticket.done) == request.max_new_tokens:
            return self._end(ticket, "length")
        while not self.gate.wait(0.005):  # no test depends on how long
            if ticket.cancelled.is_set():
                break
        return False

    def _end(self, ticket: Ticket, reason: str) -> bool:
        count = len(ticket.done) + (reason == "stop")
        usage = Usage(len(ticket.request.prompt), 0, count)
        ticket.on_event(Event("end", reason=reason, usage=usage))
        return True

    def _allowed(self, request: Request, token: int | None) -> int | None:
        """What the script says if the constraint has it, else what it has, the end first."""
        bits = np.unpackbits(request.constraint.mask().view(np.uint8), bitorder="little")
        if request.constraint.may_end() and (token is None or not bits.any()):
            return None
        if token is not None and bits[token]:
            return token
        closing = [token for token in self.tokenizer.encode('} " 1') if bits[token]]
        return closing[0] if closing else int(np.flatnonzero(bits)[0])

    def _top(self, token: int, count: int) -> tuple:
        found = [token, *range(8, 8 + count)] if count else []
        return tuple((each, logprob_of(each)) for each in sorted(set(found), key=lambda t: t % 8))[
            :count
        ]

    def _of_prompt(self, request: Request) -> list:
        scores = [
            (logprob_of(token), self._top(token, request.prompt_logprobs))
            for token in request.prompt
        ]
        return [None, *scores[1:]]

    def add_adapter(self, name: str, path: Path) -> Future:
        future: Future = Future()
        try:
            self.broken(path)
            self._adapters[name] = path
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        return future

    def remove_adapter(self, name: str) -> Future:
        future: Future = Future()
        self._adapters.pop(name)
        future.set_result(None)
        return future

    def stats(self) -> Stats:
        return Stats(rows=self.running)


@dataclass(frozen=True)
class Stats:
    rows: int = 0
    running: int = 0
    entering: int = 0
    waiting: int = 0
    used_bytes: int = 0
    token_bytes: int = 0
    cache_bytes: int = 0
    cache_budget: int = 0
    cache_entries: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    lookups: int = 0
    hits: int = 0
    cancelled: int = 0
    failed: int = 0


def write_served(folder: Path) -> Path:
    """A chat model ``base``, and ``adapters`` with a talker, a run of a task and a broken one."""
    tiny.write_chat_model(folder / "base")
    adapters = folder / "adapters"
    run = {
        "model": str(folder / "base"),
        "data": {"task": "e2e", "separator_id": 0, "end_id": 0},
        "lora": {}, "train": {}, "decode": {},
    }  # fmt: skip
    for place in ("talker", "task/best"):
        (adapters / place).mkdir(parents=True)
        (adapters / place / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (adapters / "task" / "config.yaml").write_text(json.dumps(run))
    (adapters / "broken").mkdir()
    return folder


@contextlib.contextmanager
def serving(folder: Path, context: int = 128, **settings) -> Iterator[tuple[FakeEngine, Any]]:
    """A fake engine and the application that asks it."""
    from jlora.serving.adapters import load_first
    from jlora.serving.app import make_app
    from jlora.serving.service import Service
    from jlora.serving.settings import ServeConfig

    base = folder / "base"
    with FakeEngine(base, context) as engine:
        service = Service(engine, ServeConfig(str(base), **settings))
        load_first(service)
        yield engine, make_app(service)
