"""Chat templates come with downloaded models: rendered without trust, and always to an end.

The environment is the one that transformers gives them (`apply_chat_template`): jinja2's immutable
sandbox without a loader, so that no file can be named, ``trim_blocks`` and ``lstrip_blocks``,
``break`` and ``continue``, ``raise_exception``, ``strftime_now``, ``tojson`` that leaves HTML's
characters alone, and the ``generation`` tag. The sandbox alone does not keep a template from
running for ever or filling the memory; a budget of steps and characters does, which is counted
rather than timed, so that a template fails on every machine or on none.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

#: Passes through loops and calls in one rendering, and a number of them for each character given.
STEPS, STEPS_A_CHARACTER = 1_000_000, 10
#: Longest text or list that a rendering may make, and a number for each character given.
LENGTH, LENGTH_A_CHARACTER = 4_000_000, 20
NUMBER_BITS = 4096
WIDE_FIELD = re.compile(r"%[-+ #0(\w)]*?(\d{5,}|\*)|:[^{}]*\d{5,}[^{}]*\}")
#: Functions and filters that make a text as long as a number says.
SIZED = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice")
    + ("tojson", "to_bytes")
)


class Budget:
    """What one rendering may still use."""

    def __init__(self, characters: int):
        self.steps = STEPS + STEPS_A_CHARACTER * characters
        self.length = LENGTH + LENGTH_A_CHARACTER * characters

    def spend(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise jinja2.TemplateError("it does not come to an end")

    def allow(self, length: int) -> None:
        if length > self.length:
            raise jinja2.TemplateError(f"it makes a text of more than {self.length:,} characters")


_budget: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def budget(characters: int) -> Iterator[Budget]:
    """The budget of the renderings inside; ``characters``: the length of what they are given."""
    token = _budget.set(Budget(characters))
    try:
        yield _budget.get()
    finally:
        _budget.reset(token)


def compile_template(source: str) -> jinja2.Template:
    """A template, to be rendered within `budget`.

    Raises:
        jinja2.TemplateSyntaxError: it is not Jinja.
    """
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.filters["tojson"] = to_json
        self.filters = {name: _checked(name, each) for name, each in self.filters.items()}
        self.filters.update(_counted=_Counted, _concatenated=_concatenate)
        del self.globals["lipsum"]  # random text of any length
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now

    concat = staticmethod(lambda pieces: _concatenate(pieces))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def call(__self, __context: Any, __function: Any, *args: Any, **keywords: Any) -> Any:  # noqa: B902, N805
        __budget = _budget.get()
        __budget.spend()
        _check_arguments(getattr(__function, "__name__", ""), __function, args, keywords)
        result = super().call(__context, __function, *args, **keywords)
        if isinstance(result, (str, list)):
            __budget.allow(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, (str, list)) and isinstance(right, (str, list)):
            _budget.get().allow(len(left) + len(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    """Has loops and ``~``, for which jinja2 has no hook, go through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Counted:
    """What a loop goes through, with a step for each of its passes."""

    def __init__(self, items: Iterable[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        spend = _budget.get().spend
        for item in self._items:
            spend()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # TypeError for a generator, as `loop.length` expects


def _concatenate(pieces: Iterable[Any]) -> str:
    allowed, total, texts = _budget.get(), 0, []
    for piece in pieces:
        texts.append(str(piece))
        total += len(texts[-1])
        allowed.allow(total)
    return "".join(texts)


def _checked(name: str, function: Any) -> Any:
    """A filter that checks the numbers it is given, and the length of what it makes."""

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        allowed = _budget.get()
        allowed.spend()
        _check_arguments(name, function, args, keywords)
        result = function(*args, **keywords)
        if isinstance(result, (str, list)):
            allowed.allow(len(result))
        return result

    return checked


def _check_arguments(name: str, function: Any, args: Any, keywords: Any) -> None:
    """Refuse arguments by which a function of Python's would fill the memory at once."""
    # The sandbox wraps str.format.
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    values = [*([owner] if isinstance(owner, str) else []), *args, *keywords.values()]
    if name in SIZED:
        for value in values:
            if isinstance(value, int):
                _budget.get().allow(value)
    elif name == "replace":
        texts = [text for text in values if isinstance(text, str)]
        if len(texts) == 3:
            found = len(texts[0]) // max(1, len(texts[1])) + 1
            _budget.get().allow(len(texts[0]) + found * len(texts[2]))
    elif name == "join":
        between = max((len(text) for text in values if isinstance(text, str)), default=0)
        for items in values:
            if hasattr(items, "__len__") and not isinstance(items, str):
                _budget.get().allow(between * len(items))
    elif name in ("format", "format_map"):
        for value in values:
            if isinstance(value, str):
                _check_widths(value)
            elif isinstance(value, int) and "{" in str(values[0]).replace("{}", "", 1):
                _budget.get().allow(value)  # it may be a width


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return
    for text, times in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(times, int):
            _budget.get().allow(len(text) * times)


def _check_bits(bits: int) -> None:
    if bits > NUMBER_BITS:
        raise jinja2.TemplateError("it computes with numbers that are too large")


def _check_widths(text: str) -> None:
    if WIDE_FIELD.search(text):
        raise jinja2.TemplateError(f"it formats to a width that is too large ({text[:40]!r})")


class _Namespace(jinja2.utils.Namespace):
    """Without attributes that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **keywords: Any):
        values = dict(*args[1:], **keywords)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"it uses the name {name!r} in a namespace")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: a mark round what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TemplateRefusal(jinja2.TemplateError):
    """The template itself says that it cannot render this (`raise_exception`)."""


def raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter writes ``<`` as ``\\u003c``; templates want the text as it is."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
