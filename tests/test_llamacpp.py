"""Exported files in llama.cpp, where `make llamacpp` has installed it."""

from __future__ import annotations

import subprocess

import pytest

from parity import llamacpp


@pytest.mark.slow
@pytest.mark.skipif(not llamacpp.LLAMACPP.exists(), reason="no .venv-llamacpp (make llamacpp)")
@pytest.mark.parametrize("name", ["gpt2", "llama, llama3 rope", "qwen3", "gemma3", "phi3"])
def test_llama_cpp_continues_a_text_by_the_same_tokens(name):
    try:
        line = llamacpp.compare(name, seed=2)
    except subprocess.CalledProcessError:
        pytest.skip("GPT-2's vocabulary cannot be downloaded")
    assert line.passed, line
    assert line.compared > 40
