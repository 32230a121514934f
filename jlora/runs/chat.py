"""Talking to a model: its chat template, and a conversation turn by turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jlora import engine
from jlora.adapters import PeftModel, TunedModel
from jlora.adapters.loralib import is_loralib
from jlora.data.chat_template import ChatTemplate, find_template
from jlora.data.end_tokens import find_ends
from jlora.decoding.sampling import GenerateConfig
from jlora.decoding.session import Session
from jlora.decoding.text_stream import TextStream, pieces
from jlora.layers import set_trainable
from jlora.models.hub import find, load, require_tokenizer
from jlora.runs.adapter_file import AdapterFile, base_name, open_model
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

    def encode(self, messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
        """The tokens after which the model's answer to the last message follows.

        Raises:
            UserError: the template refuses the messages.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.template.render([*system, *messages], add_generation_prompt=True)
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
        choice, arguments: as for `jlora.data.chat_template.find_template`.

    Raises:
        UserError: no such choice or model, or a damaged file.
    """
    if choice is not None:
        return find_template(find(name), choice, arguments)
    if adapter is not None and not is_loralib(adapter.folder):
        for place in dict.fromkeys((adapter.folder, adapter.path)):
            own = find_template(place, None, arguments)
            if own is not None:
                return own
    return None if adapter and adapter.of_task else find_template(find(name), None, arguments)


class Talk:
    """A conversation with a model.

    Args:
        name, adapter: as for `jlora.runs.adapter_file.open_model`.
        chat: template and system prompt.
        config: how to choose tokens; end tokens and stop texts of model and template are added.
        precision: see `jlora.engine.prepare`.
        end_ids: end tokens instead of the model's.

    Attributes:
        messages: what was said, the system prompt aside.
        cut: whether the last answer ended because its tokens were used up.

    Raises:
        UserError: no such model or adapter, or the model has no tokenizer.
    """

    def __init__(
        self,
        name: str | None,
        adapter: AdapterFile | None,
        chat: Chat,
        config: GenerateConfig,
        precision: str = "auto",
        end_ids: Sequence[int] | None = None,
    ):
        self.chat, self.adapter = chat, adapter
        self._name, self._precision, self._given_ends = base_name(name, adapter), precision, end_ids
        self._given = config
        self._take(open_model(self._name, adapter))
        self.reset()

    def _take(self, model: Any) -> None:
        """Talk with ``model`` from now on; what was said stays, its keys and values go."""
        self.model = model
        engine.prepare(model, self._precision, keep_weights=False)
        model.eval()
        self._tokenizer = require_tokenizer(model)
        ends = find_ends(self._tokenizer, self.chat.template)
        self._config = replace(
            self._given,
            eos_token_ids=tuple(self._given_ends or ends.ids),
            stops=(*self._given.stops, *ends.texts),
        )
        self._session = Session(model)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = []
        self.cut = False

    def set_system(self, text: str | None) -> None:
        """Set the system prompt; what was said stays."""
        self.chat = replace(self.chat, system=text)

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece; it may be left at any time, and what came of it counts.

        Raises:
            UserError: the conversation does not fit the model's context, or the template refuses
                it. What was said before stays.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.encode(asked, self._tokenizer)
        context = self.model.config.max_positions
        room = context - len(prompt) + 1  # the last new token is never read
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model's context is "
                f"{context}; /reset begins a new one"
            )
        config = replace(self._config, max_new_tokens=min(self._config.max_new_tokens, room))
        said, count, self.cut = "", 0, False
        shown = TextStream(self._tokenizer, config.stops)
        tokens = self._session.tokens(prompt, config, len(self.messages))
        try:
            for token in tokens:
                ended = token in config.eos_token_ids
                count += 1
                self.cut = not ended and count == config.max_new_tokens
                piece = shown.finish() if ended or self.cut else shown.add(token)
                said += piece
                if piece:
                    yield piece
                if shown.stopped:
                    break
        finally:
            tokens.close()
            self.messages = [*asked, {"role": "assistant", "content": said}]
