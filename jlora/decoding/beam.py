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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jlora.decoding.decoder import check_finite, check_prompts, decoder_of
from jlora.decoding.hypothesis import Hypothesis
from jlora.kernels.topk import LARGEST_K
from jlora.system.settings import check_setting

ENTRIES = 4  # the batch is renewed in about this many parts


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
    batch_size: int = 32
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
            lowest = max(self.length_penalty, 0)
            check_setting(limit >= lowest, "rank_up_to", limit, f">= {lowest}")


def beam_search(
    model,
    prompts: Sequence[Sequence[int]],
    config: BeamConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Decode prompts, equal ones once.

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
    check_prompts(model, prompts, config.max_new_tokens)  # here too, for the numbers it names
    distinct = sorted({tuple(prompt) for prompt in prompts}, key=lambda ids: (len(ids), ids))
    found: dict[tuple[int, ...], list[Hypothesis]] = {}
    for index, hypotheses in search(model, distinct, config):
        found[distinct[index]] = hypotheses
        if progress is not None and (
            len(found) % config.batch_size == 0 or len(found) == len(distinct)
        ):
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


def search(
    model, prompts: Sequence[Sequence[int]], config: BeamConfig
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Decode prompts; yields the number of each and its hypotheses, best first, as it is done.

    ``config.batch_size`` prompts are decoded together. Where the decoder allows it, waiting ones
    take the places of those that are done; the first given enter first, so that prompts of like
    length should stand together.

    Raises:
        UserError: as `beam_search`.
    """
    check_prompts(model, prompts, config.max_new_tokens)
    decoder, pool = decoder_of(model), Pool(config)
    waiting = 0  # the first prompt that has not entered
    # Prompts enter a few at a time: their products are large then, and places stand empty briefly.
    few = max(1, config.batch_size // ENTRIES)
    while waiting < len(prompts) or len(pool.owner):
        free = config.batch_size - len(pool.found)
        if not pool.found or (decoder.enters and free >= few):
            entering = prompts[waiting : waiting + free]
            if entering:
                decoder.enter(entering)
                pool.enter(waiting, len(entering))
                waiting += len(entering)
        penalised = pool.history if config.repetition_penalty != 1 else None
        values, ids = decoder.best(
            config.num_beams, pool.banned(), penalised, config.repetition_penalty
        )  # (R, k) each
        check_finite(values)
        rows, tokens = pool.choose(values, ids)
        for prompt, hypotheses in pool.leave():
            yield prompt, rank(hypotheses, config.length_penalty)
        decoder.advance(rows, tokens)


class Pool:
    """The live beams of the prompts that are in the batch.

    Rows of one prompt stand together, likeliest first, prompts in the order of their numbers; the
    number of rows changes from step to step.

    Attributes:
        owner: (R,) the prompt of each row.
        history: (R, t) int32, what each row has generated, on the left filled up with -1.
        lengths: (R,) tokens of each row in ``history``.
        scores: (R,) summed log-probabilities.
        found: the hypotheses of each prompt in the batch, in the order found.
    """

    def __init__(self, config: BeamConfig):
        self.config = config
        self.owner = np.zeros(0, dtype=np.int64)
        self.history = np.zeros((0, 0), dtype=np.int32)
        self.lengths = np.zeros(0, dtype=np.int64)
        self.scores = np.zeros(0, dtype=np.float32)
        self.found: dict[int, list[Hypothesis]] = {}

    def enter(self, first: int, count: int) -> None:
        """Add a row for each of the prompts ``first``, ``first + 1``, ..."""
        new = np.arange(first, first + count)
        empty = np.full((count, self.history.shape[1]), -1, dtype=np.int32)
        self.owner = np.concatenate([self.owner, new])
        self.history = np.concatenate([self.history, empty])
        self.lengths = np.concatenate([self.lengths, np.zeros_like(new)])
        self.scores = np.concatenate([self.scores, np.zeros(count, dtype=np.float32)])
        self.found.update({prompt: [] for prompt in new.tolist()})

    def banned(self) -> np.ndarray:
        """Forbidden next tokens of each row; see `repeating`."""
        config = self.config
        banned = [repeating(self.history, config.no_repeat_ngram_size)]
        if config.min_length and config.eos_token_ids:
            ends = np.array(config.eos_token_ids, dtype=np.int32)
            banned.append(np.where(self.lengths[:, None] < config.min_length, ends, -1))
        return np.concatenate(banned, axis=1)

    def choose(self, values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Go on with the best of the candidates (R, k), and note what ended.

        Returns:
            For each row that is live now, the row that it was and the token that it got.
        """
        config = self.config
        rows, columns = _best(self.owner, self.scores[:, None] + values, config.num_beams)
        tokens = ids[rows, columns]
        scores = self.scores[rows] + values[rows, columns]
        owner, lengths = self.owner[rows], self.lengths[rows] + 1
        history = np.concatenate([self.history[rows], tokens[:, None]], axis=1)

        ended = np.isin(tokens, config.eos_token_ids)
        last = lengths == config.max_new_tokens
        # Live beams compete only after the last step, and after those that ended in it.
        for row in np.concatenate([np.flatnonzero(ended), np.flatnonzero(~ended & last)]):
            length = int(lengths[row])
            self.found[int(owner[row])].append(
                Hypothesis(
                    history[row, -length:].tolist(), float(scores[row]), length, bool(ended[row])
                )
            )
        live = ~ended & ~last
        if config.rank_up_to is not None:
            live &= ~_decided(owner, scores, live, self.found, config)
        self.owner, self.scores, self.lengths = owner[live], scores[live], lengths[live]
        longest = self.lengths.max(initial=0)
        self.history = history[live, history.shape[1] - longest :]
        return rows[live], tokens[live]

    def leave(self) -> list[tuple[int, list[Hypothesis]]]:
        """Take out the prompts without live rows."""
        done = set(self.found) - set(self.owner.tolist())
        return [(prompt, self.found.pop(prompt)) for prompt in sorted(done)]


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


def repeating(history: np.ndarray, n: int) -> np.ndarray:
    """Tokens that would make an n-gram of a row come again, (R, any) int32 filled up with -1.

    A token is one when the last n - 1 tokens of a row stood before it earlier in the row.
    """
    rows, length = history.shape
    if not 0 < n <= length:
        return np.full((rows, 1), -1, dtype=np.int32)
    repeated = np.ones((rows, length - n + 1), dtype=bool)  # which n-grams begin as the end
    for offset in range(n - 1):
        earlier = history[:, offset : offset + length - n + 1]
        repeated &= earlier == history[:, length - n + 1 + offset, None]
    return np.where(repeated, history[:, n - 1 :], -1)


def _decided(
    owner: np.ndarray,
    scores: np.ndarray,
    live: np.ndarray,
    found: Mapping[int, list[Hypothesis]],
    config: BeamConfig,
) -> np.ndarray:
    """Rows (R,) of prompts whose live beams can no longer become the best.

    A live beam's sum of log-probabilities only falls, and a penalty p >= 0 divides it at most by
    max_new_tokens ** p. So a found one with ``logprob / length ** p`` above that bound stays ahead;
    where this holds for the largest p it holds for every smaller one, as the found one is shorter.
    """
    assert config.rank_up_to is not None
    decided = np.zeros(len(owner), dtype=bool)
    for prompt in np.unique(owner[live]):
        rows = owner == prompt
        best_live = float(scores[rows & live].max())
        decided[rows] = any(
            h.logprob * (config.max_new_tokens / h.length) ** config.rank_up_to
            > best_live * (1 - 1e-6)  # room for rounding
            for h in found[int(prompt)]
        )
    return decided
