"""Which words of a conversation are trained, found by rendering beginnings of it.

An answer is what the messages up to it add to the messages before it with the generation prompt.
Its end-of-turn token belongs to it; an empty thinking block, which some templates put before an
answer, belongs to the prompt.
"""

from __future__ import annotations

import re

from jlora.data.chat_template import THOUGHTS, ChatTemplate
from jlora.data.conversations import Conversation
from jlora.data.readers import shorten
from jlora.data.spans import Spans
from jlora.system.errors import UserError

NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
OPEN_THOUGHTS = re.compile(r"<think>\s*\Z")


def answer_spans(row: Conversation, template: ChatTemplate) -> tuple[str, Spans]:
    """The text of a conversation, and where in it the answers stand that are trained.

    Raises:
        UserError: the template writes the beginning of a conversation otherwise than within the
            whole, or has no generation prompt; names the line.
    """
    last = len(row.messages) - 1
    whole = render(row, template, last + 1)
    spans = []
    for number in row.answers:
        before = render(row, template, number, prompt=True) if number else _opening(row, template)
        if not whole.startswith(before):
            raise _no_prefix(row, number, whole, before, "the generation prompt before it")
        start, end = len(before), len(whole)
        if number != last:
            until = render(row, template, number + 1)
            # Some templates write an end token behind every conversation, not every answer.
            for closing in ("", *template.tokens.values()):
                if until.endswith(closing) and whole.startswith(until.removesuffix(closing)):
                    end = len(until) - len(closing)
                    break
            else:
                raise _no_prefix(row, number, whole, until, "it as the last message")
        _check_prompt(row, template, number, before, whole[start:end])
        opened = OPEN_THOUGHTS.search(before)  # a generation prompt may begin the block
        thoughts = NO_THOUGHTS.match(whole, opened.start() if opened else start, end)
        spans.append((thoughts.end() if thoughts else start, end))
    return whole, spans


def render(row: Conversation, template: ChatTemplate, count: int, prompt: bool = False) -> str:
    try:
        return template.render(row.messages[:count], tools=row.tools, add_generation_prompt=prompt)
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from error


def _opening(row: Conversation, template: ChatTemplate) -> str:
    """The text before an answer that nothing was asked before."""
    try:
        return template.render([], tools=row.tools, add_generation_prompt=True)
    except UserError as error:
        raise UserError(
            f"{row.place}: the conversation begins with the assistant, which this template does "
            "not take; put a message of the user first"
        ) from error


def _no_prefix(row: Conversation, number: int, whole: str, other: str, what: str) -> UserError:
    equal = next((place for place, (a, b) in enumerate(zip(whole, other)) if a != b), len(whole))
    return UserError(
        f"{row.place}: message {number + 1} (assistant): the template writes {what} as "
        f"{_piece(other, equal)}, but in the whole conversation as {_piece(whole, equal)}, so that "
        "its words cannot be told apart; set data.train_on to each (every answer in the "
        "conversation up to it) or last, or choose another --chat-template"
    )


def _piece(text: str, place: int) -> str:
    return shorten(repr(text[max(0, place - 12) : place + 20]), 44)


def _check_prompt(
    row: Conversation, template: ChatTemplate, number: int, before: str, added: str
) -> None:
    """Refuse a template that writes a heading before answers and none to ask for one."""
    message = row.messages[number]
    content = message["content"].strip()
    if not number or not content or any(key in message for key in THOUGHTS):
        return
    heading = added.partition(content)[0].strip() if content in added else ""
    if not heading or "<think>" in heading:
        return
    if render(row, template, number) == before:
        raise UserError(
            f"{row.place}: {template.name} has no generation prompt: it writes "
            f"{shorten(repr(heading))} before an answer and leaves it out when it asks for one; "
            "add `{% if add_generation_prompt %}` to it, or choose another --chat-template"
        )
