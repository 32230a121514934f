"""Rows of many adapters over one base model, in one native step; prompts in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jlora.decoding.adapter_bank import AdapterBank
from jlora.decoding.native_weights import NativeModel
from jlora.decoding.slabs import SLAB, Slabs
from jlora.kernels.decoder import (
    NO_PIECES,
    NO_STEP,
    Pieces,
    Step,
    TokenMemory,
    head_logits,
    head_logprobs,
    head_topk,
    run_rows,
)
from jlora.kernels.gpu_library import on_gpu
from jlora.kernels.topk import Draw, log_softmax_topk
from jlora.system.errors import UserError
from jlora.system.runtime import jt

FUSED_K = 64  # for a larger k the lists of the fused head cost more than the logits


@dataclass(frozen=True)
class Edits:
    """What becomes of the logits of R rows before the softmax, in this order.

    Attributes:
        penalised: ids of each row, whose logits are divided by the row's penalty where they are
            positive and multiplied where not (CTRL, arXiv 1909.05858); each once.
        penalties: (R,) float32.
        biased: ids of each row, to whose logits ``biases`` are added; of an id given twice both.
        biases: as many numbers of each row.
        allowed: (R, ceil(V / 32)) int32, a bit for each token that may come (llguidance's form).
        banned: ids of each row that may not come.
    """

    penalised: Sequence[Sequence[int]] | None = None
    penalties: np.ndarray | None = None
    biased: Sequence[Sequence[int]] | None = None
    biases: Sequence[Sequence[float]] | None = None
    allowed: np.ndarray | None = None
    banned: Sequence[Sequence[int]] | None = None

    def arguments(self) -> dict:
        """As `jlora.kernels.topk.log_softmax_topk` takes them."""
        return {
            "banned": self.banned,
            "penalised": self.penalised,
            "penalty": 1.0 if self.penalties is None else self.penalties,
            "biased": self.biased,
            "biases": self.biases,
            "allowed": self.allowed,
        }


@dataclass(frozen=True)
class Kept:
    """Keys and values of a run of tokens, computed with one adapter.

    Attributes:
        tokens: what they belong to.
        adapter: slot in the bank; -1: the base.
    """

    tokens: list[int]
    adapter: int
    _memory: TokenMemory = field(repr=False)
    _is_long: bool = field(repr=False)  # turned by the angles of long texts

    @property
    def bytes(self) -> int:
        return self._memory.numbers().nbytes


class Prompt:
    """A prompt that is run in pieces.

    Attributes:
        tokens, adapter: as given to `RowDecoder.begin`.
        done: how many of the tokens have been run, those copied among them.
        hidden: (C,) float32, the state of the last token, once all are run.
    """

    def __init__(self, tokens: list[int], adapter: int, memory: TokenMemory, done: int):
        self.tokens, self.adapter, self.done = tokens, adapter, done
        self.hidden: np.ndarray | None = None
        self._memory = memory


class RowDecoder:
    """Rows that grow by a token a step, each with its own adapter or none.

    What a row gets does not depend on the other rows, on the pieces in which its prompt was run, or
    on how much of it was copied: bit for bit, in every precision (but for packed products by
    oneDNN, on processors without tiles of jlora's own).

    Args:
        native: the base model; it holds what the addresses point to.
        source: the model that ``native`` was read from, for logits that only it can compute.
        bank: whose slots prompts may name; None: the base alone.

    Attributes:
        rows: how many there are.
        hidden: (rows, C) float32, the state of each row's newest token.

    Raises:
        UserError: the model is on a GPU, or an adapter is on it.
    """

    def __init__(self, native: NativeModel, source, bank: AdapterBank | None = None):
        if on_gpu():
            raise UserError("serving runs on the processor; set JLORA_DEVICE=cpu")
        self._native, self._source = native, source
        self._bank = AdapterBank(native) if bank is None else bank
        self._slabs = Slabs((native.layers, 2, SLAB, native.width), native.narrow)
        self._prompts: list[Prompt] = []  # of each row
        self._texts: list[list[int]] = []  # tokens that each row has generated
        self._table = np.zeros((0, 0), np.int32)  # (R, most) places of them, -1 where it is shorter
        self.hidden = np.zeros((0, int(native.model["C"][0])), np.float32)

    @property
    def rows(self) -> int:
        return len(self._prompts)

    def bytes_of(self, tokens: int) -> int:
        """Memory of the keys and values of so many tokens."""
        native = self._native
        return native.layers * 2 * tokens * native.width * (2 if native.narrow else 4)

    def begin(
        self, tokens: Sequence[int], adapter: int = -1, kept: Kept | None = None, length: int = 0
    ) -> Prompt:
        """Make room for a prompt; its tokens are run by `run`.

        Args:
            kept, length: take the first ``length`` tokens' keys and values from there. (None are
                taken, and ``done`` of the result is 0, where rope_type longrope turns a text of
                this length by other angles than those.)

        Raises:
            ValueError: the prompt is empty, its first ``length`` tokens are not those of ``kept``
                with the same adapter, or nothing would be left to run.
        """
        tokens = list(tokens)
        self._bank.check(adapter)
        if not tokens:
            raise ValueError("a prompt without tokens")
        is_long = self._is_long(len(tokens))
        if length:
            if kept is None or kept.adapter != adapter:
                raise ValueError("keys and values of another adapter")
            if not 0 < length < len(tokens) or kept.tokens[:length] != tokens[:length]:
                raise ValueError(
                    f"the first {length} tokens are not what was kept, or all there are"
                )
            if kept._is_long != is_long:
                length = 0
        memory = self._memory(len(tokens))
        if length:
            memory.numbers()[:, :, :length] = kept._memory.numbers()[:, :, :length]
        return Prompt(tokens, adapter, memory, length)

    def _memory(self, tokens: int) -> TokenMemory:
        native = self._native
        return TokenMemory((native.layers, 2, tokens, native.width), native.narrow)

    def _is_long(self, length: int) -> bool:
        rope = self._native.rope
        return rope is not None and bool(rope.is_long(np.array([length]), length)[0])

    def run(
        self, prompts: Sequence[Prompt], counts: Sequence[int], every: bool = False
    ) -> list[np.ndarray] | None:
        """Run the next ``counts[i]`` tokens of ``prompts[i]``, all in one pass.

        Returns:
            With ``every`` the states of all these tokens, (counts[i], C) float32 each.

        Raises:
            ValueError: a count is not from 1 to what is left, or a prompt is given twice.
        """
        return self._run(prompts, counts, every, np.zeros(0, np.int32), NO_STEP)[0]

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Add a row for each prompt, all of whose tokens were run, after the present ones."""
        if any(prompt.hidden is None for prompt in prompts):
            raise ValueError("a prompt whose tokens were not all run")
        if not prompts:
            return
        self._prompts += prompts
        self._texts += [[] for _ in prompts]
        empty = np.full((len(prompts), self._table.shape[1]), -1, np.int32)
        self._table = np.concatenate([self._table, empty])
        self.hidden = np.concatenate([self.hidden, [prompt.hidden for prompt in prompts]])

    def advance(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        prompts: Sequence[Prompt] = (),
        counts: Sequence[int] = (),
        every: bool = False,
    ) -> list[np.ndarray] | None:
        """Make row i what row ``rows[i]`` was and append ``tokens[i]``; rows repeat or vanish.

        It is fastest with the rows of a prompt together. The pieces of ``prompts`` are run in the
        same pass over the weights, see `run`.
        """
        rows = np.asarray(rows, np.int64)
        lengths = np.array([len(self._texts[row]) for row in rows], np.int32)
        most = int(lengths.max(initial=0)) + 1
        table = np.full((len(rows), most), -1, np.int32)
        width = min(most, self._table.shape[1])
        table[:, :width] = self._table[rows, :width]
        self._prompts = [self._prompts[row] for row in rows]
        sizes = np.array([len(prompt.tokens) for prompt in self._prompts], np.int32)
        if self._native.rope is not None and len(rows):
            self._native.rope.is_long(sizes + lengths + 1, 1)
        table[np.arange(len(rows)), lengths] = self._slabs.take(len(rows), table)
        self._table = table
        self._texts = [[*self._texts[row], int(token)] for row, token in zip(rows, tokens)]
        owners = np.array([prompt._memory.address for prompt in self._prompts], np.int64)
        step = Step(owners, sizes, table, lengths + 1, self._slabs.addresses, SLAB)
        found, self.hidden = self._run(prompts, counts, every, np.asarray(tokens, np.int32), step)
        return found

    def _run(self, prompts, counts, every: bool, tokens: np.ndarray, step: Step):
        """Pieces of prompts and a step, in one call: the states of both."""
        for prompt, count in zip(prompts, counts, strict=True):
            if not 0 < count <= len(prompt.tokens) - prompt.done:
                raise ValueError(f"{count} of {len(prompt.tokens) - prompt.done} tokens left")
        if len({id(prompt) for prompt in prompts}) < len(prompts):
            raise ValueError("a prompt twice")
        if not len(prompts) and not len(tokens):
            return ([] if every else None), self.hidden[:0]
        before = [prompt.done for prompt in prompts]
        ends = [prompt.done + count for prompt, count in zip(prompts, counts)]
        parts = [np.array(p.tokens[a:b], np.int32) for p, a, b in zip(prompts, before, ends)]
        places = [np.arange(a, b, dtype=np.int32) for a, b in zip(before, ends)]
        slots = [np.full(count, p.adapter, np.int32) for p, count in zip(prompts, counts)]
        own = np.array([prompt.adapter for prompt in self._prompts[: len(tokens)]], np.int32)
        pieces = NO_PIECES
        if len(prompts):
            pieces = Pieces(
                np.array(counts, np.int32),
                np.array(before, np.int32),
                np.array([len(prompt.tokens) for prompt in prompts], np.int32),
                np.array([prompt._memory.address for prompt in prompts], np.int64),
            )
        all_tokens = int(sum(counts)) + len(tokens)
        last = np.cumsum(counts, dtype=np.int32) - 1
        wanted = np.concatenate([last, np.arange(all_tokens - len(tokens), all_tokens)])
        if every:
            wanted = np.arange(all_tokens)
        hidden = run_rows(
            self._native.model,
            self._bank.blocks,
            np.concatenate([*parts, tokens]),
            np.concatenate([*places, step.prompt_lengths + step.lengths - 1]),
            np.concatenate([*slots, own]),
            wanted.astype(np.int32),
            pieces,
            step,
        )
        states = np.split(hidden, np.cumsum(counts)) if every else [*hidden[: len(prompts), None]]
        for prompt, end, found in zip(prompts, ends, states):
            prompt.done = end
            if end == len(prompt.tokens):
                prompt.hidden = found[-1].copy()
        return (states[: len(prompts)] if every else None), hidden[len(hidden) - len(tokens) :]

    def best(
        self, k: int, edits: Edits | None = None, draws: Sequence[Draw] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest next tokens of each row, see `best_of`."""
        return self.best_of(self.hidden, k, edits, draws)

    def best_of(
        self,
        hidden: np.ndarray,
        k: int,
        edits: Edits | None = None,
        draws: Sequence[Draw] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k likeliest tokens after given states, best first.

        Args:
            hidden: (n, C) float32.
            k: up to `FUSED_K` no logits are written. Where the logits are the model's own business
                (see `NativeModel.head`), last bits may depend on how many rows there are.
            draws: how a token of each is drawn, which then comes first.

        Returns:
            Log-probabilities and ids, see `jlora.kernels.topk.log_softmax_topk`.
        """
        native = self._native
        hidden = np.ascontiguousarray(hidden, np.float32)
        arguments = {"draws": draws, **({} if edits is None else edits.arguments())}
        cap, words = native.head_cap, native.head_words
        if native.head is None:
            return log_softmax_topk(self._logits(hidden), k, **arguments)
        if k <= FUSED_K:
            return head_topk(hidden, native.head, k, cap=cap, words=words, **arguments)
        return log_softmax_topk(head_logits(hidden, native.head, cap, words), k, **arguments)

    def logprobs_of(self, hidden: np.ndarray, targets: Sequence[int]) -> np.ndarray:
        """The log-probability of one token after each state, (n,) float32.

        Args:
            hidden: (n, C) float32.
            targets: n tokens.
        """
        native = self._native
        hidden = np.ascontiguousarray(hidden, np.float32)
        targets = np.asarray(targets, np.int32)
        if native.head is not None:
            cap, words = native.head_cap, native.head_words
            return head_logprobs(hidden, targets, native.head, cap, words)
        with jt.no_grad():
            losses = self._source.target_losses(jt.array(hidden), jt.array(targets))
        return -losses.numpy()

    def _logits(self, hidden: np.ndarray) -> jt.Var:
        with jt.no_grad():
            return self._source.lm_head_logits(jt.array(hidden))

    def keep(self, row: int) -> Kept:
        """A copy of the keys and values of all tokens of a row, for `begin`."""
        prompt, text = self._prompts[row], self._texts[row]
        tokens = [*prompt.tokens, *text]
        memory = self._memory(len(tokens))
        numbers = memory.numbers()
        numbers[:, :, : len(prompt.tokens)] = prompt._memory.numbers()
        numbers[:, :, len(prompt.tokens) :] = self._slabs.read(self._table[row, : len(text)])
        return Kept(tokens, prompt.adapter, memory, self._is_long(len(prompt.tokens)))
