"""What is asked of a running batch, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from jlora.kernels.topk import LARGEST_K
from jlora.system.errors import UserError
from jlora.system.settings import check_setting

# A token and its log-probability; those of a prompt's token and of its likeliest alternatives.
Scored = tuple[int, float]
PromptScore = tuple[float, tuple[Scored, ...]]


class QueueFull(UserError):
    """There are too many requests already; try again later."""


class TooLarge(UserError):
    """The request never fits the memory or the rows that there are."""


class Stopping(UserError):
    """No more requests are taken."""


class Constraint(Protocol):
    """A grammar that says which tokens may come next; belongs to one request."""

    def mask(self) -> np.ndarray | None:
        """(ceil(V / 32),) int32, bit i of word w is token 32 w + i; None: any token."""

    def accept(self, token: int) -> None:
        """The token was chosen. Never called with an end token."""

    def may_end(self) -> bool:
        """Whether the text may end here."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to go on with it.

    Args:
        prompt: token ids.
        adapter: its name; None: the base model.
        eos_token_ids: tokens that end the text.
        max_new_tokens: the text has no more tokens, the end token included; 0: only the prompt is
            run, for ``prompt_logprobs``.
        temperature, top_p, top_k, min_p: as in `jlora.decoding.sampling.GenerateConfig`.
        repetition_penalty: as there, over prompt and text; with beams over the text alone, as in
            `jlora.decoding.beam.BeamConfig`.
        presence_penalty, frequency_penalty: OpenAI's: a token that the text has n > 0 times loses
            presence_penalty + n frequency_penalty of its logit.
        logit_bias: added to the logits of these tokens.
        seed: alone decides the draws, whatever else is in the batch.
        top_logprobs: so many likeliest tokens come with each token.
        prompt_logprobs: None: none; a number: of each token of the prompt, with so many likeliest
            alternatives. The whole prompt is run then, without the prefix cache.
        num_beams: above 1 beam search by the rules of `jlora.decoding.beam`.
        length_penalty: ranks its results.
        no_repeat_ngram_size: n-grams of this size are not generated twice; 0 allows all.
        constraint: what the text must be; None: anything.

    Raises:
        UserError: a setting is out of its range, or goes not with another.
    """

    prompt: tuple[int, ...]
    adapter: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    constraint: Constraint | None = None

    def __post_init__(self):
        check_setting(len(self.prompt) > 0, "prompt", "empty", "of one token or more")
        for name in ("max_new_tokens", "temperature", "top_k", "seed", "no_repeat_ngram_size"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        self._check("repetition_penalty", self.repetition_penalty > 0, "above 0")
        self._check("num_beams", 1 <= self.num_beams <= LARGEST_K, f"from 1 to {LARGEST_K}")
        for name in ("top_logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value <= LARGEST_K, f"from 0 to {LARGEST_K}")
        for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty",
                     "length_penalty"):  # fmt: skip
            self._check(name, abs(getattr(self, name)) <= 1e6, "a number up to a million")
        for token, bias in self.logit_bias.items():
            check_setting(token >= 0, "logit_bias", f"for token {token}", "for token ids, >= 0")
            held = abs(bias) <= 1e6
            check_setting(held, f"logit_bias of {token}", bias, "a number up to a million")
        if self.num_beams > 1:
            new = self.max_new_tokens
            check_setting(new > 0, "max_new_tokens", new, "above 0 with num_beams above 1")
            for name, without in (("temperature", 0), ("top_logprobs", 0), ("constraint", None)):
                held = getattr(self, name) == without
                check_setting(held, name, getattr(self, name), f"{without} with num_beams above 1")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        check_setting(holds, name, getattr(self, name), rule)


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took.

    Attributes:
        prompt: of the prompt.
        cached: those of them whose keys and values were there already.
        completion: generated, the end token included; of beams those of the best one.
    """

    prompt: int
    cached: int
    completion: int


@dataclass
class Event:
    """Something that happened to a request.

    In this order: "prompt" where it was asked for, "token" for each token but the end token, as
    soon as it is chosen (all at once with beams), and at last one "end" or "error".

    Attributes:
        token, logprob, top: of "token". The log-probability is the model's own with penalties,
            biases and constraint counted in, temperature not; None with beams. ``top`` are the
            likeliest tokens, best first.
        prompt_logprobs: of "prompt": an entry for each token, None for the first, for the others
            the log-probability and the likeliest tokens in their place.
        reason: of "end": "stop" after an end token or where a constraint's text is complete,
            "length", or "cancelled".
        usage: of "end".
        error: of "error": a `UserError`, or a fault of the program.
    """

    kind: Literal["token", "prompt", "end", "error"]
    token: int = -1
    logprob: float | None = None
    top: tuple[Scored, ...] = ()
    prompt_logprobs: list[PromptScore | None] | None = None
    reason: Literal["stop", "length", "cancelled"] | None = None
    usage: Usage | None = None
    error: Exception | None = None
