"""examples/lora_in_jittor.ipynb runs, and prints what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import run_notebook

PATH = Path(__file__).resolve().parents[1] / "examples" / "lora_in_jittor.ipynb"
LOSS = re.compile(r"loss [\d.]+ -> [\d.]+")


def test_it_prints_what_it_shows():
    shown = run_notebook.read(PATH)
    printed = run_notebook.run(shown)
    for cell, text in zip(run_notebook.code_cells(shown), printed):
        # Losses differ in the last digit from processor to processor.
        assert LOSS.sub("loss", text) == LOSS.sub("loss", run_notebook.stored(cell))
    together = "".join(printed)
    assert "with the adapter:    3 5 7 9 11 13 15 17 19" in together
    assert "without the adapter: 3 4 5 6 7 8 9 10 11" in together
    assert "base weights unchanged: True" in together


def test_the_layer_has_thirty_lines():
    layer = "".join(run_notebook.code_cells(run_notebook.read(PATH))[1]["source"])
    assert layer.startswith("class LoRALinear") and len(layer.splitlines()) <= 30
