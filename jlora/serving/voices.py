"""How each of the models that are served is asked: its chat template, its end tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlora.data.batches import NO_SEPARATOR, encode_prompts
from jlora.data.chat_template import ChatTemplate
from jlora.data.end_tokens import Ends, find_ends
from jlora.data.tokenizer import Tokenizer
from jlora.runs.adapter_file import AdapterFile
from jlora.runs.chat import check_end_ids, find_chat_template
from jlora.serving.errors import ApiError
from jlora.system.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt.

    Attributes:
        ids: tokens.
        text: as it was given; None: it was given as tokens.
        before, after: how many tokens at its two ends are not of the text.
    """

    ids: tuple[int, ...]
    text: str | None = None
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Voice:
    """A base model or one of its adapters, as clients know it.

    Attributes:
        name: in ``model``.
        adapter: what the engine calls it; None: the base model.
        root: where it came from.
        task: of the run that trained it, such as "e2e"; None: it talks, or was made elsewhere.
        template: None: there is no conversation with it.
        chat_ends, text_ends: what ends an answer in a conversation, and of a text that goes on.
        separator_id: as for `jlora.data.batches.encode_prompts`; `NO_SEPARATOR`: texts simply go
            on, behind the begin token if the tokenizer has one.
        created: unix time.
    """

    name: str
    adapter: str | None
    root: str
    task: str | None
    template: ChatTemplate | None
    chat_ends: Ends
    text_ends: Ends
    separator_id: int | None
    created: int = field(default_factory=lambda: int(time.time()))

    def text_prompt(self, text: str, tokenizer: Tokenizer) -> Prompt:
        """The tokens of a text to go on with; for a run of a task as in `jlora generate`."""
        if self.separator_id == NO_SEPARATOR:
            begin = tokenizer.begin_ids
            return Prompt((*begin, *tokenizer.encode(text)), text, before=len(begin))
        (ids,) = encode_prompts([text], tokenizer, separator_id=self.separator_id)
        return Prompt(tuple(ids), text, after=1)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        tokenizer: Tokenizer,
    ) -> Prompt:
        """The tokens after which the answer to a conversation follows.

        Raises:
            ApiError: there is no chat template.
            UserError: it refuses these messages.
        """
        if self.template is None:
            why = f"was trained for the task {self.task}" if self.task else "has no chat template"
            raise ApiError(
                f"{self.name} {why}; ask it by /v1/completions"
                + ("" if self.task else ", or start the server with --chat-template"),
                param="model",
                code="no_chat_template",
            )
        text = self.template.render(
            messages, tools=tools or None, add_generation_prompt=True, **arguments
        )
        return Prompt(tuple(tokenizer.encode(text)), text)


def find_voice(
    name: str,
    model: str,
    tokenizer: Tokenizer,
    vocabulary: int,
    path: str | Path | None = None,
    root: str | None = None,
    choice: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Voice:
    """How a model is asked, from its files.

    Args:
        name: what clients call it.
        model: name or path of the base model.
        vocabulary: size of the model's.
        path: of the adapter; None: the base model itself.
        root: see `Voice`; None: ``path``, or ``model``.
        choice, arguments: as for `jlora.runs.chat.find_chat_template`.

    Raises:
        UserError: no such model or adapter, or one of its files is damaged.
    """
    adapter = None if path is None else AdapterFile(Path(path))
    if adapter is not None:
        adapter.check()
    template = find_chat_template(model, adapter, choice, arguments)
    recipe = adapter and adapter.recipe
    data = recipe.data if recipe else None
    task = data.task if data and adapter.of_task else None
    separator = NO_SEPARATOR
    if data and (task or template is None):
        separator = data.separator_id
    elif adapter is None and tokenizer.separator_id is not None:
        separator = tokenizer.separator_id  # a merged model of a task
    text_ends, chat_ends = find_ends(tokenizer), find_ends(tokenizer, template)
    if data and data.end_id is not None:
        text_ends = Ends(tuple(dict.fromkeys((*text_ends.ids, data.end_id))))
        chat_ends = Ends(tuple(dict.fromkeys((*chat_ends.ids, data.end_id))), chat_ends.texts)
    if task:
        named = recipe.decode.eos_token_ids or [data.end_id]
        named = [tokenizer.eos_token_id if token is None else token for token in named]
        text_ends = Ends(tuple(token for token in named if token is not None))
    for ends in (text_ends, chat_ends):
        check_end_ids(ends.ids, vocabulary)
    if separator is not None and separator != NO_SEPARATOR and not 0 <= separator < vocabulary:
        raise UserError(f"{root or path}: its separator {separator} is not in the vocabulary")
    return Voice(
        name, None if path is None else name, root or str(path or model), task, template,
        chat_ends, text_ends, separator,
    )  # fmt: skip
