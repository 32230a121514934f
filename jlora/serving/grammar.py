"""Answers of a given form, by llguidance: JSON of a schema, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np

from jlora.data.readers import shorten
from jlora.data.tokenizer import Tokenizer
from jlora.serving.errors import ApiError

#: White space between the parts of JSON: a small model could go on with it for ever.
OPTIONS = {"whitespace_pattern": r"[ \t\n\r]{1,20}"}
#: Around a call, in the templates of Hermes, Qwen, SmolLM and others.
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        vocabulary: of the model, which may have more rows than the tokenizer has tokens.

    Attributes:
        marks_are_special: whether the marks of a call are special tokens, which a decoder omits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int):
        self._vocabulary = vocabulary
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self.marks_are_special = any(
            token.special and token.content in (CALL_BEGIN, CALL_END) for token in added
        )
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.backend.to_str(),
            n_vocab=max(vocabulary, tokenizer.vocab_size),
            eos_token=tokenizer.eos_token_id or 0,
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of a special one its name."""
        return self._tokenizer.decode_bytes([token])

    def of_schema(self, schema: Mapping[str, Any], param: str) -> Grammar:
        """JSON of a schema.

        Args:
            param: the field that the schema came in.

        Raises:
            ApiError: the schema is wrong, or says something that cannot be enforced.
        """
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(dict(schema), overrides=OPTIONS)
        except (ValueError, RecursionError) as error:
            raise self._refused(param, error) from None
        return self._checked(text, param)

    def of_calls(self, tools: Sequence[Mapping[str, Any]], several: bool) -> Grammar:
        """Calls of these tools and nothing else.

        Raises:
            ApiError: as `of_schema`.
        """
        choices = []
        for tool in tools:
            function = tool["function"]
            properties = {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            }
            choices.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                }
            )
        schema = json.dumps({"anyOf": choices, "x-guidance": OPTIONS})
        begin, end = (
            mark if self.marks_are_special else json.dumps(mark) for mark in (CALL_BEGIN, CALL_END)
        )
        more = '("\\n" call)*' if several else ""
        lark = f'start: call {more}\ncall: {begin} "\\n" %json {schema} "\\n" {end}\n'
        return self._checked(llguidance.LLMatcher.grammar_from_lark(lark), "tools")

    def _checked(self, text: str, param: str) -> Grammar:
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise self._refused(param, matcher.get_error())
        return Grammar(matcher, self._vocabulary)

    def _refused(self, param: str, reason: Any) -> ApiError:
        reason = shorten(str(reason).replace("\n", " "), 300)
        return ApiError(f"{param} can't be honoured: {reason}", param=param, code="invalid_schema")


class Grammar:
    """A `jlora.decoding.requests.Constraint`; see there."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int):
        self._matcher, self._words = matcher, -(-vocabulary // 32)

    def copy(self) -> Grammar:
        """The same at its present state, for another answer."""
        found = object.__new__(Grammar)
        found._matcher, found._words = self._matcher.deep_copy(), self._words
        return found

    def mask(self) -> np.ndarray:
        if self._matcher.is_stopped():  # complete: the end token alone may come
            self._check()
            return np.zeros(self._words, np.int32)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return bits[: self._words]

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ApiError(
                "the answer's form can't be enforced any further: "
                + shorten(self._matcher.get_error().replace("\n", " "), 300),
                param="response_format",
                code="invalid_schema",
            )
