"""The probability of each next token in sampling."""

from __future__ import annotations

import numpy as np

DRAWS = 40  # bisection steps that find the end of one token's interval in [0, 1)


def reference_chances(model, prompts: list[list[int]], warp: dict) -> dict[str, np.ndarray]:
    """By transformers' logits processors, in the order in which `generate` applies them."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=True, **{"top_k": 0, **warp})
    chances = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        config._eos_token_tensor = None
        processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt))
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        chances.append(processors(ids, logits).softmax(-1)[0].numpy())
    return {"chances": np.array(chances)}


def our_chances(model, prompts: list[list[int]], warp: dict) -> dict[str, np.ndarray]:
    """By sampling: `jlora.decoding.sampling` maps a random number of [0, 1) to a token.

    Bisection finds the interval of each token; the numbers replace those of the random generator.
    """
    from unittest.mock import patch

    from jlora.decoding import sampling as module

    chances = np.zeros((len(prompts), model.config.vocab_size))
    config = module.GenerateConfig(
        (), max_new_tokens=1, batch_size=5, **{"temperature": 1.0, **warp}
    )
    draw = module.draw
    shares = []  # of the prompts in the order in which `generate` takes them

    def measure(logprobs, settings, u, unseen=0):
        if unseen:
            return None  # undecided: all tokens are sorted
        shares.append(_shares(lambda u: draw(logprobs, settings, u), len(logprobs)))
        return 0

    with patch.object(module, "draw", measure):
        module.generate(model, prompts, config)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for place in range(warp.get("top_k") or model.config.vocab_size):

        def take(logprobs, settings, u, unseen=0, place=place):
            return None if unseen else place

        with patch.object(module, "draw", take):
            tokens = [h.ids[0] for h in module.generate(model, prompts, config)]
        for share, index in zip(shares, order):
            chances[index, tokens[index]] = share[place]
    return {"chances": chances}


def _shares(draw, count: int) -> np.ndarray:
    """The width of the interval of [0, 1) for each token."""
    ends = np.zeros(count)
    for place in range(count):
        low, high = 0.0, 1.0
        if draw(np.nextafter(1.0, 0.0)) <= place:
            low = 1.0
        for _ in range(DRAWS if low < high else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if draw(middle) <= place else (low, middle)
        ends[place] = low
    return np.diff(ends, prepend=0.0)
