"""Talking to a model: its chat template, and a conversation turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlora import engine
from jlora.adapters.loralib import is_loralib
from jlora.data.chat_template import ChatTemplate, built_in_names, find_template
from jlora.data.end_tokens import find_ends
from jlora.decoding.sampling import GenerateConfig
from jlora.decoding.session import Session
from jlora.decoding.text_stream import TextStream
from jlora.models.hub import find, outline, require_tokenizer
from jlora.runs.adapter_file import AdapterFile, base_name, open_model, switchable
from jlora.runs.chat_data import NO_TEMPLATE
from jlora.system.errors import UserError


@dataclass(frozen=True)
class Chat:
    """How prompts become conversations.

    Attributes:
        template: of the model or the adapter.
        system: the system prompt; None: none, or the template's own.
    """

    template: ChatTemplate
    system: str | None = None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The tokens after which the model's answer to the last message follows.

        Raises:
            UserError: the template refuses the messages.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.template.render([*system, *messages], tools=tools, add_generation_prompt=True)
        return tokenizer.encode(text)


def find_chat_template(
    name: str,
    adapter: AdapterFile | None,
    choice: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ChatTemplate | None:
    """The chat template to talk by; None: there is none, or the adapter is of a task.

    Args:
        name: of the base model.
        adapter: a template that it was trained with goes before the model's.
        choice, arguments: as for `jlora.data.chat_template.find_template`; ``none``: no template.

    Raises:
        UserError: no such choice or model, or a damaged file.
    """
    if choice == NO_TEMPLATE:
        return None
    if choice is not None:
        return find_template(find(name), choice, arguments)
    recipe = adapter and adapter.recipe
    if recipe and recipe.data.chat_template == NO_TEMPLATE:
        return None
    if adapter is not None and not is_loralib(adapter.folder):
        for place in dict.fromkeys((adapter.folder, adapter.path)):
            own = find_template(place, None, arguments)
            if own is not None:
                return own
    return None if adapter and adapter.of_task else find_template(find(name), None, arguments)


def check_end_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raises: UserError: an end token is not in a model's vocabulary."""
    if not all(0 <= token < vocabulary for token in ids):
        raise UserError(
            f"end tokens {', '.join(map(str, ids))}: the model's vocabulary has {vocabulary} "
            "words, numbered from 0; give --end-id one of them"
        )


class Talk:
    """A conversation with a model, whose adapter can be changed on the way.

    Args:
        name, adapter: as for `jlora.runs.adapter_file.open_model`.
        config: how to choose tokens; what ends an answer by model and template is added.
        system: the system prompt; None: none, or the template's own.
        choice, arguments: as for `find_chat_template`.
        precision: see `jlora.engine.prepare`.
        end_ids: end tokens instead of the model's.

    Attributes:
        messages: what was said, the system prompt aside.
        adapter: the path of the adapter that is on, or None.
        cut: whether the last answer ended because its tokens were used up.

    Raises:
        UserError: no such model or adapter, or nothing to talk by: no tokenizer, no chat template.
    """

    def __init__(
        self,
        name: str | None,
        adapter: AdapterFile | None,
        config: GenerateConfig,
        system: str | None = None,
        choice: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        precision: str = "auto",
        end_ids: Sequence[int] | None = None,
    ):
        self._name, self._given, self._given_ends = base_name(name, adapter), config, end_ids
        self._choice, self._arguments = choice, arguments
        template = self._template(adapter)
        seen = outline(self._name).model  # enough to see whether all fits, before weights are read
        self._tokenizer, self._vocabulary = require_tokenizer(seen), seen.config.vocab_size
        del seen  # see Outline
        self._names = {adapter and adapter.path: "default"}  # of adapters that are loaded
        self.adapter = adapter and adapter.path
        self._talk_by(Chat(template, system))
        self.model = open_model(self._name, adapter)
        engine.prepare(self.model, precision, keep_weights=False)
        self.model.eval()
        self._session = Session(self.model)
        self.reset()

    def _template(self, adapter: AdapterFile | None) -> ChatTemplate:
        template = find_chat_template(self._name, adapter, self._choice, self._arguments)
        if template is not None:
            return template
        if self._choice == NO_TEMPLATE:
            raise UserError(
                "--chat-template none: a conversation needs a template; leave it out, or go on "
                "with a text of your own: jlora generate --raw"
            )
        if adapter is not None and adapter.of_task:
            raise UserError(
                f"{adapter.path} was trained for a task and not to talk; ask it with `jlora "
                f"generate --adapter {adapter.path} --prompt ...`, or give --chat-template"
            )
        raise UserError(
            f"{self._name} has no chat template; choose one with --chat-template (a file, or "
            f"{', '.join(built_in_names())}), or go on with a text of your own: jlora generate"
        )

    def _talk_by(self, chat: Chat) -> None:
        ends = find_ends(self._tokenizer, chat.template)
        ids = tuple(self._given_ends or self._given.eos_token_ids or ends.ids)
        check_end_ids(ids, self._vocabulary)
        self.chat = chat
        self._config = replace(
            self._given, eos_token_ids=ids, stops=(*self._given.stops, *ends.texts)
        )

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = []
        self.cut = False

    def set_system(self, text: str | None) -> None:
        """Set the system prompt; what was said stays."""
        self.chat = replace(self.chat, system=text)

    def set_adapter(self, adapter: AdapterFile | None) -> None:
        """Put an adapter on in place of the one that is on, or none; what was said stays.

        Raises:
            UserError: it cannot be loaded; nothing is changed then.
        """
        path = adapter and adapter.path
        if adapter is not None:
            base_name(self._name, adapter)  # checks it
        template = self._template(adapter)
        self.model = switchable(self.model)
        if adapter is not None and path not in self._names:
            name = f"{len(self._names)}"
            adapter.add_to(self.model, name)
            self._names[path] = name
        self.model.set_adapter(None if adapter is None else self._names[path])
        self.model.eval()
        self.adapter = path
        self._talk_by(Chat(template, self.chat.system))
        self._session = Session(self.model)  # keys and values were the other adapter's

    def say(self, text: str, leave: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer, piece by piece; what came of it is part of the conversation.

        Args:
            leave: asked after each token whether to stop.

        Raises:
            UserError: the conversation does not fit the model's context, or the template refuses
                it; what was said before stays.
        """
        before, asked = self.messages, [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.encode(asked, self._tokenizer)
        room = self._session.room(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model's context is "
                f"{self.model.config.max_positions}; begin a new one (/reset)"
            )
        config = replace(self._config, max_new_tokens=min(self._config.max_new_tokens, room))
        answer, tokens = {"role": "assistant", "content": ""}, []

        def noted() -> Iterator[int]:
            for token in self._session.tokens(prompt, config, len(before)):
                tokens.append(token)
                yield token
                if leave():
                    return

        self.cut, self.messages = False, [*asked, answer]
        stream = TextStream(self._tokenizer, config.stops)
        try:
            for piece in stream.pieces(noted(), config.eos_token_ids):
                answer["content"] += piece
                yield piece
        except UserError:
            self.messages = before
            raise
        if not answer["content"] and leave():
            self.messages = before
        self.cut = len(tokens) == config.max_new_tokens and not stream.ended
