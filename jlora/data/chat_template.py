"""Chat templates: the Jinja text by which a model's makers turn messages into one string.

`find_template` looks where they are kept: ``chat_template.jinja`` or ``tokenizer_config.json``
beside a model, a GGUF file's metadata, what a run or an adapter was trained with
(`ChatTemplate.save`), a file of the user's, or those that come with jlora.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from jlora.data.rows import characters
from jlora.data.template_sandbox import TemplateRefusal, budget, compile_template
from jlora.data.tokenizer import Tokenizer, find_files
from jlora.formats.safetensors_file import one_line
from jlora.system.errors import UserError, kind_of
from jlora.system.files import read_text, write_text
from jlora.system.json_files import read_object

TEMPLATE_FILE = "chat_template.jinja"
#: Beside it, in what jlora trained: the arguments and special tokens of the training.
SETTINGS_FILE = "chat_template_settings.json"
#: The special tokens that templates may print, as transformers gives them.
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
#: Under these names a message's thoughts are given; templates read the first.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja template, and what it is rendered with.

    Attributes:
        source: the template.
        tokens: the special tokens that it may print, such as ``{"eos_token": "<|im_end|>"}``.
        arguments: further variables for every rendering, such as ``{"enable_thinking": False}``.
        name: where it came from, for messages.
        with_tools: the template for conversations with tools, where the model has one of its own.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str = "chat template"
    with_tools: str | None = None

    def __post_init__(self):
        """Raises UserError for a source that is not Jinja (with its line)."""
        for source in (self.source, self.with_tools):
            if source is not None:
                self._compiled(source)

    @property
    def reads_tools(self) -> bool:
        """Whether the template says anything about tools."""
        return self.with_tools is not None or "tools" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **arguments: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` makes it.

        Args:
            messages: each with ``role`` and ``content``, and what else the template reads.
            tools: JSON schemas of the functions that the assistant may call.
            add_generation_prompt: end with the words after which the assistant's answer follows.
            arguments: more variables; they go before `arguments` of the template.

        Raises:
            UserError: the template refuses these messages, is wrong, or does not come to an end.
        """
        source = self.source if not tools or self.with_tools is None else self.with_tools
        values = {
            **self.tokens,
            **self.arguments,
            **arguments,
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with budget(characters(values)):
                return self._compiled(source).render(values)
        except TemplateRefusal as error:
            raise UserError(f"{self.name} refuses this: {one_line(error)}") from error
        except jinja2.exceptions.SecurityError as error:
            raise UserError(
                f"{self.name} does what no template may ({one_line(error)}); "
                "take another with --chat-template"
            ) from error
        except (Exception, RecursionError) as error:  # whatever the template's code may raise
            reason = "no file may be read" if "no loader" in str(error) else one_line(error)
            raise UserError(
                f"{self.name} cannot be rendered ({reason}); take another with --chat-template"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Keep it in a folder, for `find_template` and, the template itself, for transformers."""
        folder = Path(folder)
        settings = {"name": self.name, "tokens": dict(self.tokens)}
        settings["arguments"] = dict(self.arguments)
        if self.with_tools is not None:
            settings["with_tools"] = self.with_tools
        write_text(folder / TEMPLATE_FILE, self.source)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_text(folder / SETTINGS_FILE, text + "\n")

    def _compiled(self, source: str) -> jinja2.Template:
        try:
            return _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{self.name}:{error.lineno}: not a Jinja template ({one_line(error.message)}); "
                "fix it, or take another with --chat-template"
            ) from error
        except RecursionError as error:
            raise UserError(
                f"{self.name}: nested too deeply; take another with --chat-template"
            ) from error


_compile = functools.lru_cache(maxsize=16)(compile_template)


def find_template(
    folder_or_file: str | Path | None,
    choice: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> ChatTemplate | None:
    """The chat template of a model, an adapter or a run; None: it has none.

    Args:
        folder_or_file: a folder, or a GGUF file (then what lies beside it counts first, as for
            its tokenizer). None: no model is known, so there are no special tokens.
        choice: a template instead of the model's: a file, or one of `built_in_names`. The special
            tokens remain the model's.
        arguments: `ChatTemplate.arguments`; they go before those that the folder keeps.

    Raises:
        UserError: there is no such choice, or a file is damaged.
    """
    place = None if folder_or_file is None else Path(folder_or_file)
    template = tokens = None
    kept: dict[str, Any] = {}
    if place is not None:
        folder = place if place.is_dir() else place.parent
        template, tokens, kept = _in_folder(folder)
        if template is None and (folder.absolute().parent / SETTINGS_FILE).is_file():
            template, tokens, kept = _in_folder(folder.absolute().parent)  # an adapter in its run
        if place.suffix.lower() == ".gguf" and (template is None or not tokens):
            own, special = _in_gguf(place)
            template, tokens = template or own, tokens or special
        tokens = tokens or _of_tokenizer(folder)
    given = {**kept, **(arguments or {})}
    if choice is not None:
        return ChatTemplate(*_chosen(choice, tokens or {}, given))
    if template is None:
        return None
    sources, name = template
    return ChatTemplate(sources["default"], tokens or {}, given, name, sources.get("tool_use"))


def built_in_names() -> list[str]:
    """The names of the templates that come with jlora."""
    folder = importlib.resources.files("jlora.data") / "chat_templates"
    return sorted(p.name[: -len(".jinja")] for p in folder.iterdir() if p.name.endswith(".jinja"))


def _chosen(choice: str, tokens: Mapping[str, str], arguments: Mapping[str, Any]) -> tuple:
    names = built_in_names()
    if choice in names:
        folder = importlib.resources.files("jlora.data") / "chat_templates"
        source = (folder / f"{choice}.jinja").read_text(encoding="utf-8")
        return source, tokens, arguments, f"chat template {choice}"
    if not os.path.isfile(choice):
        raise UserError(
            f"no chat template {choice}: no such file; jlora comes with {', '.join(names)}"
        )
    return read_text(choice), tokens, arguments, choice


def _in_folder(folder: Path) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The template of a folder (None: there is none), its special tokens and kept arguments."""
    kept: dict[str, Any] = {}
    path = folder / SETTINGS_FILE
    if path.is_file():
        kept = read_object(path, f"remove it and {TEMPLATE_FILE}")
    tokens = special_tokens(folder) or kept.get("tokens") or {}
    found = None
    if (folder / TEMPLATE_FILE).is_file():
        sources = {"default": read_text(folder / TEMPLATE_FILE)}
        if isinstance(kept.get("with_tools"), str):
            sources["tool_use"] = kept["with_tools"]
        found = sources, str(folder / TEMPLATE_FILE)
    else:
        for name in ("tokenizer_config.json", "chat_template.json"):
            path = folder / name
            if path.is_file():
                value = read_object(path, "download it again").get("chat_template")
                if value is not None:
                    found = _sources(value, path), f"chat template in {path}"
                    break
    return found, tokens, kept.get("arguments") or {}


def _sources(value: Any, path: Path) -> dict[str, str]:
    """Templates by name: a tokenizer_config.json holds one, or a list with their names."""
    if isinstance(value, list):
        value = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
    elif isinstance(value, str):
        value = {"default": value}
    if not isinstance(value, dict) or not isinstance(value.get("default"), str):
        raise UserError(
            f"{path}: its chat_template is {kind_of(value)} and has no template named default; "
            "choose one with --chat-template"
        )
    return {name: text for name, text in value.items() if isinstance(text, str)}


def special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a model's tokenizer files name, as texts."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            values = read_object(path, "download it again")
            for key in TOKENS:
                token = values.get(key)
                if isinstance(token, dict):  # the long form: {"content": "</s>", ...}
                    token = token.get("content")
                if isinstance(token, str):
                    found[key] = token
    return found


def _of_tokenizer(folder: Path) -> dict[str, str]:
    """The end and begin tokens of a model whose files name none but by their ids, as GPT-2's do."""
    return {} if find_files(folder) is None else tokens_of(Tokenizer.from_folder(folder))


def tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The end and begin tokens of a tokenizer, as texts."""
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    found = {name: tokenizer.backend.id_to_token(i) for name, i in ids.items() if i is not None}
    return {name: token for name, token in found.items() if token is not None}


def _in_gguf(path: Path) -> tuple[Any, dict[str, str]]:
    from jlora.formats.gguf_file import open_gguf, read_metadata

    metadata = read_metadata(path, open_gguf(path))
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
    found = {}
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= int(index) < len(tokens):
            found[f"{name}_token"] = tokens[int(index)]
    own = metadata.get("tokenizer.chat_template")
    if not isinstance(own, str):
        return None, found
    sources = {"default": own}
    tool_use = metadata.get("tokenizer.chat_template.tool_use")
    if isinstance(tool_use, str):
        sources["tool_use"] = tool_use
    return (sources, f"chat template in {path}"), found


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: no nulls, thoughts under each name."""
    values = {key: _plain(value) for key, value in message.items() if value is not None}
    thoughts = next((values[name] for name in THOUGHTS if name in values), None)
    if thoughts is not None:
        values = {"thinking": thoughts, **values, "reasoning_content": thoughts}
    return values


def _plain(value: Any) -> Any:
    """The same of the types that JSON has, which have no methods that could do harm."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
