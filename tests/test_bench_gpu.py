"""``make gpu-check`` as far as it goes without a card."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tiny_models import tiny_gpt2

from benchmarks import gpu, gpu_exact, gpu_speed
from jlora import UserError, engine
from jlora.decoding.decoder import decoder_of


def test_a_stage_that_hangs_does_not_hold_up_the_next():
    """Though a process that it has left behind holds its output."""
    said: list[str] = []
    left = "import os, time; os.setsid(); time.sleep(4)"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {left!r}]); "
        "print('found', flush=True); time.sleep(30)"
    )
    assert gpu.run_limited([sys.executable, "-c", code], 1.5, said.append) == (
        ", ended with its limit"
    )
    assert said == ["found\n"]


@pytest.mark.parametrize(("code", "ended"), [("", ""), ("import sys; sys.exit(3)", "with 3")])
def test_how_a_stage_ended_is_told(code: str, ended: str):
    said: list[str] = []
    assert ended in gpu.run_limited([sys.executable, "-c", f"print(1); {code}"], 20, said.append)
    assert said == ["1\n"]


def test_words_of_a_decoder_are_compared(monkeypatch):
    model = tiny_gpt2(vocab_size=24)
    engine.prepare(model, "fp32")
    model.eval()
    decoder = decoder_of(model)
    decoder.enter([[1, 2, 3], [4, 5]])
    assert gpu_exact.compare_words(model, decoder).count("100.0% the same") == 2
    best = decoder.best

    def wrong(*arguments, **named):
        values, ids = best(*arguments, **named)
        return values + 1, ids

    monkeypatch.setattr(decoder, "best", wrong)
    assert "FAILED" in gpu_exact.compare_words(model, decoder)


def test_stored_cases_run_where_there_is_no_fp32(monkeypatch):
    from parity.models import our_logits

    monkeypatch.setattr(engine, "on_gpu", lambda: True)
    model, arrays = tiny_gpt2(vocab_size=24), {"ids": np.arange(18).reshape(2, 9)}
    arrays["lengths"] = np.array([9, 7])
    with pytest.raises(UserError, match="fp32 is for CPUs"):
        our_logits(model, arrays)
    with gpu_exact.float32_is_plain():
        found = our_logits(model, arrays)
    np.testing.assert_array_equal(found["logits, fused"], found["logits"])


def test_a_step_is_timed_by_its_parts(capsys):
    config = {**GPT2, "n_embd": 32, "n_layer": 1, "n_head": 1}
    gpu_speed.step_times(config, "fp32", inputs=2, beams=3, steps=2)
    assert "a step of 6 rows: layers" in capsys.readouterr().out


GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 128}
