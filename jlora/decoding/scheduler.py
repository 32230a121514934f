"""A running batch: requests of any adapters enter and leave it from step to step.

A step takes in what fits, chooses a token for every row, and runs the rows once more, in the same
pass with a piece of the prompts that are to enter. What a request gets does not depend on the
others: rows are computed apart, its draws are its own, and a fault of one is told to it alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from jlora.decoding.choice import RowEdit, chooser, stacked
from jlora.decoding.decoder import angle_limit, check_finite, check_prompts
from jlora.decoding.job import Job, prompt_pieces
from jlora.decoding.prefix_cache import PrefixCache, common
from jlora.decoding.requests import Event, Request, TooLarge, Usage
from jlora.decoding.rows import FUSED_K
from jlora.kernels.topk import Draw
from jlora.system.errors import UserError

log = logging.getLogger("jlora.decoding")

ALONE = 4  # times the piece of prompts that is run where no row waits for its end
SHARED = 16  # tokens; a shorter common beginning is not worth looking after


class Scheduler:
    """Runs requests together; belongs to one thread.

    Args:
        new_decoder: makes a `jlora.decoding.rows.RowDecoder`; called again after a fault in one.
        config: of the model.
        max_rows: rows at once; a request with beams takes as many as it has beams.
        token_bytes: what keys and values of the requests that run may take. A request waits until
            its prompt and the longest text that it may get fit.
        cache_bytes: what the prefix cache may take besides.
        chunk: tokens of prompts that are run between two steps of the rows.

    Attributes:
        waiting, entering, running: the jobs that are not taken in, whose prompts are run, and that
            have rows; each in the order of their arrival.
        used: bytes that the taken in ones may take.
        counts: what was done so far, for statistics.
    """

    def __init__(
        self,
        new_decoder: Callable[[], Any],
        config: Any,
        max_rows: int,
        token_bytes: int,
        cache_bytes: int,
        chunk: int = 128,
    ):
        self._new_decoder, self._config = new_decoder, config
        self._decoder = new_decoder()
        self.max_rows, self.token_bytes, self.chunk = max_rows, token_bytes, chunk
        self.cache = PrefixCache(cache_bytes, angle_limit(config))
        self.waiting: list[Job] = []
        self.entering: list[Job] = []
        self.running: list[Job] = []
        self.used = 0
        self.counts: Counter[str] = Counter()

    def check(self, request: Request) -> int:
        """Whether a request can be run at all; may be called from other threads.

        Returns:
            The bytes that its keys and values take at most.

        Raises:
            UserError: its prompt does not fit the model, or a token is not in the vocabulary.
            TooLarge: it needs more memory or rows than there are.
        """
        new, vocabulary = request.max_new_tokens, self._config.vocab_size
        check_prompts(_Configured(self._config), [request.prompt], max(new, 1))
        for name in ("eos_token_ids", "logit_bias"):
            for token in getattr(request, name):
                if not 0 <= token < vocabulary:
                    raise UserError(
                        f"{name}: token {token} is not in the model's vocabulary of {vocabulary}"
                    )
        size = self._decoder.bytes_of(len(request.prompt))
        size += request.num_beams * self._decoder.bytes_of(new)
        if size > self.token_bytes:
            raise TooLarge(
                f"{len(request.prompt)} tokens of prompt and {request.num_beams} x {new} new ones "
                f"take {size:,} bytes, and there are {self.token_bytes:,} for all requests; "
                "shorten the prompt or ask for fewer tokens"
            )
        if request.num_beams > self.max_rows:
            raise TooLarge(f"{request.num_beams} beams, and the server runs {self.max_rows} rows")
        return size

    def add(self, request: Request, adapter: int, on_event: Callable[[Event], None]) -> Job:
        """Have a request wait for its turn.

        Args:
            adapter: slot of the adapter, -1 for the base model.
            on_event: gets what happens to it. If it raises, the request is cancelled.

        Raises:
            UserError: as `check`.
        """
        size = self.check(request)
        job = Job(request, adapter, on_event, size, np.array(request.prompt, np.int32))
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a request; its rows go with the next step."""
        self._end(job, "cancelled")

    def fail(self, error: Exception) -> None:
        """Tell all requests that are taken in that they ended by a fault, and begin anew."""
        # Of those that wait one, so that a fault in taking it in does not come again and again.
        for job in [*self.entering, *self.running] or self.waiting[:1]:
            self._error(job, error)
            job.prompt = None
        self.entering, self.running, self.used = [], [], 0
        self._decoder = self._new_decoder()

    def holds(self, adapter: int) -> bool:
        """Whether a request of an adapter is here."""
        jobs = [*self.waiting, *self.entering, *self.running]
        return any(job.adapter == adapter for job in jobs)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.entering or self.running)

    @property
    def rows(self) -> int:
        return sum(job.rows for job in self.running)

    def step(self) -> None:
        """One step; exceptions are faults of the decoder, see `fail`."""
        self._take_in()
        self._choose()
        self._run()
        self._enter()

    # --- taking requests in ---

    def _take_in(self) -> None:
        """In the order of their arrival: none that comes later takes the room of a large one."""
        self.waiting = [job for job in self.waiting if not job.left]
        rows = sum(job.request.num_beams for job in [*self.entering, *self.running])
        for job in list(self.waiting):
            own = job.request.num_beams
            if rows + own > self.max_rows or self.used + job.bytes > self.token_bytes:
                return
            job.waits_for = job.waits_for or self._sparing(job)
            if job.waits_for in self.entering:
                continue
            rows, self.used = rows + own, self.used + job.bytes
            self.waiting.remove(job)
            self.entering.append(job)
            self._begin(job)

    def _sparing(self, job: Job) -> Job | None:
        """One whose prompt is being run and will soon spare ``job`` a good part of its own."""
        if job.is_scored:
            return None
        found = self.cache.find(job.adapter, job.tokens)[1]
        for other in self.entering:
            if other.adapter == job.adapter and other.request.max_new_tokens and not other.left:
                shared = common(other.tokens, job.tokens) - found
                # Waiting must not take longer than running it.
                size = self._decoder.bytes_of(len(other.tokens))
                if shared >= max(SHARED, other.rest) and size <= self.cache.budget:
                    return other
        return None

    def _begin(self, job: Job) -> None:
        kept, length = None, 0
        if not job.is_scored:
            self._keep_what_runs(job)
            kept, length = self.cache.find(job.adapter, job.tokens)
            self.counts["lookups"] += 1
        job.prompt = self._decoder.begin(job.request.prompt, job.adapter, kept, length)
        job.cached, job.waits_for = job.prompt.done, None
        self.counts["hits"] += job.cached > 0

    def _keep_what_runs(self, job: Job) -> None:
        """Have the cache copy a running row that begins as ``job`` does, if it lacks it."""
        if not self.cache.budget:
            return
        least = self.cache.find(job.adapter, job.tokens)[1] + SHARED
        row, best = 0, None
        for other in self.running:
            if other.adapter == job.adapter:
                shared = min(common(other.tokens, job.tokens), len(job.tokens) - 1)
                if shared >= least and other.sound:
                    best, least = (row, other), shared + 1
            row += other.rows
        if best is not None:
            self._keep(*best)

    def _keep(self, row: int, job: Job) -> None:
        """Copy what a row has run into the cache."""
        read = np.array(job.chooser.known[: job.read], np.int32)
        tokens = np.concatenate([job.tokens, read])
        size = self._decoder.bytes_of(len(job.tokens) + job.read)
        if self.cache.make_room(job.adapter, tokens, size):
            self.cache.add(self._decoder.keep(row))

    # --- prompts ---

    def _enter(self) -> None:
        """Rows for the prompts that are done."""
        done = [job for job in self.entering if not job.left and not job.rest]
        for job in done:
            self._apart(job, self._prompt_done)
        self._drop_left()
        done = [job for job in done if not job.left]
        if done:
            self._decoder.enter([job.prompt for job in done])
        for job in done:
            self.entering.remove(job)
            self.running.append(job)
            job.prompt, job.rows = None, 1
            job.chooser = chooser(job.request, self._config.vocab_size)

    def _drop_left(self) -> None:
        """Give back the memory of prompts that will not be run."""
        for job in self.entering:
            if job.left:
                self.used -= job.bytes
                job.prompt = None
        self.entering = [job for job in self.entering if not job.left]

    def _score(self, job: Job, states: np.ndarray) -> None:
        """Note the log-probabilities of the tokens that follow those that were just run."""
        end = job.prompt.done
        begin = end - len(states)
        targets = job.tokens[begin + 1 : end + 1]
        states = states[: len(targets)]
        if not len(targets):
            return
        logprobs = self._decoder.logprobs_of(states, targets)
        check_finite(logprobs)
        tops: Sequence = [()] * len(targets)
        if job.request.prompt_logprobs:
            values, ids = self._decoder.best_of(states, job.request.prompt_logprobs)
            tops = [tuple(zip(*pair)) for pair in zip(ids.tolist(), values.tolist())]
        job.scores += zip(logprobs.tolist(), tops)

    def _prompt_done(self, job: Job) -> None:
        if job.is_scored:
            self._tell(job, Event("prompt", prompt_logprobs=job.scores))
        if job.request.max_new_tokens == 0:
            self._end(job, "length")

    # --- rows ---

    def _choose(self) -> None:
        """Choose the next token of each row."""
        starts = dict(zip(self.running, _starts(self.running)))
        edits: dict[Job, list[RowEdit | None]] = {}
        for job in self.running:
            if not job.left:
                self._apart(job, lambda job: edits.update({job: job.chooser.edits()}))
        live = [job for job in self.running if not job.left]
        # How a row's words are found depends on its own need alone, so do the last bits.
        for fused in (True, False):
            jobs = [job for job in live if (job.chooser.need <= FUSED_K) == fused]
            if not jobs:
                continue
            hidden = self._decoder.hidden
            if len(jobs) < len(self.running):
                hidden = hidden[[starts[job] + row for job in jobs for row in range(job.rows)]]
            changes = stacked(sum((edits[job] for job in jobs), []), self._config.vocab_size)
            draws: list[Draw] = sum(([job.chooser.draw()] * job.rows for job in jobs), [])
            most = max(job.chooser.need for job in jobs)
            values, ids = self._decoder.best_of(hidden, most, changes, draws)
            for job, start in zip(jobs, _starts(jobs)):
                span = slice(start, start + job.rows)
                self._apart(job, self._decide, values[span], ids[span])

    def _decide(self, job: Job, values: np.ndarray, ids: np.ndarray) -> None:
        check_finite(values)
        before = job.chooser.count
        events = job.chooser.choose(values, ids)
        self.counts["generated tokens"] += job.chooser.count - before
        for event in events:
            self._tell(job, event)
        if job.chooser.reason is not None:
            self._end(job, job.chooser.reason)

    def _run(self) -> None:
        """Run the rows that go on, those of an adapter together, and pieces of prompts."""
        self._drop_left()
        pieces = prompt_pieces(self.entering, self.chunk * (1 if self.running else ALONE))
        if not self.running and not pieces:
            return
        rows, tokens, going = [], [], []
        by_adapter = sorted(zip(self.running, _starts(self.running)), key=lambda x: x[0].adapter)
        for job, start in by_adapter:
            if job.left:
                if job.sound:
                    self._keep(start, job)
                self.used -= job.bytes
            else:
                rows += [start + row for row in job.chooser.rows]
                tokens += job.chooser.tokens
                going.append(job)
        self.running = going
        prompts, counts = [job.prompt for job in pieces], list(pieces.values())
        scored = any(job.is_scored for job in pieces)
        states = self._decoder.advance(rows, tokens, prompts, counts, scored)
        self.counts["steps"] += 1
        self.counts["prompt tokens"] += sum(counts)
        for job in going:
            job.rows, job.read = len(job.chooser.rows), job.read + 1
        for job, own in zip(pieces, states if scored else ()):
            if job.is_scored:
                self._apart(job, self._score, own)

    # --- what is told ---

    def _tell(self, job: Job, event: Event) -> None:
        if job.left:
            return
        try:
            job.on_event(event)
        except Exception:
            log.exception("a request's on_event failed; the request is cancelled")
            self._end(job, "cancelled")

    def _end(self, job: Job, reason: str) -> None:
        count = job.chooser.count if job.chooser else 0
        usage = Usage(len(job.tokens), job.cached, count)
        self._leave(job, Event("end", reason=reason, usage=usage), reason)

    def _error(self, job: Job, error: Exception) -> None:
        if not isinstance(error, UserError):
            log.error("a request failed", exc_info=error)
        job.sound = job.sound and job.left
        self._leave(job, Event("error", error=error), "error")

    def _leave(self, job: Job, event: Event, how: str) -> None:
        if job.left:
            return
        job.left = True
        self.counts[how] += 1
        self.counts["cached tokens"] += job.cached
        try:
            job.on_event(event)
        except Exception:
            log.exception("a request's on_event failed at its end")
        job.on_event = _ignore  # whoever made it may hold the job

    def _apart(self, job: Job, call: Callable, *arguments) -> Any:
        """``call(job, ...)``; an exception in it is told to this request and to no other."""
        try:
            return call(job, *arguments)
        except Exception as error:
            self._error(job, error)
            return None


class _Configured:
    """What `check_prompts` reads of a model."""

    def __init__(self, config: Any):
        self.config = config


def _ignore(event: Event) -> None:
    """What a job that has ended tells nobody."""


def _starts(jobs: Sequence[Job]) -> list[int]:
    """The first row of each."""
    return list(accumulate((job.rows for job in jobs), initial=0))[:-1]
