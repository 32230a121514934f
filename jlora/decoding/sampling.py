"""Greedy decoding and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jlora.decoding.decoder import check_finite, check_prompts, decoder_of
from jlora.decoding.hypothesis import Hypothesis
from jlora.decoding.text_stream import pieces
from jlora.kernels.topk import Draw
from jlora.system.settings import check_setting


@dataclass(frozen=True)
class GenerateConfig:
    """How to choose the next token.

    Args:
        eos_token_ids: tokens that end a text.
        max_new_tokens: a text has no more tokens, the end token included.
        temperature: 0 takes the likeliest token (greedy); above 0 draws one, the more freely the
            higher.
        top_k: draw among this many likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: draw among tokens that are at least this many times as likely as the likeliest
            (arXiv 2407.01082); 0 among all. As in transformers temperature is applied first.
        repetition_penalty: above 1 makes tokens of prompt and text less likely to come again.
        stops: texts that end an answer, which they are not part of; tokens may go on behind them.
        seed: with the number of the prompt it alone decides the draws, whatever the batch.
        batch_size: prompts decoded together.

    Raises:
        UserError: a setting is out of its range.
    """

    eos_token_ids: tuple[int, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stops: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0),
                            ("batch_size", 1)):  # fmt: skip
            check_setting(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        check_setting(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        check_setting(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        check_setting(all(self.stops), "stops", list(self.stops), "texts of a character or more")
        penalty = self.repetition_penalty
        check_setting(penalty > 0, "repetition_penalty", penalty, "above 0")


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[Hypothesis]:
    """One text for each prompt, in the order given.

    Args:
        model: a language model of `jlora.models` with its dropout off.
        prompts: token ids.
        config: how to choose.
        progress: called with (prompts done, prompts) now and then.

    Raises:
        UserError: a prompt does not fit the model, or the model gives NaN.
    """
    found: dict[int, list[Hypothesis]] = {}
    for index, hypotheses in sample(model, prompts, config, range(len(prompts))):
        found[index] = hypotheses
        if progress is not None and (
            len(found) % config.batch_size == 0 or len(found) == len(prompts)
        ):
            progress(len(found), len(prompts))
    return [found[index][0] for index in range(len(prompts))]


def sample(
    model, prompts: Sequence[Sequence[int]], config: GenerateConfig, numbers: Sequence[int]
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Decode prompts; yields the place of each and its one hypothesis, batch by batch.

    Args:
        numbers: what the draws of each prompt are decided by, with the seed: its number among all
            prompts, whichever of them are given here.

    Raises:
        UserError: as `generate`.
    """
    check_prompts(model, prompts, config.max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), config.batch_size):
        batch = by_length[start : start + config.batch_size]
        ids: dict[int, list[int]] = {index: [] for index in batch}
        logprobs = dict.fromkeys(batch, 0.0)
        for index, token, logprob in _tokens(model, prompts, batch, config, numbers):
            ids[index].append(token)
            logprobs[index] += logprob
        for index in batch:
            tokens = ids[index]
            finished = tokens[-1] in config.eos_token_ids
            yield index, [Hypothesis(tokens, logprobs[index], len(tokens), finished)]


def stream(model, tokenizer, prompt: Sequence[int], config: GenerateConfig) -> Iterator[str]:
    """Yield the text of one prompt piece by piece, as soon as its characters are complete.

    Raises:
        UserError: as `generate`.
    """
    check_prompts(model, [prompt], config.max_new_tokens)
    tokens = (token for _, token, _ in _tokens(model, [prompt], [0], config, [0]))
    yield from pieces(tokens, tokenizer, config.eos_token_ids, config.stops)


def _tokens(
    model,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    config: GenerateConfig,
    numbers: Sequence[int],
) -> Iterator[tuple[int, int, float]]:
    """Decode ``prompts[i] for i in batch`` together; see `next_tokens`."""
    decoder = decoder_of(model)
    decoder.enter([prompts[index] for index in batch])
    return next_tokens(decoder, model, prompts, batch, config, numbers)


def next_tokens(
    decoder,
    model,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    config: GenerateConfig,
    numbers: Sequence[int],
) -> Iterator[tuple[int, int, float]]:
    """Go on with ``prompts[i] for i in batch``, the decoder's rows.

    Yields (i, token, log-probability). The decoder reads a token when the one after it is asked
    for. The log-probability is the model's own, the repetition penalty counted in, temperature not.
    """
    batch = list(batch)
    random = {index: np.random.default_rng([config.seed, numbers[index]]) for index in batch}
    chances = config.top_k, config.top_p, config.min_p
    texts = {index: list(prompts[index]) for index in batch}
    for step in range(config.max_new_tokens):
        rows = [texts[index] for index in batch] if config.repetition_penalty != 1 else None
        draws: list[Draw] | None = None
        if config.temperature > 0:
            draws = [Draw(config.temperature, random[i].random(), *chances) for i in batch]
        values, ids = decoder.best(
            1, penalised=rows, penalty=config.repetition_penalty, draws=draws
        )
        check_finite(values)
        chosen = ids[:, 0].tolist()  # drawn, or the likeliest
        for row, index in enumerate(batch):
            texts[index].append(chosen[row])
            yield index, chosen[row], float(values[row, 0])
        live = [row for row, token in enumerate(chosen) if token not in config.eos_token_ids]
        if not live or step + 1 == config.max_new_tokens:
            return  # nothing follows the last token, for which there may be no position
        decoder.advance(np.array(live), np.array([chosen[row] for row in live]))
        batch = [batch[row] for row in live]
