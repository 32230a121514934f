"""Decoding without Jittor: whole steps in C++, keys and values in memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.decoding.native_weights import NativeModel
from jlora.decoding.slabs import SLAB, Slabs
from jlora.kernels.decoder import Pieces, Step, TokenMemory, head_topk, run_rows
from jlora.kernels.gpu_library import on_gpu
from jlora.kernels.topk import log_softmax_topk
from jlora.system.runtime import jt

PROMPT_TOKENS = 1024  # tokens of prompts run together, about
FUSED_K = 64  # for a larger k the lists of the fused head cost more than the logits


class NativeDecoder:
    """Rows that grow by a token a step, with the interface of `jlora.decoding.decoder.Decoder`.

    Keys and values of a prompt are kept once for all its rows. Those of a generated token stand at
    a place in a slab, and a table says the places of each row's tokens: rows are reordered by their
    lines in the table alone, and a place that no line names is free again.
    """

    enters = True

    def __init__(self, model: NativeModel, source):
        self.model, self._source = model, source
        self._slabs = Slabs((model.layers, 2, SLAB, model.width), model.narrow)
        self._rows_gone()

    def _rows_gone(self) -> None:
        self.hidden = np.zeros((0, int(self.model.model["C"][0])), np.float32)
        self._prompts: dict[int, TokenMemory] = {}  # by address
        self._owner = np.zeros(0, np.int64)  # (R,) address of each row's prompt
        self._prompt_lengths = np.zeros(0, np.int32)  # (R,)
        self._table = np.zeros((0, 0), np.int32)  # (R, most), -1 where a row is shorter
        self._lengths = np.zeros(0, np.int32)  # (R,) generated tokens

    def enter(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run prompts and add a row for each after the present ones."""
        part: list[Sequence[int]] = []
        for prompt in prompts:
            if part and sum(map(len, part)) + len(prompt) > PROMPT_TOKENS:
                self._enter(part)
                part = []
            part.append(prompt)
        self._enter(part)

    def resume(self, length: int, tokens: Sequence[int]) -> None:
        """Keep the only row's first ``length`` (> 0) tokens and run ``tokens`` after them."""
        shape = (self.model.layers, 2, length + len(tokens), self.model.width)
        block = TokenMemory(shape, self.model.narrow)
        prompt = self._prompts[int(self._owner[0])]
        size = min(length, prompt.shape[2])
        generated = self._slabs.read(self._table[0, : length - size])
        block.fill([prompt.numbers()[:, :, :size], generated])
        self._rows_gone()
        self._enter([tokens], [block])

    def _enter(
        self, prompts: Sequence[Sequence[int]], blocks: Sequence[TokenMemory] | None = None
    ) -> None:
        """Run prompts, each behind the tokens that its block has room for besides its own."""
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        ids = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
        if blocks is None:
            layers, width, narrow = self.model.layers, self.model.width, self.model.narrow
            blocks = [TokenMemory((layers, 2, int(n), width), narrow) for n in lengths]
        whole = np.array([block.shape[2] for block in blocks], np.int32)
        before = whole - lengths
        if self.model.rope is not None:
            self.model.rope.is_long(whole, lengths)
        positions = np.concatenate(
            [np.arange(*ends, dtype=np.int32) for ends in zip(before, whole)]
        )
        addresses = np.array([block.address for block in blocks], np.int64)
        hidden = run_rows(
            self.model.model,
            self.model.blocks,
            ids,
            positions,
            np.zeros_like(ids),
            np.cumsum(lengths, dtype=np.int32) - 1,
            pieces=Pieces(lengths, before, whole, addresses),
        )
        self._prompts.update(zip(addresses.tolist(), blocks))
        self.hidden = np.concatenate([self.hidden, hidden])
        self._owner = np.concatenate([self._owner, addresses])
        self._prompt_lengths = np.concatenate([self._prompt_lengths, whole])
        empty = np.full((len(prompts), self._table.shape[1]), -1, np.int32)
        self._table = np.concatenate([self._table, empty])
        self._lengths = np.concatenate([self._lengths, np.zeros_like(lengths)])

    def advance(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Make row i what row ``rows[i]`` was and append ``tokens[i]``; rows repeat or vanish.

        It is fastest with the rows of a prompt together.
        """
        self._owner, self._prompt_lengths = self._owner[rows], self._prompt_lengths[rows]
        lengths = self._lengths[rows]
        if self.model.rope is not None:
            self.model.rope.is_long(self._prompt_lengths + lengths + 1, 1)
        most = int(lengths.max(initial=0)) + 1
        table = np.full((len(rows), most), -1, np.int32)
        width = min(most, self._table.shape[1])
        table[:, :width] = self._table[rows, :width]
        table[np.arange(len(rows)), lengths] = self._slabs.take(len(rows), table)
        self._table, self._lengths = table, lengths + 1
        live = set(self._owner.tolist())
        self._prompts = {key: array for key, array in self._prompts.items() if key in live}
        step = Step(
            self._owner, self._prompt_lengths, table, self._lengths, self._slabs.addresses, SLAB
        )
        self.hidden = run_rows(
            self.model.model,
            self.model.blocks,
            np.ascontiguousarray(tokens, np.int32),
            self._prompt_lengths + lengths,
            np.zeros_like(lengths),
            np.arange(len(rows), dtype=np.int32),
            step=step,
        )

    def best(self, k: int, banned=None, penalised=None, penalty: float = 1.0, draws=None):
        """The k likeliest next tokens; see `jlora.kernels.topk.log_softmax_topk`."""
        # The GPU's head draws nothing.
        if self.model.head is not None and k <= FUSED_K and not (on_gpu() and draws is not None):
            model = self.model
            return head_topk(
                self.hidden, model.head, k, banned, penalised, penalty, model.head_cap,
                words=model.head_words, draws=draws,
            )  # fmt: skip
        with jt.no_grad():
            logits = self._source.lm_head_logits(jt.array(self.hidden))
        return log_softmax_topk(logits, k, banned, penalised, penalty, draws=draws)
