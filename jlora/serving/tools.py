"""Calls of tools in an answer: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

So the templates of Hermes, Qwen, SmolLM2 and others have the model write them. Templates that want
another form are not read: a call that is taken for text would be worse than a refusal.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from jlora.data.chat_template import ChatTemplate
from jlora.serving.errors import ApiError
from jlora.serving.grammar import CALL_BEGIN, CALL_END


def check_template(template: ChatTemplate, name: str) -> None:
    """Check that calls can be read from answers to this template.

    Raises:
        ApiError: it says nothing of tools, or has calls written otherwise.
    """
    if not template.reads_tools:
        raise ApiError(f"the chat template of {name} knows no tools", param="tools")
    source = template.source if template.with_tools is None else template.with_tools
    if CALL_BEGIN not in source or "<function=" in source or "<arg_key>" in source:
        raise ApiError(
            f"the chat template of {name} has calls written in a form that is not read here (only "
            f"{CALL_BEGIN} and JSON is); set tool_choice to none",
            param="tools",
        )


class CallReader:
    """Parts calls from the text of an answer that comes piece by piece.

    Attributes:
        calls: those that were found, in OpenAI's form.
    """

    def __init__(self, several: bool = True):
        self.calls: list[dict[str, Any]] = []
        self._several = several
        self._inside = False
        self._gap = ""  # the space before a call
        self._waiting = ""  # white space, the beginning of a mark, or a call up to now

    @property
    def complete(self) -> bool:
        """Whether nothing that follows is wanted."""
        return bool(self.calls) and not self._several

    def add(self, piece: str, last: bool = False) -> Iterator[str | dict[str, Any]]:
        """What is known now: texts, and calls as objects.

        Args:
            last: whether nothing follows.
        """
        self._waiting += piece
        while self._waiting and not self.complete:
            mark = CALL_END if self._inside else CALL_BEGIN
            before, found, after = self._waiting.partition(mark)
            if not found:
                break
            self._waiting = after
            if self._inside:
                yield self._call(before)
            else:
                text = before.rstrip()
                self._gap = before[len(text) :]
                if text:
                    yield text
            self._inside = not self._inside
        if self.complete:
            self._waiting = ""
        text = ""
        if last:
            text, self._waiting = self._waiting, ""
            if self._inside:
                text = self._gap + CALL_BEGIN + text
            elif self.calls:
                text = text.rstrip()
        elif not self._inside:
            shown = self._settled()
            text, self._waiting = self._waiting[:shown], self._waiting[shown:]
        if text:
            yield text

    def _settled(self) -> int:
        """How many characters of the waiting text cannot belong to a call, or to the space before
        one."""
        text = self._waiting
        longest = min(len(text), len(CALL_BEGIN) - 1)
        begun = next((n for n in range(longest, 0, -1) if CALL_BEGIN.startswith(text[-n:])), 0)
        return len(text[: len(text) - begun].rstrip())

    def _call(self, text: str) -> str | dict[str, Any]:
        """A call, or the text itself where it is none."""
        try:
            found = json.loads(text)
            name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return self._gap + CALL_BEGIN + text + CALL_END
        if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
            return self._gap + CALL_BEGIN + text + CALL_END
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self.calls.append(call)
        return call
