"""Conditions of the machine for some of the tests.

They are asked when such a test begins: while tests are collected nobody should wait for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jlora.kernels import native, packed_linear


def needs(condition: Callable[[], bool], reason: str) -> pytest.MarkDecorator:
    """A mark: the test is skipped unless the condition holds; conftest.py asks."""
    return pytest.mark.needs(condition, reason)


def needs_products(kind: str) -> pytest.MarkDecorator:
    """A mark: skipped where nothing multiplies weights packed so."""
    return needs(
        lambda: native.problem() is None and packed_linear.available(kind),
        f"nothing multiplies {kind} on this machine",
    )


def needs_tiles(kind: str) -> pytest.MarkDecorator:
    """A mark: for what jlora's own products promise, as equal bits whatever the other rows are."""
    return needs(
        lambda: (
            native.problem() is None
            and packed_linear.available(kind)
            and packed_linear.tiles() is not None
        ),
        f"oneDNN, or nothing, multiplies {kind} here: its sums depend on the number of rows",
    )


needs_bf16 = needs_products("bf16")
needs_operators = needs(lambda: native.problem() is None, "no compiled operators here")
