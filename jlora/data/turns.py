"""What a chat template writes round the messages, as plain texts.

Programs without Jinja (Ollama) need a template in another language. Conversations of known words
are rendered, what stands between the words is taken as the form of the turns, and only a form that
gives the template's own text for other conversations is believed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlora.data.chat_template import ChatTemplate
from jlora.system.errors import UserError

Pair = tuple[str, str]  # before and behind


@dataclass(frozen=True)
class Turns:
    """The form of a conversation.

    Attributes:
        start: before everything.
        no_system: where there is no system prompt, in its place.
        system: round a system prompt at the beginning; None: it stands in the first question, or
            the template refuses it.
        folded: round a system prompt inside the first question, before its words; None: as above.
        user, assistant: round their words.
        answer: after which the model's answer follows.
        default: the system prompt that the template itself puts where there is none.
    """

    start: str
    no_system: str
    system: Pair | None
    folded: Pair | None
    user: Pair
    assistant: Pair
    answer: str

    @property
    def default(self) -> str | None:
        if self.system is None:
            return None
        before, behind = self.system
        text = self.no_system[len(before) : len(self.no_system) - len(behind)]
        return text if text and self.no_system == before + text + behind else None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, with the generation prompt."""
        system, text = None, self.start
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        if system is None:
            text += self.no_system
        elif self.system is not None:
            text += self.system[0] + system + self.system[1]
        for number, message in enumerate(messages):
            before, behind = self.user if message["role"] == "user" else self.assistant
            if number == 0 and system is not None and self.folded is not None:
                before += self.folded[0] + system + self.folded[1]
            text += before + message["content"] + behind
        return text + self.answer


SYSTEM, QUESTION, ANSWER, NEXT = "Sjlorasystem", "Qjloraquestion", "Ajloraanswer", "Njloranext"
#: With them a form is checked: words with spaces, lines and signs.
CHECKS = ("Are you there?", "Yes:\n\n* I {am}, #1.", 'What\'s 2 < 3 & "why"?', "Be brief.\nPlease.")


#: Llama 3.1 and 3.2 print a date; this is the one in their own template, for want of today's.
DATE = {"date_string": "26 Jul 2024"}


def find_turns(template: ChatTemplate) -> Turns | None:
    """The form of a template's conversations; None: it has none that is always the same.

    Tools, thoughts and images are left out of account.
    """
    template = replace(template, arguments={**DATE, **template.arguments})
    try:
        turns = _read(template)
        return turns if turns is not None and _holds(turns, template) else None
    except UserError:  # the template refuses such a conversation
        return None


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Question, answer, question ... and perhaps a system prompt, as messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _read(template: ChatTemplate) -> Turns | None:
    head, middle, between, tail = _parts(template, QUESTION, ANSWER, NEXT)
    behind_user = _text(template, QUESTION, prompt=False).partition(QUESTION)[2]
    behind_answer = _text(template, QUESTION, ANSWER, prompt=False).partition(ANSWER)[2]
    fits = tail.startswith(behind_user) and middle.startswith(behind_user)
    if not fits or not between.startswith(behind_answer):
        return None
    before_user = between[len(behind_answer) :]
    start = template.tokens.get("bos_token") or ""
    # SmolLM2's begin token begins every turn, and is no beginning of the whole.
    start = start if head.startswith(start) and not before_user.startswith(start) else ""
    if not head[len(start) :].endswith(before_user):
        return None
    no_system = head[len(start) : len(head) - len(before_user)]
    system, folded = _system(template, start, before_user)
    return Turns(
        start,
        no_system,
        system,
        folded,
        (before_user, behind_user),
        (middle[len(behind_user) :], behind_answer),
        tail[len(behind_user) :],
    )


def _system(
    template: ChatTemplate, start: str, before_user: str
) -> tuple[Pair | None, Pair | None]:
    """`Turns.system` and `Turns.folded`."""
    try:
        text = _text(template, QUESTION, system=SYSTEM)
    except UserError:
        return None, None
    before, found, rest = text.removeprefix(start).partition(SYSTEM)
    behind = rest.partition(QUESTION)[0]
    if not found or QUESTION not in rest:
        return None, None
    if behind.endswith(before_user):
        return (before, behind[: len(behind) - len(before_user)]), None
    if before.startswith(before_user):
        return None, (before[len(before_user) :], behind)
    return None, None


def _holds(turns: Turns, template: ChatTemplate) -> bool:
    """Whether a form gives the template's own text for other conversations."""
    conversations = [conversation(*CHECKS[:1]), conversation(*CHECKS[:3])]
    conversations.append(conversation(*CHECKS, CHECKS[0]))
    if turns.system or turns.folded:
        conversations += [conversation(*CHECKS[:n], system=CHECKS[3]) for n in (1, 3)]
    if turns.default is not None:
        conversations.append(conversation(CHECKS[0], system=turns.default))
    for messages in conversations:
        text = template.render(messages, add_generation_prompt=True)
        today = datetime.date.today()
        if any(date in text for date in (f"{today:%d %b %Y}", f"{today:%B %d, %Y}", f"{today}")):
            return False  # tomorrow it would be wrong
        if text != turns.render(messages):
            return False
    return True


def _parts(template: ChatTemplate, *words: str) -> list[str]:
    """What a template writes round some words, and between them."""
    text, parts = _text(template, *words), []
    for word in words:
        part, found, text = text.partition(word)
        if not found:
            raise UserError(f"{template.name} leaves out a message")
        parts.append(part)
    return [*parts, text]


def _text(template: ChatTemplate, *contents: str, prompt: bool = True, **system: Any) -> str:
    return template.render(conversation(*contents, **system), add_generation_prompt=prompt)
