"""How a model is asked: by a chat template, as in a task, or by a text that it goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlora.data.batches import NO_SEPARATOR
from jlora.models.hub import outline
from jlora.runs.adapter_file import AdapterFile, base_name
from jlora.runs.chat import Chat, find_chat_template
from jlora.runs.chat_data import NO_TEMPLATE
from jlora.runs.data_config import DataConfig
from jlora.system.errors import UserError


@dataclass(frozen=True)
class Form:
    """How prompts become tokens, and what ends the answers.

    Attributes:
        chat: as messages to answer, by a chat template.
        plain: as a text to go on with, as the tokenizer begins one. Without `chat` or ``plain``
            as in a task: the prompt, then a separator.
        separator_id: token after each prompt of a task; None: as in the adapter's run, else the
            tokenizer's end token; `jlora.data.batches.NO_SEPARATOR`: none.
        end_ids: tokens that end a text; None: as the run says, else the tokenizer's end token, and
            with ``chat`` or ``plain`` all that the model's files and template name.
        shorten: ask for fewer new tokens where the model's context has not room for all.
        of_task: whether the prompts are inputs of a task, which beams answer by default.
    """

    chat: Chat | None = None
    plain: bool = False
    separator_id: int | None = None
    end_ids: Sequence[int] | None = None
    shorten: bool = False
    of_task: bool = False


def find_form(
    name: str | None,
    adapter: AdapterFile | None,
    *,
    data: DataConfig | None = None,
    texts: bool = False,
    raw: bool = False,
    system: str | None = None,
    choice: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    separator_id: int | None = None,
    end_ids: Sequence[int] | None = None,
    shorten: bool = False,
) -> Form:
    """The form in which a model is asked; nothing else decides it.

    Args:
        name, adapter: as for `jlora.runs.adapter_file.open_model`.
        data: how the prompts were read, which are then asked as in training; None: they were typed.
        texts: whether they are the beginnings of whole texts.
        raw: go on with the prompts' own text, whatever the model is used to.
        system, choice, arguments: as for `Chat` and `find_chat_template`.
        separator_id, end_ids, shorten: see `Form`; only what has no fixed form is shortened.

    Raises:
        UserError: no such model or template, or settings of a template where there is none.
    """
    own = choice in (None, NO_TEMPLATE)
    of_task = separator_id is not None or (adapter is not None and adapter.of_task and own)
    of_task |= data is not None and data.task != "chat"
    if not (of_task or raw or texts) and adapter is None and own:
        tokenizer = outline(base_name(name, adapter)).model.tokenizer
        of_task = tokenizer is not None and tokenizer.separator_id is not None  # a merged one
    given = {"--system-prompt": system, "--chat-template-args": arguments}
    given["--chat-template"] = None if choice == NO_TEMPLATE else choice
    if of_task:
        _refuse(given, "is for a chat template, which a task has not")
        if raw:
            separator_id = NO_SEPARATOR
        elif separator_id is None and data is not None:
            separator_id = data.separator_id
        return Form(separator_id=separator_id, end_ids=end_ids, of_task=True)
    if raw:
        return Form(plain=True, end_ids=end_ids, shorten=shorten)
    name = base_name(name, adapter)
    template = find_chat_template(name, adapter, choice, arguments)
    if texts:
        _refuse(given, "is for conversations, and these are whole texts")
    elif template is not None:
        return Form(Chat(template, system), end_ids=end_ids, shorten=shorten)
    else:
        _refuse(given, f"is for a chat template, and {name} has none")
    if data is None and adapter is not None:
        data = adapter.recipe.data if adapter.recipe else DataConfig()
    if texts or data is None or data.separator_id == NO_SEPARATOR:
        return Form(plain=True, end_ids=end_ids, shorten=shorten)
    # Pairs without a template; of adapters that were made elsewhere it has always been assumed.
    of_task = adapter is not None and adapter.recipe is None
    return Form(separator_id=data.separator_id, end_ids=end_ids, of_task=of_task)


def _refuse(given: Mapping[str, Any], why: str) -> None:
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {why}; leave it out")
