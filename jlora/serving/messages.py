"""The messages of a conversation, checked, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jlora.data.chat_template import THOUGHTS
from jlora.data.readers import shorten
from jlora.serving.errors import ApiError
from jlora.serving.fields import wrong

#: Roles of the protocol, and what templates call them.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
#: Kept beside role and content, for the template.
MORE = ("name", "tool_call_id", *THOUGHTS)


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as a template takes them.

    Raises:
        ApiError: there are none, or one has an unknown role or content that is no text.
    """
    if not isinstance(value, list) or not value:
        raise ApiError("messages must be a list of one message or more", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(place, value, 'an object such as {"role": "user", "content": "..."}')
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(
            f"{place}.role is {shorten(repr(role))}; there are {', '.join(ROLES)}",
            param=f"{place}.role",
        )
    if value.get("function_call") is not None:
        raise ApiError(
            f"{place}.function_call is the old form of a call; write tool_calls",
            param=f"{place}.function_call",
        )
    kept: dict[str, Any] = {"role": ROLES[role]}
    for name in MORE:
        text = value.get(name)
        if text is not None:
            if not isinstance(text, str):
                raise wrong(f"{place}.{name}", text, "a string")
            kept[name] = text
    calls = value.get("tool_calls")
    if calls:
        kept["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    content = value.get("content")
    if content is None and role == "assistant" and (calls or value.get("refusal")):
        content = value.get("refusal") or ""  # OpenAI writes null there
    kept["content"] = _content(content, f"{place}.content")
    return kept


def _content(value: Any, place: str) -> str:
    """A text, given as such or in parts."""
    if isinstance(value, list):
        texts = []
        for number, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                raise ApiError(
                    f"{place}[{number}] is {shorten(repr(kind))}, and only parts of type text are "
                    "read",
                    param=place,
                )
            texts.append(part[kind])
        return "".join(texts)
    if not isinstance(value, str):
        raise wrong(place, value, "a string")
    return value


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Calls with arguments as objects, as templates want them; OpenAI sends them as JSON."""
    if not isinstance(value, list):
        raise wrong(place, value, "a list")
    found = []
    for number, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ApiError(f"{place}[{number}] has no function with a name", param=place)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ApiError(
                    f"{place}[{number}].function.arguments is not JSON", param=place
                ) from None
        kept = {"type": "function", "function": {**function, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            kept["id"] = call["id"]
        found.append(kept)
    return found
