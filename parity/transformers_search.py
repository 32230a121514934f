"""transformers' own decoding, and a check that `parity.search` implements its rules."""

from __future__ import annotations

import numpy as np

from parity.search import TRANSFORMERS, ranked, search


def generate_beams(
    model, prompt: list[int], settings: dict, renormalise: bool, length_penalty: float = 1.0
):
    """All beams of ``transformers.generate``, best first, as (ids, sum of log-probabilities).

    With one beam, which is greedy search, also the margin of the closest decision.
    """
    import torch

    beams, ends = settings["num_beams"], settings["eos_token_ids"]
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=settings["max_new_tokens"],
        min_new_tokens=settings["min_length"],
        no_repeat_ngram_size=settings["no_repeat_ngram_size"],
        repetition_penalty=settings["repetition_penalty"],
        eos_token_id=ends or None,
        pad_token_id=0,
        length_penalty=length_penalty,
        early_stopping="never" if beams > 1 else False,
        renormalize_logits=renormalise,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = [until_end(ids, ends) for ids in output.sequences[:, len(prompt) :].tolist()]
    if beams > 1:
        scores = output.sequences_scores.tolist()
        sums = [score * len(ids) ** length_penalty for ids, score in zip(texts, scores)]
        return list(zip(texts, sums)), float("inf")
    (ids,) = texts
    steps = torch.cat(output.scores)[: len(ids)].log_softmax(-1)  # (T, V)
    best = steps.topk(2).values
    return [(ids, float(best[:, 0].sum()))], float((best[:, 0] - best[:, 1]).min())


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids without the padding after the end token."""
    length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def check_search(model, prompt: list[int], settings: dict, closest: float) -> None:
    """Check that `search` with transformers' rules finds transformers' beams in the same order.

    Raises:
        AssertionError: it does not, although no decision was closer than ``closest``.
    """
    found, margin = search(model, prompt, settings, TRANSFORMERS)
    for penalty in (0.0, 0.8):
        order, gap = ranked(found, penalty)
        if min(gap, margin) < closest:
            continue
        theirs, _ = generate_beams(model, prompt, settings, False, penalty)
        plain = order[: settings["num_beams"]]
        assert [ids for ids, _ in plain] == [ids for ids, _ in theirs], (prompt, plain, theirs)
        np.testing.assert_allclose([s for _, s in plain], [s for _, s in theirs], rtol=1e-4)
