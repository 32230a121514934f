"""`Engine`: the thread that runs the batch, and how others hand it requests."""

from __future__ import annotations

import difflib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jlora.decoding.decoder import room
from jlora.decoding.requests import Event, QueueFull, Request, Stopping
from jlora.decoding.scheduler import Job, Scheduler
from jlora.serving.model import ServedModel
from jlora.system.errors import UserError

log = logging.getLogger("jlora.serving")

BASE = -1  # the slot of the model without adapter


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that can be asked.

    Attributes:
        path: as it was given.
        loaded: when, in seconds since 1970.
    """

    name: str
    path: Path
    loaded: float


@dataclass(frozen=True)
class Stats:
    """What the engine does and has done.

    Attributes:
        running, entering, waiting: requests that have rows, whose prompts are run, and that wait.
        rows: of the batch.
        used_bytes, token_bytes: that the keys and values of those requests may take, and may take
            at most.
        cache_bytes, cache_budget, cache_entries: of the prefix cache.
        lookups, hits: prompts that it was asked about, and of which it had a beginning.
        prompt_tokens: run; cached_tokens: found in the cache instead, of requests that ended.
        generated_tokens: end tokens included.
        steps, step_seconds: of the batch, and what they took.
        stopped, cut, cancelled, failed: requests that ended so (cut: by their length).
    """

    running: int
    entering: int
    waiting: int
    rows: int
    used_bytes: int
    token_bytes: int
    cache_bytes: int
    cache_budget: int
    cache_entries: int
    lookups: int
    hits: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    step_seconds: float
    stopped: int
    cut: int
    cancelled: int
    failed: int


class Ticket:
    """A request that was handed in."""

    def __init__(self, engine: Engine, request: Request, slot: int, on_event: Callable):
        self._engine, self.request, self.slot, self.on_event = engine, request, slot, on_event
        self.job: Job | None = None

    def cancel(self) -> None:
        """End it, from any thread; its "end" comes soon, unless it has ended already."""
        self._engine._cancel(self)


class Engine:
    """A model that answers requests, of its base and of adapters, all in one batch.

    One thread does all that has to do with Jittor and the decoder; the methods may be called from
    any other. Close it in the end, best by ``with``.

    Args:
        model_name: as for `jlora.models.hub.load`.
        precision: as for `jlora.engine.prepare`.
        cache_bytes: what the prefix cache may take.
        token_bytes: what keys and values of the requests that run may take.
        max_rows: rows of the batch.
        queue_size: requests that may wait besides ``max_rows`` that run.
        chunk: tokens of prompts that are run between two steps.
        open_model: makes what is served, on the engine's thread; for tests.

    Attributes:
        model_name, model_config, tokenizer: of the base model.

    Raises:
        UserError: the model cannot be loaded, or the native decoder cannot run it.
    """

    def __init__(
        self,
        model_name: str,
        *,
        precision: str = "auto",
        cache_bytes: int = 1 << 30,
        token_bytes: int = 2 << 30,
        max_rows: int = 64,
        queue_size: int = 256,
        chunk: int = 128,
        open_model: Callable[[str, str], Any] = ServedModel,
    ):
        self.model_name, self._most = model_name, max_rows + queue_size
        self._changed = threading.Condition()  # guards what follows
        self._orders: deque[Callable[[], None]] = deque()
        self._tickets: set[Ticket] = set()
        self._futures: set[Future] = set()
        self._adapters: dict[str, tuple[AdapterInfo, int]] = {}
        self._draining = self._closing = False
        self._step_seconds = 0.0
        self._retired: list[int] = []  # slots to be freed when nothing holds them; engine's thread

        def open_all() -> None:
            self._model = open_model(model_name, precision)
            self._scheduler = Scheduler(
                self._model.new_decoder,
                self._model.config,
                max_rows,
                token_bytes,
                cache_bytes,
                chunk,
            )

        opened: Future = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_all, opened), name="jlora-engine", daemon=True
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self.close()
            raise
        self.model_config, self.tokenizer = self._model.config, self._model.tokenizer

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- requests ---

    def room(self, prompt: tuple[int, ...]) -> int:
        """How many tokens can follow a prompt; below 1 it does not fit the model's context."""
        return room(self._model, prompt)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        """Hand in a request.

        Args:
            on_event: called with what happens to it, on the engine's thread, which it should not
                hold up. If it raises, the request is cancelled. Its last event is always one "end"
                or "error".

        Raises:
            QueueFull: there are too many.
            TooLarge: it never fits.
            Stopping: the engine is draining or closed.
            UserError: there is no such adapter, or the prompt does not fit the model.
        """
        self._scheduler.check(request)
        with self._changed:
            self._check_open()
            slot = BASE if request.adapter is None else self._find(request.adapter)[1]
            if len(self._tickets) >= self._most:
                raise QueueFull(
                    f"{len(self._tickets)} requests are running or waiting already; try again later"
                )
            ticket = Ticket(self, request, slot, on_event)
            self._tickets.add(ticket)
            self._order(partial(self._begin, ticket))
        return ticket

    def _check_open(self) -> None:
        if self._draining:
            raise Stopping("the server is stopping and takes no more requests")

    def _find(self, name: str) -> tuple[AdapterInfo, int]:
        if name not in self._adapters:
            near = difflib.get_close_matches(name, self._adapters, 1) or sorted(self._adapters)
            known = f"there is {', '.join(near)}" if near else "none is loaded"
            raise UserError(f"no adapter is called {name!r}; {known}")
        return self._adapters[name]

    def _order(self, order: Callable[[], None]) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify_all()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._tickets:
                self._order(partial(self._end, ticket))

    def _begin(self, ticket: Ticket) -> None:
        tell = partial(self._tell, ticket)
        try:
            ticket.job = self._scheduler.add(ticket.request, ticket.slot, tell)
        except Exception as error:
            tell(Event("error", error=error))

    def _end(self, ticket: Ticket) -> None:
        if ticket.job is not None:
            self._scheduler.cancel(ticket.job)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.on_event(event)
        finally:
            if event.kind in ("end", "error"):
                with self._changed:
                    self._tickets.discard(ticket)
                    self._changed.notify_all()

    # --- adapters ---

    def adapters(self) -> dict[str, AdapterInfo]:
        """Those that can be asked now, by name."""
        with self._changed:
            return {name: info for name, (info, _) in self._adapters.items()}

    def add_adapter(self, name: str, path: str | Path) -> Future:
        """Load an adapter; one of that name is replaced when the new one is ready.

        Requests that were handed in before get the old one to their end.

        Returns:
            A future of its `AdapterInfo`; UserError where it cannot be loaded, and nothing is
            changed then.

        Raises:
            Stopping: the engine is draining or closed.
        """
        return self._promise(partial(self._load, name, Path(path)))

    def remove_adapter(self, name: str) -> Future:
        """Take an adapter away; requests that were handed in before get it to their end.

        Returns:
            A future of the `AdapterInfo` that it had; UserError where there is none.

        Raises:
            Stopping: the engine is draining or closed.
        """
        return self._promise(partial(self._unload, name))

    def _promise(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()

        def order() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
            with self._changed:
                self._futures.discard(future)

        with self._changed:
            self._check_open()
            self._futures.add(future)
            self._order(order)
        return future

    def _load(self, name: str, path: Path) -> AdapterInfo:
        slot = self._model.add(path)
        info = AdapterInfo(name, path, time.time())
        with self._changed:
            _, old = self._adapters.get(name, (None, None))
            self._adapters[name] = info, slot
        if old is not None:
            self._retired.append(old)
        return info

    def _unload(self, name: str) -> AdapterInfo:
        with self._changed:
            info, slot = self._find(name)
            del self._adapters[name]
        self._retired.append(slot)
        return info

    def _free_slots(self) -> None:
        with self._changed:
            asked = {ticket.slot for ticket in self._tickets}
        for slot in list(self._retired):
            if slot not in asked and not self._scheduler.holds(slot):
                self._retired.remove(slot)
                self._scheduler.cache.forget(slot)
                try:
                    self._model.remove(slot)
                except Exception:
                    log.exception("an adapter that nothing uses could not be freed")

    # --- the thread ---

    def _run(self, open_all: Callable[[], None], opened: Future) -> None:
        try:
            open_all()
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            while self._work():
                pass
        except BaseException:
            log.exception("the engine's thread ended by a fault")
        finally:
            self._finish()

    def _work(self) -> bool:
        """Do what is to be done, or wait for it; False: the engine is closed."""
        with self._changed:
            while not self._orders and self._scheduler.idle and not self._closing:
                self._changed.wait()
            if self._closing:
                return False
            orders, self._orders = self._orders, deque()
        for order in orders:
            try:
                order()
            except Exception:
                log.exception("an order to the engine failed")
        try:
            if not self._scheduler.idle:
                begin = time.perf_counter()
                self._scheduler.step()
                self._step_seconds += time.perf_counter() - begin
        except Exception as error:
            log.exception("a step of the batch failed")
            self._scheduler.fail(error)
        self._free_slots()
        return True

    def _finish(self) -> None:
        """Tell all that still wait for something that nothing comes."""
        with self._changed:
            self._draining = self._closing = True
            tickets, futures = list(self._tickets), list(self._futures)
        error = Stopping("the server has stopped")
        for ticket in tickets:
            try:
                self._tell(ticket, Event("error", error=error))
            except Exception:
                log.exception("a request's on_event failed at its end")
        for future in futures:
            if future.running() or (not future.done() and future.set_running_or_notify_cancel()):
                future.set_exception(error)

    def stats(self) -> Stats:
        """As it is now; numbers may be of two steps that follow each other."""
        scheduler, counts = self._scheduler, dict(self._scheduler.counts)
        running, entering = len(scheduler.running), len(scheduler.entering)
        with self._changed:
            waiting = max(len(self._tickets) - running - entering, 0)
        return Stats(
            running=running,
            entering=entering,
            waiting=waiting,
            rows=scheduler.rows,
            used_bytes=scheduler.used,
            token_bytes=scheduler.token_bytes,
            cache_bytes=scheduler.cache.bytes,
            cache_budget=scheduler.cache.budget,
            cache_entries=len(scheduler.cache),
            lookups=counts.get("lookups", 0),
            hits=counts.get("hits", 0),
            prompt_tokens=counts.get("prompt tokens", 0),
            cached_tokens=counts.get("cached tokens", 0),
            generated_tokens=counts.get("generated tokens", 0),
            steps=counts.get("steps", 0),
            step_seconds=self._step_seconds,
            stopped=counts.get("stop", 0),
            cut=counts.get("length", 0),
            cancelled=counts.get("cancelled", 0),
            failed=counts.get("error", 0),
        )

    # --- the end ---

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are there.

        Returns:
            Whether all have ended within ``timeout`` seconds.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._tickets, timeout)

    def close(self) -> None:
        """End the thread; requests that have not ended get an "error"."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
