"""The fields of a request: their names, types, ranges and defaults.

Names and defaults are mlx_lm.server's, else OpenAI's. Null means the default, as with OpenAI. What
is not known is ignored and named in a header of the response; what is known and cannot be done is
refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jlora.data.readers import shorten
from jlora.serving.errors import ApiError
from jlora.system.errors import kind_of

MOST_ANSWERS = 128  # of one prompt, OpenAI's limit
MOST_ALTERNATIVES = 20  # OpenAI's limit of top_logprobs
MOST_STOPS = 16
SEEDS = 2**63
#: Fields that would change the answer and are not read: values that ask for nothing, the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "answers are not ranked; ask for several with n, or set num_beams"),
    "suffix": (("",), "text is not put in before something"),
    "audio": ((), "only text is written"),
    "modalities": ((["text"],), "only text is written"),
    "functions": (([],), "that is the old name; use tools"),
    "function_call": (("none", "auto"), "that is the old name; use tool_choice"),
    "web_search_options": ((), "nothing is searched"),
    "adapters": ((), "an adapter is chosen by its name in model; GET /v1/models lists them"),
    "xtc_probability": ((0,), "there is no XTC sampling"),
    "repetition_context_size": ((), "penalties look at the whole text"),
    "presence_context_size": ((), "penalties look at the whole answer"),
    "frequency_context_size": ((), "penalties look at the whole answer"),
    "role_mapping": ((), "conversations are written by the model's chat template"),
    "continue_final_message": ((False,), "an answer is a message of its own; use /v1/completions"),
    "add_generation_prompt": ((True,), "an answer is a message of its own; use /v1/completions"),
    "min_tokens": ((0,), "an answer may end at any token; use logit_bias"),
    "ignore_eos": ((False,), "an answer ends where the model ends it"),
}  # fmt: skip
#: Of no effect on the answer; no warning is due.
SILENT = frozenset(("user", "safety_identifier", "metadata", "store", "prompt_cache_key"))


@dataclass(frozen=True)
class Fields:
    """What a request asks for, but its prompt.

    Attributes:
        model: None: the base model.
        max_tokens: None: the server's default, or what fits.
        seed: None: another one each time.
        logprobs: how many alternatives of each token to report; None: no log-probabilities.
        schema: JSON schema of the answer; None: any text.
        length_penalty, no_repeat_ngram_size: None: the engine's default.
        ignored: names of fields that are not known.
    """

    model: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    n: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    schema: Mapping[str, Any] | None
    num_beams: int
    length_penalty: float | None
    no_repeat_ngram_size: int | None
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class CompletionFields(Fields):
    """`Fields` of /v1/completions.

    Attributes:
        prompts: texts, or lists of token ids.
        echo: whether the answer begins with the prompt.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool


@dataclass(frozen=True)
class ChatFields(Fields):
    """`Fields` of /v1/chat/completions.

    Attributes:
        messages: as they came; see `jlora.serving.messages`.
        tools: JSON schemas of functions, or none.
        tool_choice: "none", "auto", "required", or the name of a function in a tuple of one.
        template_arguments: variables of the chat template.
    """

    messages: Any
    tools: tuple[Mapping[str, Any], ...]
    tool_choice: str | tuple[str]
    parallel_tool_calls: bool
    template_arguments: Mapping[str, Any]


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
        if type(value) is int and abs(value) > 2**63:  # no float may hold it
            raise wrong(name, value, "a number of that size")
        if not least <= value <= most or not math.isfinite(value):
            raise ApiError(f"{name} is {value}, but must be {_range(least, most)}", param=name)
        return float(value)

    def whole(self, name: str, default: Any, least: int, most: int = SEEDS) -> Any:
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

    def rest(self) -> tuple[str, ...]:
        """Names of fields that nobody took.

        Raises:
            ApiError: one of them is of `REFUSED`.
        """
        for name, (harmless, reason) in REFUSED.items():
            if name in self._left and self._left[name] not in harmless:
                raise ApiError(f"{name} can't be honoured: {reason}", param=name)
        return tuple(name for name in self._left if name not in REFUSED and name not in SILENT)


def wrong(name: str, value: Any, expected: str) -> ApiError:
    shown = kind_of(value) if isinstance(value, (dict, list, str, bool)) else shorten(repr(value))
    return ApiError(f"{name} is {shown}, but must be {expected}", param=name)


def _range(least: float, most: float) -> str:
    if most in (math.inf, SEEDS):
        return f"at least {least}"
    return f"from {least} to {most}"


def completion_fields(values: Mapping[str, Any]) -> CompletionFields:
    """The fields of /v1/completions.

    Raises:
        ApiError: one is wrong, or cannot be honoured.
    """
    body = Body(values)
    prompts = _prompts(body.take("prompt"))
    echo = body.flag("echo", False)
    logprobs = body.take("logprobs")
    top = body.whole("top_logprobs", 0, -1, MOST_ALTERNATIVES)
    if isinstance(logprobs, bool):  # as in mlx_lm.server
        logprobs = max(top, 0) if logprobs else None
    elif logprobs is not None:
        logprobs = Body({"logprobs": logprobs}).whole("logprobs", None, 0, MOST_ALTERNATIVES)
    return CompletionFields(
        **_shared(body, logprobs, 0), ignored=body.rest(), prompts=prompts, echo=echo
    )


def chat_fields(values: Mapping[str, Any]) -> ChatFields:
    """The fields of /v1/chat/completions.

    Raises:
        ApiError: as `completion_fields`.
    """
    body = Body(values)
    messages = body.take("messages")
    asked = body.flag("logprobs", False)
    top = max(body.whole("top_logprobs", 0, -1, MOST_ALTERNATIVES), 0)
    if top and not asked:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    tools = _tools(body.take("tools", []))
    choice = _tool_choice(body.take("tool_choice"), tools)
    parallel = body.flag("parallel_tool_calls", True)
    arguments = body.object("chat_template_kwargs") or {}
    for name in ("messages", "tools", "add_generation_prompt", "documents"):
        if name in arguments:
            raise ApiError(
                f"chat_template_kwargs.{name} is set by the request itself",
                param="chat_template_kwargs",
            )
    shared = _shared(body, top if asked else None, 1)
    return ChatFields(
        **shared, ignored=body.rest(), messages=messages, tools=tools, tool_choice=choice,
        parallel_tool_calls=parallel, template_arguments=arguments,
    )  # fmt: skip


def _shared(body: Body, logprobs: int | None, least_tokens: int) -> dict[str, Any]:
    """The fields that both routes have."""
    stream = body.flag("stream", False)
    options = body.object("stream_options")
    if options is not None and not stream:
        raise ApiError("stream_options is for stream: true", param="stream_options")
    limits = [
        body.whole(name, None, least_tokens) for name in ("max_completion_tokens", "max_tokens")
    ]
    found = {
        "model": body.text("model"),
        "stream": stream,
        "include_usage": Body(options or {}).flag("include_usage", False),
        "max_tokens": limits[1] if limits[0] is None else limits[0],
        "temperature": body.number("temperature", 0.0, 0, 100),
        "top_p": body.number("top_p", 1.0, 0, 1),
        "top_k": body.whole("top_k", 0, -1),
        "min_p": body.number("min_p", 0.0, 0, 1),
        "repetition_penalty": body.number("repetition_penalty", 0.0, 0, 100) or 1.0,
        "presence_penalty": body.number("presence_penalty", 0.0, -2, 2),
        "frequency_penalty": body.number("frequency_penalty", 0.0, -2, 2),
        "logit_bias": _logit_bias(body.object("logit_bias") or {}),
        "n": body.whole("n", 1, 1, MOST_ANSWERS),
        "seed": _seed(body.take("seed")),
        "stop": _stops(body.take("stop", [])),
        "logprobs": logprobs,
        "schema": _schema(body.object("response_format")),
        "num_beams": body.whole("num_beams", 1, 1, 64),
        "length_penalty": body.number("length_penalty", None, -10, 10),
        "no_repeat_ngram_size": body.whole("no_repeat_ngram_size", None, 0),
    }
    # The likeliest token alone is left; a smaller temperature would overflow.
    if found["top_p"] == 0 or found["temperature"] < 1e-4:
        found.update(top_p=1.0, temperature=0.0)
    if found["repetition_penalty"] < 0.01:
        raise ApiError(
            "repetition_penalty must be 0 or from 0.01 to 100", param="repetition_penalty"
        )
    found["top_k"] = max(found["top_k"], 0)  # -1 is vLLM's for all
    if found["num_beams"] > 1:
        _check_beams(found)
    return found


def _check_beams(found: Mapping[str, Any]) -> None:
    for name, idle in (("n", 1), ("temperature", 0), ("stop", ()), ("logprobs", None)):
        if found[name] != idle:
            raise ApiError(
                f"{name} can't be honoured with num_beams {found['num_beams']}; leave one out",
                param=name,
            )
    if found["schema"] is not None:
        raise ApiError(
            f"response_format can't be honoured with num_beams {found['num_beams']}; leave one out",
            param="response_format",
        )


def _seed(value: Any) -> int | None:
    """OpenAI's seeds are 64-bit numbers with a sign, ours have none."""
    if value is None:
        return None
    if type(value) is not int or not -SEEDS <= value < SEEDS:
        raise wrong("seed", value, "a whole number of 64 bits")
    return value % SEEDS


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A text, several, token ids, or several lists of those."""
    if value is None:
        raise ApiError("prompt is missing", param="prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return (tuple(value),)
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if all(isinstance(each, list) for each in value) and all(
            type(token) is int for each in value for token in each
        ):
            return tuple(map(tuple, value))
    raise ApiError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of those",
        param="prompt",
    )


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(stop, str) for stop in found):
        raise ApiError("stop must be a text or a list of texts", param="stop")
    if not all(found):
        raise ApiError("stop holds an empty text, which is everywhere", param="stop")
    if len(found) > MOST_STOPS:
        raise ApiError(
            f"stop has {len(found)} texts, and at most {MOST_STOPS} may be", param="stop"
        )
    return tuple(found)


def _logit_bias(values: Mapping[str, Any]) -> dict[int, float]:
    found = {}
    for key, value in values.items():
        if not re.fullmatch("[0-9]{1,9}", key):
            raise ApiError(f"logit_bias: {shorten(repr(key))} is no token id", param="logit_bias")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise ApiError(
                f"logit_bias of {key} must be a number from -100 to 100", param="logit_bias"
            )
        found[int(key)] = float(value)
    return found


def _schema(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that ``response_format`` means."""
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            "response_format.type must be text, json_object or json_schema",
            param="response_format",
        )
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(
            "response_format.json_schema.schema must be an object, a JSON schema",
            param="response_format",
        )
    return schema


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise wrong("tools", value, "a list")
    names = []
    for number, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise ApiError(
                f'tools[{number}] must be {{"type": "function", "function": {{"name": ...}}}}',
                param="tools",
            )
        name, parameters = function.get("name"), function.get("parameters", {})
        if not isinstance(name, str) or not name:
            raise ApiError(f"tools[{number}].function.name must be a text", param="tools")
        if parameters is not None and not isinstance(parameters, dict):
            raise ApiError(
                f"tools[{number}].function.parameters must be an object, a JSON schema",
                param="tools",
            )
        names.append(name)
    if len(set(names)) < len(names):
        raise ApiError("tools has two functions of one name", param="tools")
    return tuple(value)


def _tool_choice(value: Any, tools: tuple[Mapping[str, Any], ...]) -> str | tuple[str]:
    if value is None:
        return "auto" if tools else "none"
    if value in ("none", "auto"):
        return value if tools else "none"
    if value != "required":
        function = value.get("function") if isinstance(value, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise ApiError(
                'tool_choice must be none, auto, required or {"type": "function", "function": '
                '{"name": ...}}',
                param="tool_choice",
            )
        known = [tool["function"]["name"] for tool in tools]
        if name not in known:
            raise ApiError(
                f"tool_choice names {shorten(repr(name))}, and tools has "
                f"{shorten(', '.join(known), 200) or 'none'}",
                param="tool_choice",
            )
        return (name,)
    if not tools:
        raise ApiError("tool_choice required needs tools", param="tool_choice")
    return value
