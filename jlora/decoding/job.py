"""`Job`: a request in a running batch, and whose prompt is run next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlora.decoding.choice import Beams, Single
from jlora.decoding.requests import Event, PromptScore, Request


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        adapter: slot of its adapter.
        bytes: what its keys and values take at most, from when it is taken in.
        tokens: (n,) int32, of the prompt.
        prompt: the decoder's, while it is run.
        rows: of the decoder, from when the prompt is done.
        read: generated tokens that the rows have read.
        cached: tokens of the prompt that were found in the cache.
        scores: of the tokens of the prompt, where they are asked for.
        waits_for: a job whose prompt begins alike, and which is to be run first.
        left: whether it has ended, so that its rows are to go.
        sound: False after an error: what it has run is not to be kept.
    """

    request: Request
    adapter: int
    on_event: Callable[[Event], None]
    bytes: int
    tokens: np.ndarray
    prompt: Any = None
    chooser: Single | Beams | None = None
    rows: int = 0
    read: int = 0
    cached: int = 0
    scores: list[PromptScore | None] = field(default_factory=lambda: [None])
    waits_for: Job | None = None
    left: bool = False
    sound: bool = True

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of its prompt are asked for."""
        return self.request.prompt_logprobs is not None

    @property
    def rest(self) -> int:
        """Tokens of the prompt that are still to be run."""
        return len(self.tokens) - self.prompt.done


def prompt_pieces(jobs: Sequence[Job], budget: int) -> dict[Job, int]:
    """How many tokens of which prompts to run now, ``budget`` in all.

    Short rests first, so that a short prompt waits for no long one; but half of the tokens are for
    the one that came first, so that a long one does not wait for all the short ones.

    Args:
        jobs: with a rest to run, in the order of their arrival.
    """
    if not jobs:
        return {}
    first = jobs[0]
    pieces = {first: min(first.rest, -(-budget // 2))}
    budget -= pieces[first]
    for job in sorted(jobs, key=lambda job: job.rest):
        count = min(job.rest - pieces.get(job, 0), budget)
        if count:
            pieces[job] = pieces.get(job, 0) + count
            budget -= count
    return pieces
