"""Conditions of the machine for some of the tests."""

from __future__ import annotations

import pytest

from jlora.kernels import native, packed_linear

needs_bf16 = pytest.mark.skipif(
    native.problem() is not None or not packed_linear.available("bf16"),
    reason="nothing multiplies bf16 on this machine: no AMX, and no oneDNN that could",
)
