"""How a request of a running batch chooses its tokens: one row greedy or drawn, or beams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.decoding.beam import BeamConfig, Pool, rank, repeating
from jlora.decoding.requests import Event, Request
from jlora.decoding.rows import Edits
from jlora.kernels.topk import Draw
from jlora.system.errors import UserError

LIKELIEST = Draw()  # of rows of which none is drawn


@dataclass
class RowEdit:
    """What is changed of one row's logits; see `jlora.decoding.rows.Edits`."""

    penalised: Sequence[int] = ()
    penalty: float = 1.0
    biased: Sequence[int] = ()
    biases: Sequence[float] = ()
    allowed: np.ndarray | None = None
    banned: Sequence[int] = ()


def stacked(edits: Sequence[RowEdit | None], vocabulary: int) -> Edits | None:
    """The edits of rows, None for rows without."""
    if not any(edits):
        return None
    rows = [edit or _NOTHING for edit in edits]
    allowed = None
    if any(row.allowed is not None for row in rows):
        allowed = np.full((len(rows), -(-vocabulary // 32)), -1, np.int32)
        for line, row in zip(allowed, rows):
            if row.allowed is not None:
                line[:] = row.allowed
    penalised, biased = any(len(r.penalised) for r in rows), any(len(r.biased) for r in rows)
    return Edits(
        penalised=[row.penalised for row in rows] if penalised else None,
        penalties=np.array([row.penalty for row in rows], np.float32),
        biased=[row.biased for row in rows] if biased else None,
        biases=[row.biases for row in rows],
        allowed=allowed,
        banned=[row.banned for row in rows] if any(len(r.banned) for r in rows) else None,
    )


_NOTHING = RowEdit()


def chooser(request: Request, vocabulary: int) -> Single | Beams:
    """What chooses the tokens of a request."""
    return (Single if request.num_beams == 1 else Beams)(request, vocabulary)


class Single:
    """One row, greedy or drawn by the rules of `jlora.decoding.sampling`.

    Attributes:
        need: how many likeliest words to ask for.
        known: tokens that the first row has surely got.
        count: tokens chosen, the end token included.
        reason: why it ended; None while it goes on.
        rows, tokens: after `choose`, for each row that goes on the row that it was, and its token.
    """

    def __init__(self, request: Request, vocabulary: int):
        self._request, self._vocabulary = request, vocabulary
        self._top = min(request.top_logprobs, vocabulary)
        self.need = max(1, self._top)
        self._random = np.random.default_rng([request.seed, 0])
        self._ends = frozenset(request.eos_token_ids)
        self.known: list[int] = []
        self._counts: Counter[int] = Counter()
        penalised = request.prompt if request.repetition_penalty != 1 else ()
        self._seen = dict.fromkeys(penalised)  # ordered, each token once
        self._edits = (
            request.repetition_penalty != 1
            or request.presence_penalty != 0
            or request.frequency_penalty != 0
            or bool(request.logit_bias)
            or request.no_repeat_ngram_size > 0
            or request.constraint is not None
        )
        self.reason: str | None = None
        self.rows, self.tokens = [0], [0]

    @property
    def count(self) -> int:
        return len(self.known)

    def edits(self) -> list[RowEdit | None]:
        """Of the row's logits, for the next token."""
        if not self._edits:
            return [None]
        request = self._request
        edit = RowEdit(list(self._seen), request.repetition_penalty)
        edit.biased, edit.biases = _biases(request, self._counts)
        if request.no_repeat_ngram_size:
            history = np.array([self.known], np.int32)
            edit.banned = _real(repeating(history, request.no_repeat_ngram_size)[0])
        if request.constraint is not None:
            edit.allowed = self._allowed()
        return [edit]

    def draw(self) -> Draw:
        """How the next token is drawn; asked once for each."""
        asked = self._request
        if asked.temperature == 0:
            return LIKELIEST
        u = self._random.random()
        return Draw(asked.temperature, u, asked.top_k, asked.top_p, asked.min_p)

    def _allowed(self) -> np.ndarray:
        mask = self._request.constraint.mask()
        words = -(-self._vocabulary // 32)
        allowed = np.full(words, -1, np.int32) if mask is None else np.array(mask, np.int32)
        if allowed.shape != (words,):
            raise ValueError(f"a mask of shape {allowed.shape} for {self._vocabulary} tokens")
        may_end = self._request.constraint.may_end()
        bits = allowed.view(np.uint32)
        for token in self._ends:
            bit = np.uint32(1 << token % 32)
            bits[token // 32] = bits[token // 32] | bit if may_end else bits[token // 32] & ~bit
        return allowed

    def choose(self, values: np.ndarray, ids: np.ndarray) -> list[Event]:
        """Take a token.

        Args:
            values, ids: (1, 1 + k) log-probabilities and tokens, the drawn one, then the k >=
                `need` likeliest.

        Returns:
            What is to be told.
        """
        if values[0, 0] == -np.inf:
            return self._dead_end()
        token, logprob = int(ids[0, 0]), float(values[0, 0])
        self.known.append(token)
        self.tokens = [token]
        if token in self._ends:
            self.reason = "stop"
            return []
        if self._edits:
            self._note(token)
        if self.count == self._request.max_new_tokens:
            self.reason = "length"
        top = ()
        if self._top:
            likeliest = slice(1, 1 + self._top)
            top = tuple(zip(ids[0, likeliest].tolist(), values[0, likeliest].tolist()))
        return [Event("token", token, logprob, top)]

    def _note(self, token: int) -> None:
        self._counts[token] += 1
        if self._request.repetition_penalty != 1:
            self._seen[token] = None
        if self._request.constraint is not None:
            self._request.constraint.accept(token)

    def _dead_end(self) -> list[Event]:
        constraint = self._request.constraint
        if constraint is None or not constraint.may_end():
            raise UserError(
                "no token may come next: "
                + ("the constraint" if constraint else "logit_bias or no_repeat_ngram_size")
                + " forbids all of the vocabulary"
            )
        self.reason = "stop"
        return []


class Beams:
    """Rows of a beam search by the rules of `jlora.decoding.beam`; attributes as of `Single`."""

    def __init__(self, request: Request, vocabulary: int):
        self._request = request
        self._pool = Pool(
            BeamConfig(
                request.eos_token_ids,
                request.num_beams,
                request.length_penalty,
                request.no_repeat_ngram_size,
                request.max_new_tokens,
                repetition_penalty=request.repetition_penalty,
                rank_up_to=max(request.length_penalty, 0),
            )
        )
        self._pool.enter(0, 1)
        self.need = min(request.num_beams, vocabulary)
        self.known: list[int] = []
        self.count = 0
        self.reason: str | None = None
        self.rows, self.tokens = [0], [0]

    def edits(self) -> list[RowEdit | None]:
        request, history = self._request, self._pool.history
        counted = request.presence_penalty or request.frequency_penalty or request.logit_bias
        edits: list[RowEdit | None] = []
        for banned, row in zip(self._pool.banned(), history):
            edit = RowEdit(banned=_real(banned))
            if request.repetition_penalty != 1:
                edit.penalised, edit.penalty = _real(row), request.repetition_penalty
            if counted:
                edit.biased, edit.biases = _biases(request, Counter(_real(row)))
            edits.append(edit if edit.penalised or edit.biased or edit.banned else None)
        return edits

    def draw(self) -> Draw:
        return LIKELIEST

    def choose(self, values: np.ndarray, ids: np.ndarray) -> list[Event]:
        likeliest = slice(1, 1 + self.need)
        rows, tokens = self._pool.choose(values[:, likeliest], ids[:, likeliest])
        self.rows, self.tokens = rows.tolist(), tokens.tolist()
        left = self._pool.leave()
        if not left:
            return []
        if not left[0][1]:
            raise UserError("no beam can go on: logit_bias or no_repeat_ngram_size forbid all")
        best = rank(left[0][1], self._request.length_penalty)[0]
        self.count, self.reason = best.length, "stop" if best.finished else "length"
        return [Event("token", token) for token in best.text_ids]


def _real(ids: np.ndarray) -> list[int]:
    return ids[ids >= 0].tolist()


def _biases(request: Request, counts: Counter[int]) -> tuple[list[int], list[float]]:
    """What is added to which logits, where the text has ``counts`` of its tokens."""
    if not request.presence_penalty and not request.frequency_penalty:
        return list(request.logit_bias), list(request.logit_bias.values())
    biases = dict(request.logit_bias)
    for token, count in counts.items():
        penalty = request.presence_penalty + count * request.frequency_penalty
        biases[token] = biases.get(token, 0.0) - penalty
    return list(biases), list(biases.values())
