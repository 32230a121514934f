"""Beam search with the rules of microsoft/LoRA (examples/NLG/src/gpt2_beam.py).

A prompt's beams all start equal, so the first step extends one of them. Each step every live beam
proposes its tokens, the ``num_beams`` best of all proposals (by summed log-probability) become the
beams, and a beam that ends is noted and dropped; the live ones fill the places again in the next
step. It goes on for ``max_new_tokens`` steps, after which the beams still alive compete too. Three
rules forbid tokens before the softmax, so that the others share their probability: no end token in
the first ``min_length`` places, no n-gram of generated tokens twice, and the repetition penalty
weakens generated tokens. The length penalty only ranks what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jlora.decoding import Decoder, Hypothesis, check_finite, check_prompts, check_setting
from jlora.kernels.topk import LARGEST_K, log_softmax_topk


@dataclass(frozen=True)
class BeamConfig:
    """How to search.

    Args:
        eos_token_ids: tokens that end a text.
        num_beams: beams a prompt.
        length_penalty: results are ranked by logprob / length ** length_penalty. Above 0 longer
            texts gain.
        no_repeat_ngram_size: n-grams of this size are not generated twice; 0 allows all.
        max_new_tokens: steps; a text has no more tokens, the end token included.
        min_length: tokens before the end token may come.
        repetition_penalty: above 1 makes generated tokens less likely to come again.
        batch_size: prompts decoded together.
        rank_up_to: None runs every step, as the reference does, and keeps whatever ends. A number
            (not below ``length_penalty``) takes a prompt out of the batch as soon as none of its
            live beams can become its best result under any length penalty up to that number:
            the best result stays the same, many steps are saved, and some lesser ones are missing.

    Raises:
        UserError: a setting is out of its range.
    """

    eos_token_ids: tuple[int, ...]
    num_beams: int = 10
    length_penalty: float = 0.8
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64
    min_length: int = 0
    repetition_penalty: float = 1.0
    batch_size: int = 16
    rank_up_to: float | None = None

    def __post_init__(self):
        beams, limit = self.num_beams, self.rank_up_to
        check_setting(1 <= beams <= LARGEST_K, "num_beams", beams, f"from 1 to {LARGEST_K}")
        for name, least in (("no_repeat_ngram_size", 0), ("max_new_tokens", 1), ("min_length", 0),
                            ("batch_size", 1)):  # fmt: skip
            check_setting(getattr(self, name) >= least, name, getattr(self, name), f">= {least}")
        penalty = self.repetition_penalty
        check_setting(penalty > 0, "repetition_penalty", penalty, "above 0")
        if limit is not None:
            least = max(self.length_penalty, 0)
            check_setting(limit >= least, "rank_up_to", limit, f">= {least}")


def beam_search(
    model,
    prompts: Sequence[Sequence[int]],
    config: BeamConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decode prompts, equal ones once, in batches of similar length.

    Args:
        model: a language model of `jlora.models` with its dropout off.
        prompts: token ids.
        config: how to search.
        progress: called with (distinct prompts done, distinct prompts) now and then.

    Returns:
        For each prompt, in the order given, all finished hypotheses and those alive at the end,
        best first by ``config.length_penalty``; `rank` orders them for another one.

    Raises:
        UserError: a prompt does not fit the model, or the model gives NaN.
    """
    check_prompts(model, prompts, config.max_new_tokens)
    distinct = sorted({tuple(prompt) for prompt in prompts}, key=lambda ids: (len(ids), ids))
    found: dict[tuple[int, ...], list[Hypothesis]] = {}
    for start in range(0, len(distinct), config.batch_size):
        batch = distinct[start : start + config.batch_size]
        for prompt, hypotheses in zip(batch, _search(model, batch, config)):
            found[prompt] = rank(hypotheses, config.length_penalty)
        if progress is not None:
            progress(len(found), len(distinct))
    return [found[tuple(prompt)] for prompt in prompts]


def rank(hypotheses: Iterable[Hypothesis], length_penalty: float) -> list[Hypothesis]:
    """Order hypotheses, best first.

    Of equal scores the one that the search found first wins: the shorter, then the finished, then
    the likelier.
    """
    return sorted(
        hypotheses,
        key=lambda h: (-h.score(length_penalty), h.length, not h.finished, -h.logprob),
    )


def _search(model, prompts: Sequence[Sequence[int]], config: BeamConfig) -> list[list[Hypothesis]]:
    """Decode prompts together; per prompt the hypotheses in the order found.

    The rows of the batch are the live beams of all prompts: rows of one prompt stand together,
    likeliest first, and their number changes from step to step.
    """
    found: list[list[Hypothesis]] = [[] for _ in prompts]
    decoder = Decoder(model, prompts)
    owner = np.arange(len(prompts))  # (R,) the prompt of each row
    history = np.zeros((len(prompts), 0), dtype=np.int32)  # (R, t) generated tokens
    scores = np.zeros(len(prompts), dtype=np.float32)  # (R,) summed log-probabilities
    for step in range(config.max_new_tokens):
        values, ids = log_softmax_topk(
            decoder.logits,
            config.num_beams,
            banned=_banned(history, config),
            penalised=history if config.repetition_penalty != 1 else None,
            penalty=config.repetition_penalty,
        )  # (R, k) each
        check_finite(values)
        rows, columns = _best(owner, scores[:, None] + values, config.num_beams)
        scores, tokens = scores[rows] + values[rows, columns], ids[rows, columns]
        owner = owner[rows]
        history = np.concatenate([history[rows], tokens[:, None]], axis=1)

        ended = np.isin(tokens, config.eos_token_ids)
        last = step + 1 == config.max_new_tokens
        # Live beams compete only after the last step, and after those that ended in it.
        for row in np.concatenate([np.flatnonzero(ended), np.flatnonzero(~ended & last)]):
            found[owner[row]].append(
                Hypothesis(history[row].tolist(), float(scores[row]), step + 1, bool(ended[row]))
            )
        live = ~ended
        if config.rank_up_to is not None:
            live &= ~_decided(owner, scores, live, found, config)
        if last or not live.any():
            break
        decoder.keep(rows[live])
        decoder.step(tokens[live])
        owner, history, scores = owner[live], history[live], scores[live]
    return found


def _best(owner: np.ndarray, totals: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` best candidates of each prompt, impossible ones (-inf) left out.

    Args:
        owner: (R,) prompt of each row, ascending.
        totals: (R, k) score of each candidate.

    Returns:
        Their rows and columns: prompts in order, best first, earlier ones first where equal.
    """
    owners = np.repeat(owner, totals.shape[1])
    order = np.lexsort((-totals.ravel(), owners))  # a stable sort
    owners = owners[order]
    place = np.arange(len(order)) - np.searchsorted(owners, owners)  # 0 for a prompt's best
    order = order[(place < count) & (totals.ravel()[order] > -np.inf)]
    return np.divmod(order, totals.shape[1])


def _banned(history: np.ndarray, config: BeamConfig) -> np.ndarray:
    """Forbidden next tokens of each row, (R, any) int32 filled up with -1.

    A token is banned when the last n - 1 tokens of a row stood before it earlier in the row.
    """
    rows, length = history.shape
    n = config.no_repeat_ngram_size
    banned = []
    if 0 < n <= length:
        repeated = np.ones((rows, length - n + 1), dtype=bool)  # which n-grams begin as the end
        for offset in range(n - 1):
            earlier = history[:, offset : offset + length - n + 1]
            repeated &= earlier == history[:, length - n + 1 + offset, None]
        banned.append(np.where(repeated, history[:, n - 1 :], -1))
    if length < config.min_length and config.eos_token_ids:
        banned.append(np.tile(np.array(config.eos_token_ids, dtype=np.int32), (rows, 1)))
    return np.concatenate(banned, axis=1) if banned else np.full((rows, 1), -1, dtype=np.int32)


def _decided(
    owner: np.ndarray,
    scores: np.ndarray,
    live: np.ndarray,
    found: list[list[Hypothesis]],
    config: BeamConfig,
) -> np.ndarray:
    """Rows (R,) of prompts whose live beams can no longer become the best.

    A live beam's sum of log-probabilities only falls, and a penalty p >= 0 divides it at most by
    max_new_tokens ** p. So a found one with ``logprob / length ** p`` above that bound stays ahead;
    where this holds for the largest p it holds for every smaller one, as the found one is shorter.
    """
    decided = np.zeros(len(owner), dtype=bool)
    for prompt in np.unique(owner[live]):
        rows = owner == prompt
        best_live = float(scores[rows & live].max())
        decided[rows] = any(
            h.logprob * (config.max_new_tokens / h.length) ** config.rank_up_to
            > best_live * (1 - 1e-6)  # room for rounding
            for h in found[prompt]
        )
    return decided
