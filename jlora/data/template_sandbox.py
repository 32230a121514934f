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
from string import Formatter
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
#: A width or precision of ``%`` that is very large, or an argument.
WIDE_FIELD = re.compile(r"%(\([^)]{0,99}\))?[-+ #0]*(\d*\.)?(\d{5,}|\*)")
WIDE_SPEC = re.compile(r"\d{5,}")
#: Functions and filters that make a text or list as long as a number says.
PADDING = frozenset(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice"))
MOST_INDENT = 16  # of JSON
SIZED = (str, list, tuple, dict)
#: Filters that hand on what is in a list and write none of it; all others may make a text of it.
STRUCTURAL = frozenset(
    ("length", "count", "first", "last", "list", "map", "select", "reject", "selectattr")
    + ("rejectattr", "sort", "reverse", "items", "dictsort", "groupby", "batch", "slice")
    + ("unique", "min", "max", "default", "d", "random", "attr", "int", "float", "round", "abs")
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

    def measure(self, value: str | list | tuple | dict) -> None:
        """Check the length of what a value is written out as: lists may hold one thing often."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            total += 1 + len(item)
            self.allow(total)
            if isinstance(item, dict):
                item = [*item, *item.values()]
            if not isinstance(item, str):
                stack += [each for each in item if isinstance(each, SIZED)]
                self.spend(len(item))


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
        self.filters.update(_counted=_Counted, _concatenated=_concatenate, _measured=_measured)
        del self.filters["urlize"]  # slow expressions, for HTML
        del self.globals["lipsum"]  # random text of any length
        self.finalize = _measured
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
            _measured(right)
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    """Has loops, ``~`` and lists, for which jinja2 has no hook, go through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concatenated")

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(node, "_measured")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filter(node, "_measured")


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


def _measured(value: Any) -> Any:
    if isinstance(value, SIZED):
        _budget.get().measure(value)
    return value


def _concatenate(pieces: Iterable[Any]) -> str:
    allowed, total, texts = _budget.get(), 0, []
    for piece in pieces:
        texts.append(str(_measured(piece)))
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
        if name not in STRUCTURAL:
            for value in (*args, *keywords.values()):
                _measured(value)
        result = function(*args, **keywords)
        if isinstance(result, (str, list)):
            allowed.allow(len(result))
        return result

    return checked


def _check_arguments(name: str, function: Any, args: Any, keywords: Any) -> None:
    """Refuse arguments by which a function of Python's would fill the memory at once."""
    allowed = _budget.get()
    # The sandbox wraps str.format.
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    values = [*([owner] if isinstance(owner, str) else []), *args, *keywords.values()]
    texts = [value for value in values if isinstance(value, str)]
    numbers = [abs(value) for value in values if isinstance(value, int)]
    longest = len(max(texts, key=len, default=""))
    if name in PADDING:
        allowed.allow(max(numbers, default=0))
    elif name in ("expandtabs", "indent") and texts:
        # A number or a text is put before lines, or in the place of tabs.
        width = max([*numbers, *(len(text) for text in texts[1:])], default=0)
        allowed.allow((texts[0].count("\t") + texts[0].count("\n") + 1) * width)
    elif name == "wordwrap" and len(texts) > 1:
        allowed.allow(len(texts[0]) * len(texts[1]))
    elif name == "replace" and len(texts) == 3:
        found = len(texts[0]) // max(1, len(texts[1])) + 1
        allowed.allow(len(texts[0]) + found * len(texts[2]))
    elif name == "translate":
        raise jinja2.TemplateError("it calls translate, which chat templates may not")
    elif name == "tojson" and max(numbers, default=0) > MOST_INDENT:
        raise jinja2.TemplateError(f"it writes JSON with an indent above {MOST_INDENT}")
    elif name == "sum":
        allowed.measure([value for value in values if isinstance(value, (list, tuple))])
    elif name == "join":
        for items in values:
            if hasattr(items, "__len__") and not isinstance(items, str):
                allowed.measure(items if isinstance(items, (list, tuple)) else list(items))
                allowed.allow(longest * len(items))
    elif name in ("format", "format_map"):
        for value in values:
            _measured(value)
        if owner is None and texts:  # the filter is `%`
            _check_widths(texts[0])
        elif texts:
            specs = [spec for _, _, spec, _ in Formatter().parse(texts[0]) if spec]
            # A width in braces is an argument.
            wide = [*specs, *map(str, values[1:])] if any("{" in spec for spec in specs) else specs
            if any(WIDE_SPEC.search(spec) for spec in wide):
                raise _too_wide(texts[0])


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
        raise _too_wide(text)


def _too_wide(text: str) -> jinja2.TemplateError:
    return jinja2.TemplateError(f"it formats to a width that is too large ({text[:40]!r})")


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

    def __repr__(self) -> str:
        return "<Namespace>"  # its values may be namespaces that hold one another


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
