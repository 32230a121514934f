"""/v1/chat/completions: conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from jlora.serving.answers import Answers, Choice
from jlora.serving.errors import ApiError
from jlora.serving.fields import ChatFields
from jlora.serving.grammar import Grammar
from jlora.serving.messages import read_messages
from jlora.serving.service import Service, new_id, usage_of
from jlora.serving.tools import CallReader, check_template
from jlora.serving.voices import Voice


def plan(service: Service, fields: ChatFields, voice: Voice) -> list[Choice]:
    """What the engine is to be asked: n answers.

    Raises:
        ApiError: the conversation does not fit, or something that is asked for cannot be done.
        UserError: the chat template refuses the conversation.
    """
    messages = read_messages(fields.messages)
    prompt = voice.chat_prompt(messages, fields.tools, fields.template_arguments, service.tokenizer)
    grammar = _grammar(service, fields, voice)
    whole = fields.tool_choice != "none" and service.grammars.marks_are_special
    choices = []
    for number in range(fields.n):
        request = service.request(
            fields, voice, prompt, number, "messages", voice.chat_ends.ids, grammar
        )
        stops = (*fields.stop, *voice.chat_ends.texts)
        if stops and fields.num_beams > 1:
            raise ApiError(
                f"num_beams can't be honoured: the chat template of {voice.name} ends an answer by "
                "a text, at which beam search does not stop",
                param="num_beams",
            )
        choices.append(
            Choice(
                number, request, service.tokenizer, stops, scored=fields.logprobs is not None,
                whole=whole,
            )
        )  # fmt: skip
    return choices


def _grammar(service: Service, fields: ChatFields, voice: Voice) -> Grammar | None:
    """What the answers must be."""
    choice = fields.tool_choice
    if choice == "none":
        if fields.schema is None:
            return None
        return service.grammars.of_schema(fields.schema, "response_format")
    check_template(voice.template, voice.name)
    if fields.schema is not None:
        raise ApiError(
            "response_format can't be honoured with tools that may be called; set tool_choice to "
            "none",
            param="response_format",
        )
    if choice == "auto":
        return None
    if fields.num_beams > 1:
        raise ApiError(
            "tool_choice can't be honoured with num_beams above 1; leave one out",
            param="tool_choice",
        )
    tools = [
        tool
        for tool in fields.tools
        if choice == "required" or tool["function"]["name"] == choice[0]
    ]
    return service.grammars.of_calls(tools, fields.parallel_tool_calls and choice == "required")


class ChatWriter:
    """Writes the answers of one request.

    Args:
        model: as the client named it.
    """

    def __init__(self, service: Service, fields: ChatFields, model: str):
        self._scores, self._fields = service.scores, fields
        self._head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}
        self._readers: dict[Choice, CallReader] = {}

    def _parts(
        self, answers: Answers, choice: Choice, piece: str, ended: bool
    ) -> list[str | dict[str, Any]]:
        """The texts and calls in a piece of an answer, which ends where no more is wanted."""
        if self._fields.tool_choice == "none":
            return [piece] if piece else []
        reader = self._readers.setdefault(choice, CallReader(self._fields.parallel_tool_calls))
        if reader.complete:
            return []
        parts = list(reader.add(piece, last=ended))
        if reader.complete:
            answers.stop(choice)
        return parts

    def _reason(self, choice: Choice) -> str | None:
        reader = self._readers.get(choice)
        if reader is None or not reader.calls:
            return choice.reason
        return "tool_calls" if reader.complete or choice.reason == "stop" else choice.reason

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The response, once all is there."""
        parts: dict[Choice, list] = {choice: [] for choice in answers.choices}
        async for found in answers.pieces():
            for choice, piece, ended in found:
                parts[choice] += self._parts(answers, choice, piece, ended)
        choices = []
        for choice in answers.choices:
            text = "".join(part for part in parts[choice] if isinstance(part, str))
            calls = [part for part in parts[choice] if isinstance(part, dict)]
            message = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message["content"] = text or None
                message["tool_calls"] = calls
            one = {"index": choice.index, "message": message}
            choices.append(
                {**one, "logprobs": self._logprobs(choice.shown_scores),
                 "finish_reason": self._reason(choice)}
            )  # fmt: skip
        usage = usage_of(answers.choices, 1)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    async def chunks(self, answers: Answers) -> AsyncIterator[list[dict[str, Any]]]:
        """The response in pieces; the first of each answer says its role."""
        head = {**self._head, "object": "chat.completion.chunk"}
        extra = {"usage": None} if self._fields.include_usage else {}
        sent = dict.fromkeys(answers.choices, 0)  # scores
        begun: set[Choice] = set()

        def chunk(choice: Choice, delta: dict, scores: list, reason: str | None = None) -> dict:
            one = {
                "index": choice.index,
                "delta": delta,
                "logprobs": self._logprobs(scores) if scores else None,
                "finish_reason": reason,
            }
            return {**head, "choices": [one], **extra}

        async for found in answers.pieces():
            ready = []
            for choice, piece, ended in found:
                if choice not in begun:
                    begun.add(choice)
                    ready.append(chunk(choice, {"role": "assistant", "content": ""}, []))
                scores = choice.scores[sent[choice] :]
                sent[choice] = len(choice.scores)
                parts = self._parts(answers, choice, piece, ended) or ([""] if scores else [])
                for part in parts:
                    ready.append(chunk(choice, self._delta(choice, part), scores))
                    scores = []
                if ended:
                    ready.append(chunk(choice, {}, [], self._reason(choice)))
            if ready:
                yield ready
        if self._fields.include_usage:
            yield [{**head, "choices": [], "usage": usage_of(answers.choices, 1)}]

    def _delta(self, choice: Choice, part: str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(part, str):
            return {"content": part}
        number = self._readers[choice].calls.index(part)
        return {"tool_calls": [{"index": number, **part}]}

    def _logprobs(self, scores: list) -> dict[str, Any] | None:
        return None if self._fields.logprobs is None else self._scores.of_chat(scores)
