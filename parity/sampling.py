"""The probability of each next token in sampling."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np

HALVINGS = 30  # of a piece of [0, 1) in which one token's interval ends


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

    A token has one interval of the numbers. Where both ends of a piece give the same token, all of
    it does; other pieces are halved. The numbers replace those of the random generator.
    """
    from jlora.decoding.sampling import GenerateConfig, generate

    config = GenerateConfig((), max_new_tokens=1, batch_size=64, **{"temperature": 1.0, **warp})

    def tokens_at(points: list[tuple[int, float]]) -> list[int]:
        """The token of each (prompt, number)."""

        class Numbers:
            def __init__(self, seed: list[int]):  # the config's, and the prompt's place
                self.random = lambda: points[seed[1]][1]

        with patch.object(np.random, "default_rng", Numbers):
            return [h.ids[0] for h in generate(model, [prompts[p] for p, _ in points], config)]

    chances = np.zeros((len(prompts), model.config.vocab_size))
    ends = (0.0, np.nextafter(1.0, 0.0))
    found = tokens_at([(p, u) for p in range(len(prompts)) for u in ends])
    pieces = [(p, *ends, *found[2 * p : 2 * p + 2]) for p in range(len(prompts))]
    for _ in range(HALVINGS):
        for p, low, high, first, last in pieces:
            chances[p, first] += (high - low) * (first == last)
        pieces = [piece for piece in pieces if piece[3] != piece[4]]
        if not pieces:
            break
        middles = [(p, (low + high) / 2) for p, low, high, *_ in pieces]
        pieces = [
            part
            for (p, low, high, first, last), (_, middle), token in zip(
                pieces, middles, tokens_at(middles)
            )
            for part in ((p, low, middle, first, token), (p, middle, high, token, last))
        ]
    return {"chances": chances}
