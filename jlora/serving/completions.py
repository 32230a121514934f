"""/v1/completions: texts that go on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from jlora.serving.answers import Answers, Choice
from jlora.serving.fields import CompletionFields
from jlora.serving.service import Service, new_id, usage_of
from jlora.serving.voices import Prompt, Voice


def plan(service: Service, fields: CompletionFields, voice: Voice) -> list[Choice]:
    """What the engine is to be asked: n answers to each prompt, in their order.

    Raises:
        ApiError: a prompt does not fit, or the answer's form cannot be enforced.
    """
    grammar = None
    if fields.schema is not None:
        grammar = service.grammars.of_schema(fields.schema, "response_format")
    choices: list[Choice] = []
    for place, given in enumerate(fields.prompts):
        field = "prompt" if len(fields.prompts) == 1 else f"prompt[{place}]"
        prompt = Prompt(given)
        if isinstance(given, str):
            prompt = voice.text_prompt(given, service.tokenizer)
        for number in range(fields.n):
            request = service.request(
                fields, voice, prompt, number, field, voice.text_ends.ids, grammar, fields.echo
            )
            choices.append(
                Choice(
                    len(choices), request, service.tokenizer, fields.stop,
                    scored=fields.logprobs is not None, follows=True,
                    echoed=prompt if fields.echo else None,
                )
            )  # fmt: skip
    return choices


class CompletionWriter:
    """Writes the answers of one request.

    Args:
        model: as the client named it.
    """

    def __init__(self, service: Service, fields: CompletionFields, model: str):
        self._scores, self._fields = service.scores, fields
        self._head = {
            "id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()),
            "model": model,
        }  # fmt: skip

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The response, once all is there."""
        async for _ in answers.pieces():
            pass
        choices = [
            self._choice(choice, choice.text, [*choice.prompt_scores, *choice.shown_scores])
            for choice in answers.choices
        ]
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    async def chunks(self, answers: Answers) -> AsyncIterator[list[dict[str, Any]]]:
        """The response in pieces."""
        fields = self._fields
        extra = {"usage": None} if fields.include_usage else {}
        sent = dict.fromkeys(answers.choices, 0)  # scores
        begun: set[Choice] = set()
        async for found in answers.pieces():
            ready = []
            for choice, piece, ended in found:
                scores = choice.scores[sent[choice] :]
                sent[choice] = len(choice.scores)
                if choice not in begun:
                    begun.add(choice)
                    piece = choice.echoed + piece
                    scores = [*choice.prompt_scores, *scores]
                if piece or scores or ended:
                    one = self._choice(choice, piece, scores, choice.reason if ended else None)
                    ready.append({**self._head, "choices": [one], **extra})
            if ready:
                yield ready
        if fields.include_usage:
            yield [{**self._head, "choices": [], "usage": self._usage(answers)}]

    def _choice(self, choice: Choice, text: str, scores: list, reason: Any = ...) -> dict:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": None
            if self._fields.logprobs is None
            else self._scores.of_completion(scores, self._fields.logprobs),
            "finish_reason": choice.reason if reason is ... else reason,
        }

    def _usage(self, answers: Answers) -> dict[str, Any]:
        return usage_of(answers.choices, len(self._fields.prompts))
