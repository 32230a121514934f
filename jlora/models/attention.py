"""Causal attention over padded batches, and the key-value cache that decoding needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jlora.kernels.attention import sequences
from jlora.system.runtime import jt, nn

MASKED = -1e9  # far below any score, and finite: softmax of a wholly masked row stays defined


@dataclass(frozen=True)
class KeyRange:
    """Which keys of each row are real: ``first[b] <= key < last[b]``.

    Padding stands on the left or on the right of a row, never inside it, so two numbers a row say
    everything that an attention mask says. Both are int32 Vars of shape (B,). ``open`` says that
    every row ends with a real token, so that more can follow.
    """

    first: jt.Var
    last: jt.Var
    open: bool = True

    @classmethod
    def from_mask(cls, attention_mask) -> KeyRange:
        """Make a KeyRange of an attention mask (B, S), 1 for real tokens and 0 for padding.

        Raises:
            ValueError: the mask is not 2-D, or the ones of a row are not one unbroken run.
        """
        if isinstance(attention_mask, jt.Var):
            attention_mask = attention_mask.numpy()
        mask = np.asarray(attention_mask)
        if mask.ndim != 2:
            raise ValueError(f"attention_mask must have shape (B, S), got {mask.shape}")
        mask = mask != 0
        count = mask.sum(1)
        first = mask.argmax(1)
        last = first + count
        columns = np.arange(mask.shape[1])
        run = (columns >= first[:, None]) & (columns < last[:, None])
        if not (run == mask).all():
            row = int((run != mask).any(1).argmax())
            raise ValueError(
                f"attention_mask row {row} has padding inside it; pad on the left or on the right"
            )
        first, last = jt.array(first.astype(np.int32)), jt.array(last.astype(np.int32))
        return cls(first, last, bool(mask[:, -1:].all()))

    def positions(self, column: jt.Var) -> jt.Var:
        """Position of the tokens of ``column`` (1, T) in each row, (B, T)."""
        return jt.maximum(column - self.first.unsqueeze(1), jt.int32(0))

    def mask(self, T: int, S: int) -> jt.Var:
        """Which keys are real to whom, (B, 1, S)."""
        key = jt.arange(S).unsqueeze(0)  # (1, S)
        real = jt.logical_and(key >= self.first.unsqueeze(1), key < self.last.unsqueeze(1))
        return real.unsqueeze(1)

    def lengths(self) -> np.ndarray:
        """Real tokens of each row, (B, 1)."""
        return (self.last.numpy() - self.first.numpy())[:, None]

    def sequences(self, T: int, S: int) -> np.ndarray:
        """See `jlora.kernels.attention.sequences`."""
        return sequences(self.first.numpy(), self.last.numpy(), T, S)

    def take(self, rows: jt.Var) -> KeyRange:
        return KeyRange(self.first[rows], self.last[rows], self.open)

    def longer(self, tokens: int) -> KeyRange:
        """The ranges after ``tokens`` more real tokens on the right.

        Raises:
            ValueError: a row ends with padding, which would come to stand inside it.
        """
        if not self.open:
            raise ValueError(
                "the cache holds a row padded on the right, which cannot go on; pad on the left"
            )
        return KeyRange(self.first, self.last + tokens)


class Stream:
    """Sequences one after the other in a single row, which do not see each other: no padding.

    Attributes:
        starts: (n + 1,) int32, where each begins, and the number of tokens.
    """

    def __init__(self, lengths):
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    @property
    def longest(self) -> int:
        return int(np.diff(self.starts).max())

    def _first(self) -> np.ndarray:
        """The first token of each token's sequence, (T,) int32."""
        return np.repeat(self.starts[:-1], np.diff(self.starts))

    def lengths(self) -> np.ndarray:
        """Tokens of each token's sequence, (1, T)."""
        return np.repeat(np.diff(self.starts), np.diff(self.starts))[None]

    def positions(self, column: jt.Var) -> jt.Var:
        return column - jt.array(self._first()).unsqueeze(0)

    def mask(self, T: int, S: int) -> jt.Var:
        first = jt.array(self._first()).unsqueeze(1)  # (T, 1)
        return (jt.arange(S).unsqueeze(0) >= first).unsqueeze(0)  # (1, T, S)

    def sequences(self, T: int, S: int) -> np.ndarray:
        first, count = self.starts[:-1], np.diff(self.starts)
        return np.stack([first, count, first, count, np.zeros_like(first)], axis=1)


def positions(batch: int, tokens: int, past: int, keys: KeyRange | Stream | None) -> jt.Var:
    """Position of each new token, (B, T) int32: counted from its sequence's first real token."""
    column = (jt.arange(tokens) + past).int32().unsqueeze(0)  # (1, T)
    return column.broadcast((batch, tokens)) if keys is None else keys.positions(column)


def lengths(batch: int, tokens: int, past: int, keys: KeyRange | Stream | None) -> np.ndarray:
    """How long the text of each row is, or of each token in a `Stream`: (B, 1) or (1, T)."""
    return np.full((batch, 1), past + tokens) if keys is None else keys.lengths()


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, where a token sees itself and what stands before it.

    Grouped-query attention: query head h uses key-value head ``h // (H / H_kv)``.

    Attributes:
        scale: of the scores; None: 1 / sqrt(D).
        window: how many tokens a token sees, itself included; None: all before it.
        cap: scores become ``cap tanh(score / cap)``, as in Gemma 2; None: they stay.
    """

    def __init__(
        self, scale: float | None = None, window: int | None = None, cap: float | None = None
    ):
        self.scale, self.window, self.cap = scale, window, cap

    def new_cache(self, layers: int) -> KVCache:
        """An empty cache of the kind that goes with this attention."""
        return KVCache(layers)

    reads_streams = False  # it can, at the cost of a (T, T) matrix over all of a `Stream`

    def execute(
        self, q: jt.Var, k: jt.Var, v: jt.Var, keys: KeyRange | Stream | None = None
    ) -> jt.Var:
        """Attend.

        Args:
            q: (B, T, H, D) float32, the T newest tokens.
            k, v: (B, S, H_kv, D) float32, S >= T; the last T of them belong to q's tokens.
            keys: which keys are real; None when all are. A `Stream` is one row, B = 1.

        Returns:
            (B, T, H, D) float32. Rows of padding hold values that nobody may use.
        """
        B, T, H, D = q.shape
        S, groups = k.shape[1], H // k.shape[2]
        if groups > 1:
            k = repeat_heads(k, groups)
            v = repeat_heads(v, groups)
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))  # (B, H, T or S, D)
        scores = jt.matmul(q, k.permute(0, 1, 3, 2)) * self.scale_of(D)  # (B, H, T, S)
        if self.cap is not None:
            scores = soft_cap(scores, self.cap)
        key, query = jt.arange(S).unsqueeze(0), (jt.arange(T) + (S - T)).unsqueeze(1)
        seen = key <= query  # (T, S)
        if self.window is not None:
            seen = jt.logical_and(seen, key > query - self.window)
        seen = seen.unsqueeze(0)  # (1, T, S)
        if keys is not None:
            seen = jt.logical_and(seen, keys.mask(T, S))  # (B or 1, T, S)
        scores = scores + (1.0 - seen.float32()).unsqueeze(1) * MASKED
        weights = nn.softmax(scores, dim=-1)
        return jt.matmul(weights, v).permute(0, 2, 1, 3)  # (B, T, H, D)

    def scale_of(self, head_dim: int) -> float:
        """What scores are multiplied by."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale


def soft_cap(x: jt.Var, cap: float) -> jt.Var:
    """``cap tanh(x / cap)``: limits values to (-cap, cap)."""
    # tanh z = 2 sigmoid(2 z) - 1; the gradient of Jittor's tanh is NaN beyond |z| of 45.
    return cap * (2 * jt.sigmoid(x * (2 / cap)) - 1)


def repeat_heads(x: jt.Var, groups: int) -> jt.Var:
    """(B, S, H_kv, D) -> (B, S, H_kv * groups, D), each head ``groups`` times in a row."""
    B, S, H, D = x.shape
    return x.unsqueeze(3).broadcast((B, S, H, groups, D)).reshape(B, S, H * groups, D)


class KVCache:
    """Keys and values of the tokens seen so far, one pair of (B, S, H_kv, D) Vars a layer."""

    def __init__(self, layers: int):
        self.layers: list[tuple[jt.Var, jt.Var] | None] = [None] * layers
        self.keys: KeyRange | None = None

    @property
    def length(self) -> int:
        """Number of tokens held, padding included."""
        return 0 if self.layers[0] is None else self.layers[0][0].shape[1]

    def extend(self, layer: int, k: jt.Var, v: jt.Var) -> tuple[jt.Var, jt.Var]:
        """Append new keys and values (B, T, H_kv, D) to a layer; returns all of them."""
        if self.layers[layer] is not None:
            past_k, past_v = self.layers[layer]
            k, v = jt.concat([past_k, k], dim=1), jt.concat([past_v, v], dim=1)
        self.layers[layer] = (k, v)
        return k, v

    def keep(self, length: int) -> None:
        """Forget all but the first ``length`` tokens (at least one) of rows without padding."""
        self.layers = [kv and (kv[0][:, :length], kv[1][:, :length]) for kv in self.layers]

    def attend(self, layer: int, attention: CausalAttention, q, k, v, keys: KeyRange | None):
        """Append new keys and values to a layer and attend over all of them; (B, T, H, D)."""
        k, v = self.extend(layer, k, v)
        return attention(q, k, v, keys)

    def reorder(self, rows) -> None:
        """Make row i of the cache what row ``rows[i]`` was; rows may repeat, vanish or grow."""
        rows = jt.array(np.asarray(rows, dtype=np.int32))
        self.layers = [None if kv is None else (kv[0][rows], kv[1][rows]) for kv in self.layers]
        if self.keys is not None:
            self.keys = self.keys.take(rows)


def step_keys(
    cache: KVCache | None, attention_mask, batch: int, new_tokens: int
) -> tuple[int, KeyRange | Stream | None]:
    """The number of past tokens and the real keys for a model call.

    A `Stream` in the mask's place says where the sequences of a single row begin.
    A mask given with a cache covers past and new tokens, as in transformers. Without one the
    cache's own ranges go on: rows that were padded on the left stay so.

    Raises:
        ValueError: the mask does not fit the tokens, or the cache cannot go on without one.
    """
    past = 0 if cache is None else cache.length
    if isinstance(attention_mask, Stream):
        tokens = int(attention_mask.starts[-1])
        if cache is not None or (batch, new_tokens) != (1, tokens):
            raise ValueError(
                f"a stream of {tokens} tokens needs input_ids of shape (1, {tokens}) and no cache, "
                f"got {(batch, new_tokens)}"
            )
        return 0, attention_mask
    if attention_mask is not None:
        keys = KeyRange.from_mask(attention_mask)
        covered = tuple(np.shape(attention_mask))
        if covered != (batch, past + new_tokens):
            raise ValueError(
                f"attention_mask covers {covered[0]} rows of {covered[1]} tokens, but there are "
                f"{batch} rows of {past} past and {new_tokens} new tokens"
            )
    elif cache is not None and cache.keys is not None:
        keys = cache.keys.longer(new_tokens)
    else:
        keys = None
    if cache is not None:
        cache.keys = keys
    return past, keys
