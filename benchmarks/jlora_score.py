"""What jlora in float32 thinks of texts that any side has found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def make(spec: dict):
    """The round computes, for every (prompt, text) in ``spec["texts"]``, the log-probability of the
    text divided by its length to the power of the length penalty."""
    from jlora import engine, load
    from jlora.system.runtime import jt

    model = load(spec["model"])
    engine.prepare(model, "fp32", keep_weights=False)
    model.eval()

    def score(prompt: list[int], text: list[int]) -> float:
        ids = np.array([prompt + text], np.int32)
        with jt.no_grad():
            logits = model(jt.array(ids)).numpy()[0, len(prompt) - 1 : -1].astype(np.float64)
        highest = logits.max(1)
        sums = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
        chosen = logits[np.arange(len(text)), text]
        return float((chosen - sums).sum() / len(text) ** spec["length_penalty"])

    def work():
        texts = json.loads(Path(spec["texts"]).read_text())
        return {"scores": [score(prompt, text) for prompt, text in texts]}

    return work
