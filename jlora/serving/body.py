"""The JSON of a request, and its fields one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jlora.data.readers import shorten
from jlora.serving.errors import ApiError
from jlora.system.errors import kind_of

LARGEST = 2**63  # of whole numbers


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ApiError: it is no JSON, no object, or holds a number or a character that JSON has not.
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # of JSON, UTF-8, or a number of thousands of digits
        reason = shorten(str(error).replace("\n", " "), 200)
        raise ApiError(f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(f"the body is {kind_of(body)}; send a JSON object", code="invalid_json")
    if re.search(rb"\\u[dD][89a-fA-F]|\0", raw):  # \0: it is UTF-16 or 32, of which JSON may be
        _check_characters(body)
    return body


def _no_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _check_characters(body: dict[str, Any]) -> None:
    """Refuse half a surrogate pair, which is no character; `json.loads` lets it pass."""
    stack: list[Any] = [body]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value
            stack += value.values()
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ApiError(
                    f"a text holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), "
                    "which is no character",
                    code="invalid_json",
                ) from None


class Body:
    """A JSON object whose fields are taken one by one; null counts as not given."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def number(
        self, name: str, default: Any, least: float = -math.inf, most: float = math.inf
    ) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise wrong(name, value, "a number")
        if type(value) is int and abs(value) > LARGEST:  # no float may hold it
            raise wrong(name, value, "a number of that size")
        if not least <= value <= most or not math.isfinite(value):
            raise ApiError(f"{name} is {value}, but must be {_range(least, most)}", param=name)
        return float(value)

    def whole(self, name: str, default: Any, least: int, most: int = LARGEST) -> Any:
        value = self.number(name, None, least, most)
        if value is None:
            return default
        if not value.is_integer():
            raise ApiError(f"{name} is {value}, but must be a whole number", param=name)
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "a string")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise wrong(name, value, "an object")
        return value

    def rest(self) -> dict[str, Any]:
        """The fields that nobody took."""
        return self._left


def wrong(name: str, value: Any, expected: str) -> ApiError:
    shown = kind_of(value) if isinstance(value, (dict, list, str, bool)) else shorten(repr(value))
    return ApiError(f"{name} is {shown}, but must be {expected}", param=name)


def _range(least: float, most: float) -> str:
    if most in (math.inf, LARGEST):
        return f"at least {least}"
    return f"from {least} to {most}"
