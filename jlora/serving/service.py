"""What all routes have at hand: the engine, the models that are served, settings, metrics."""

from __future__ import annotations

import difflib
import json
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jlora.data.readers import shorten
from jlora.decoding.requests import Request
from jlora.serving.answers import Answers, Choice
from jlora.serving.errors import ApiError, draining
from jlora.serving.fields import SEEDS, Fields
from jlora.serving.grammar import Grammar, Grammars
from jlora.serving.logprobs import Scores
from jlora.serving.metrics import Metrics
from jlora.serving.settings import ServeConfig
from jlora.serving.voices import Prompt, Voice, find_voice
from jlora.system.console import say

#: mlx_lm.server's name of the model that it was started with.
DEFAULT_NAMES = (None, "default_model")


class Service:
    """One server's state; belongs to the thread of the server's loop.

    Attributes:
        base: the base model.
        voices: the models that are served, by name, the base first.
        refused: why adapters that were named at the start are not served, by name.
        draining: whether no more requests are taken.
        running: requests that are being answered.
    """

    def __init__(self, engine: Any, settings: ServeConfig):
        self.engine, self.settings = engine, settings
        self.tokenizer = engine.tokenizer
        self.vocabulary = engine.model_config.vocab_size
        self.grammars = Grammars(self.tokenizer, self.vocabulary)
        self.scores = Scores(self.grammars)
        self.metrics = Metrics(engine)
        self.base = self.voice_of(settings.name)
        self.voices: dict[str, Voice] = {self.base.name: self.base}
        self.refused: dict[str, str] = {}
        self.draining = False
        self.running: set[Answers] = set()

    def voice_of(self, name: str, path: Any = None, root: str | None = None) -> Voice:
        """How the base model, or the adapter at ``path``, is asked; see `find_voice`."""
        return find_voice(
            name, self.engine.model_name, self.tokenizer, self.vocabulary, path, root,
            self.settings.chat_template, self.settings.chat_template_args,
        )  # fmt: skip

    def voice(self, name: str | None) -> Voice:
        """The model that a request names.

        Raises:
            ApiError: there is none of that name.
        """
        found = self.base if name in DEFAULT_NAMES else self.voices.get(name)
        if found is not None:
            return found
        if name in self.refused:
            why = f"is not served: {self.refused[name]}"
        else:
            names = list(self.voices)
            near = difflib.get_close_matches(name, names, n=1)
            known = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            why = f"is not served; {shorten(known, 300)}"
        raise ApiError(f"the model {shorten(repr(name))} {why}", 404, "model", "model_not_found")

    def new_tokens(self, prompt: Prompt, asked: int | None, place: str) -> int:
        """How many tokens an answer may have.

        Raises:
            ApiError: a token is not in the vocabulary, or the model's context has not room.
        """
        ids = prompt.ids
        if not ids:
            raise ApiError(f"{place} has no tokens; write something", param=place)
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ApiError(
                f"{place} has token {min(ids) if min(ids) < 0 else max(ids)}, and the model's "
                f"vocabulary has {self.vocabulary}",
                param=place,
            )
        room = self.engine.room(ids)
        if room < max(asked or 1, 1):
            context = self.engine.model_config.max_positions
            more = f" and {asked} are asked for" if asked and room >= 1 else ""
            raise ApiError(
                f"{place} has {len(ids)} tokens{more}, and the model's context is {context}; "
                "shorten it" + (", or ask for fewer" if more else ""),
                param=place,
                code="context_length_exceeded",
            )
        return min(self.settings.max_tokens, room) if asked is None else asked

    def request(
        self, fields: Fields, voice: Voice, prompt: Prompt, number: int, place: str,
        end_ids: Sequence[int], constraint: Grammar | None = None, echo: bool = False,
    ) -> Request:  # fmt: skip
        """What the engine is asked for one answer.

        Args:
            number: of the answer among those to the same prompt.
            place: the prompt's field, for errors.
        """
        wide = [token for token in fields.logit_bias if token >= self.vocabulary]
        if wide:
            raise ApiError(
                f"logit_bias has token {wide[0]}, and the model's vocabulary has {self.vocabulary}",
                param="logit_bias",
            )
        more = {
            name: getattr(fields, name)
            for name in ("length_penalty", "no_repeat_ngram_size")
            if getattr(fields, name) is not None
        }
        return Request(
            prompt.ids,
            voice.adapter,
            tuple(end_ids),
            self.new_tokens(prompt, fields.max_tokens, place),
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=fields.top_k,
            min_p=fields.min_p,
            repetition_penalty=fields.repetition_penalty,
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            logit_bias=fields.logit_bias,
            seed=seed_of(fields.seed, number),
            top_logprobs=fields.logprobs or 0,
            prompt_logprobs=fields.logprobs if echo else None,
            num_beams=fields.num_beams,
            constraint=constraint and constraint.copy(),
            **more,
        )

    def begin(self, choices: Sequence[Choice], began: float, model: str) -> Answers:
        """Submit all of a request to the engine; the result is to be closed.

        Args:
            began: when the request came, of `time.monotonic`.
            model: its name, for the metrics.

        Raises:
            ApiError: the engine takes none of them now, or ever.
        """
        if self.draining:
            raise draining()
        most = self.settings.max_rows + self.settings.queue
        if len(choices) > most:
            raise ApiError(
                f"{len(choices)} answers are asked for, and the server takes {most} at once; send "
                "several requests",
                413, code="too_large",
            )  # fmt: skip
        first = self.metrics.first_token.labels(model)

        def closed(answers: Answers) -> None:
            self.running.discard(answers)
            self.metrics.count_tokens(model, answers.choices)
            if self.settings.log_prompts:
                for choice in answers.choices:
                    prompt = self.tokenizer.decode(choice.request.prompt, False)
                    say(f"{model}: {json.dumps(prompt)} -> {json.dumps(choice.text)}")

        answers = Answers(
            self.engine, choices, began + self.settings.timeout,
            lambda: first.observe(time.monotonic() - began), closed,
        )  # fmt: skip
        self.running.add(answers)
        return answers

    def abort(self) -> None:
        """Have all running answers end with an error."""
        for answers in list(self.running):
            answers.fail(draining())


def seed_of(seed: int | None, number: int) -> int:
    """The seed of one of several answers to a prompt; the first one's is the request's own."""
    if seed is None:
        return secrets.randbelow(SEEDS)
    return (seed + number * 0x9E3779B97F4A7C15) % SEEDS  # so that seeds 1 and 2 share none


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def usage_of(choices: Sequence[Choice], prompts: int) -> dict[str, Any]:
    """Tokens of a whole request; several answers to one prompt count it once.

    Args:
        choices: in the order of their prompts.
        prompts: how many of those there are.
    """
    each = len(choices) // prompts
    first = [choice.usage for choice in choices[::each]]
    prompt = sum(usage.prompt for usage in first)
    completion = sum(choice.usage.completion for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in first)},
    }
