"""Beam search by CTranslate2, from the folder that its converter wrote."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.prompts import Prompts


def make(spec: dict):
    """One round decodes the next prompts; it sorts them by length and divides them in batches."""
    import ctranslate2

    generator = ctranslate2.Generator(
        spec["model"], device="cpu", compute_type=spec["compute_type"],
        inter_threads=spec["at_once"], intra_threads=spec["threads"] // spec["at_once"],
    )  # fmt: skip
    words = json.loads((Path(spec["model"]) / "vocabulary.json").read_text())
    prompts = Prompts(spec)

    def work():
        batch = prompts.next(spec["inputs"])
        found = generator.generate_batch(
            [[words[token] for token in prompt] for prompt in batch.values()],
            max_batch_size=spec["batch_size"], beam_size=spec["beams"], length_penalty=0.8,
            no_repeat_ngram_size=spec["no_repeat_ngram"], max_length=spec["new_tokens"],
            end_token=spec["ends"], include_prompt_in_result=False,
        )  # fmt: skip
        said = prompts.said(batch, [each.sequences_ids[0] for each in found])
        return {**said, "computes in": generator.compute_type}

    return work
