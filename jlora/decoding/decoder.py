"""What beam search and sampling share: prompts in rows of a batch, one token a row and step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.native_weights import native_model
from jlora.kernels.topk import log_softmax_topk
from jlora.system.errors import UserError
from jlora.system.runtime import jt

# Jittor keeps freed memory by size, and the cache has another size at every step: decoding 32
# inputs by 10 beams held 11 GB without giving it back now and then.
STEPS_PER_CLEARING = 16


class Decoder:
    """Rows of a batch that grow by a token a step, through the model's own layers and its cache.

    Attributes:
        enters: whether `enter` may be called while there are rows.
        hidden: (rows, C) float32 Var, the state from which each row's next token is predicted.
    """

    enters = False

    def __init__(self, model):
        self.model = model
        self._steps = 0

    def enter(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run prompts, one row each, padded on the left to the longest."""
        self.cache = self.model.new_cache()
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        jt.gc()
        self._run(ids, None if mask.all() else mask)

    def advance(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Make row i what row ``rows[i]`` was and append ``tokens[i]``; rows repeat or vanish."""
        if not len(rows):
            return  # the next prompts begin anew
        if not np.array_equal(rows, np.arange(self.hidden.shape[0])):
            self.cache.reorder(rows)
        self._steps += 1
        if self._steps % STEPS_PER_CLEARING == 0:
            jt.gc()
        # The cache remembers which of its tokens are padding, so no mask is needed again.
        self._run(np.asarray(tokens, dtype=np.int32)[:, None], None)

    def resume(self, length: int, tokens: Sequence[int]) -> None:
        """Keep the only row's first ``length`` (> 0) tokens and run ``tokens`` after them."""
        self.cache.keep(length)
        jt.gc()
        self._run(np.asarray([tokens], dtype=np.int32), None)

    def best(self, k: int, banned=None, penalised=None, penalty: float = 1.0, draws=None):
        """The k likeliest next tokens of each row; see `jlora.kernels.topk.log_softmax_topk`."""
        with jt.no_grad():
            logits = self.model.lm_head_logits(self.hidden)
        return log_softmax_topk(logits, k, banned, penalised, penalty, draws=draws)

    def _run(self, ids: np.ndarray, mask: np.ndarray | None) -> None:
        with jt.no_grad():
            mask = None if mask is None else jt.array(mask)
            self.hidden = self.model.hidden_states(jt.array(ids), mask, self.cache)[:, -1]


def decoder_of(model) -> Decoder | NativeDecoder:
    """The fastest decoder that can run the model as it is now."""
    native = native_model(model)
    return Decoder(model) if native is None else NativeDecoder(native, model)


def angle_limit(config) -> int | None:
    """The length of a text beyond which rope_type longrope turns all its keys by other angles."""
    ropes = config.ropes() if hasattr(config, "ropes") else []
    return next((rope.limit for rope in ropes if rope.long is not None), None)


def room(model, prompt: Sequence[int]) -> int:
    """How many tokens can follow a prompt; below 1 it does not fit the model's context."""
    limit = angle_limit(model.config)
    if limit is None or len(prompt) > limit:
        limit = model.config.max_positions
    return limit - len(prompt) + 1  # the last one is never read, so it needs no position


def check_prompts(model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        UserError: a prompt is empty, too long for the model's context together with the new
            tokens, or holds ids outside the vocabulary.
    """
    angles = angle_limit(model.config)
    context, vocabulary = model.config.max_positions, model.config.vocab_size
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise UserError(f"input {number} has no tokens; give a prompt of one token or more")
        if len(prompt) + max_new_tokens - 1 > context:
            raise UserError(
                f"input {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones "
                f"exceed the model's context of {context}; shorten the input or ask for fewer "
                "new tokens"
            )
        if room(model, prompt) < max_new_tokens:
            raise UserError(
                f"input {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones "
                f"outgrow the {angles} that rope_type longrope has short angles for; ask for "
                f"{room(model, prompt)} new tokens at most"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(
                f"input {number} has token ids outside the model's vocabulary of {vocabulary}; "
                "the tokenizer belongs to another model"
            )


def check_finite(values: np.ndarray) -> None:
    """Refuse to decode with a broken model.

    Raises:
        UserError: a row of log-probabilities is NaN.
    """
    if np.isnan(values).any():
        raise UserError(
            "the model's logits are not finite: the weights are damaged or the training diverged; "
            "use an earlier adapter or train with a lower learning rate"
        )
