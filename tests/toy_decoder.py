"""A language model without arithmetic behind the interface of `jlora.decoding.rows`.

The logits are a hash of the adapter's weights and all tokens so far, so that a row that is mixed up
with another, a wrong token or keys of another adapter change everything that follows.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np

from jlora.kernels.topk import log_softmax_topk_numpy

WORDS = 50
PER_TOKEN = 8  # bytes
MASK = (1 << 48) - 1
_ODD = np.uint64(0x9E3779B97F4A7C15)


def after(state: int, token: int) -> int:
    """The state when ``token`` was read."""
    x = (state ^ (token + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    x = (x ^ x >> 27) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return (x ^ x >> 31) & MASK


def logits_of(hidden: np.ndarray, words: int, scale: float = 8.0) -> np.ndarray:
    """(n, 2) float32 -> (n, words) float32; NaN stays NaN."""
    broken = np.isnan(hidden).any(1)
    halves = np.where(np.isnan(hidden), 0, hidden).astype(np.uint64)
    state = halves[:, 0] << np.uint64(24) | halves[:, 1]
    x = (state[:, None] + np.arange(1, words + 1, dtype=np.uint64)) * _ODD
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    logits = (scale * ((x >> np.uint64(40)) / 2.0**24 - 0.5)).astype(np.float32)
    logits[broken] = np.nan
    return logits


def edited(logits: np.ndarray, edits) -> np.ndarray:
    """The logits as `jlora.decoding.rows.Edits` says, by plain loops."""
    logits = logits.copy()
    for row, line in enumerate(logits if edits is not None else ()):
        strength = np.float32(edits.penalties[row])
        for token in set(edits.penalised[row] if edits.penalised else ()):
            line[token] = line[token] * strength if line[token] < 0 else line[token] / strength
        if edits.biased:
            for token, bias in zip(edits.biased[row], edits.biases[row]):
                line[token] += np.float32(bias)
        if edits.allowed is not None:
            bits = np.unpackbits(edits.allowed[row].view(np.uint8), bitorder="little")
            line[bits[: len(line)] == 0] = -np.inf
        for token in edits.banned[row] if edits.banned else ():
            line[token] = -np.inf
    return logits


class ToyBank:
    """Slots of adapters; each one that is added has other weights than all before."""

    def __init__(self):
        self.weights: dict[int, int] = {-1: 0}
        self._added = 0

    def add(self, seed: int | None = None) -> int:
        self._added += 1
        slot = next(n for n in range(len(self.weights)) if n not in self.weights)
        self.weights[slot] = self._added if seed is None else seed
        return slot

    def remove(self, slot: int) -> None:
        del self.weights[slot]


class ToyPrompt:
    def __init__(self, tokens, adapter, states):
        self.tokens, self.adapter, self.states = list(tokens), adapter, states
        self.hidden = None

    @property
    def done(self) -> int:
        return len(self.states) - 1


class ToyDecoder:
    """As `RowDecoder`.

    Attributes:
        calls: (name, what was run) of each call, in order.
        poison: a token after which everything is NaN.
        fault: raised by the next call that runs tokens.
    """

    def __init__(self, bank: ToyBank | None = None, words: int = WORDS, poison: int | None = None):
        self.bank, self.words, self.poison = bank or ToyBank(), words, poison
        self.calls: list[tuple] = []
        self.fault: Exception | None = None
        self.most_memory = 0
        self._begun: weakref.WeakSet[ToyPrompt] = weakref.WeakSet()
        self._rows: list[tuple[ToyPrompt, tuple[int, ...], tuple[int, ...]]] = []
        self.hidden = np.zeros((0, 2), np.float32)

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def memory(self) -> int:
        prompts = sum(len(prompt.tokens) for prompt in self._begun)
        return PER_TOKEN * (prompts + sum(len(tokens) for _, tokens, _ in self._rows))

    def bytes_of(self, tokens: int) -> int:
        return PER_TOKEN * tokens

    def begin(self, tokens, adapter=-1, kept=None, length=0):
        first = after(0, 1000 + self.bank.weights[adapter])
        states = [first] if kept is None else kept.states[: length + 1]
        if kept is not None:
            assert 0 < length < len(tokens)
            if kept.adapter != adapter:
                raise ValueError("another adapter's keys")
            assert list(tokens[:length]) == list(kept.tokens[:length])
        prompt = ToyPrompt(tokens, adapter, list(states))
        self._begun.add(prompt)
        self._note("begin", length)
        return prompt

    def _note(self, *call) -> None:
        self.calls.append(call)
        self.most_memory = max(self.most_memory, self.memory)

    def _fail(self) -> None:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def _read(self, states: list[int], token: int, adapter: int) -> None:
        assert adapter in self.bank.weights  # not removed
        broken = token == self.poison or states[-1] < 0
        states.append(-1 if broken else after(states[-1], int(token)))

    def _hidden(self, states) -> np.ndarray:
        rows = [
            (state >> 24, state & 0xFFFFFF) if state >= 0 else (np.nan,) * 2 for state in states
        ]
        return np.array(rows, np.float32).reshape(-1, 2)

    def _run(self, prompts, counts, every):
        if prompts:
            self._note("run", list(counts), [prompt.adapter for prompt in prompts])
        found = []
        for prompt, count in zip(prompts, counts):
            assert 0 < count <= len(prompt.tokens) - prompt.done
            for token in prompt.tokens[prompt.done :][:count]:
                self._read(prompt.states, token, prompt.adapter)
            found.append(self._hidden(prompt.states[-count:]))
            prompt.hidden = found[-1][-1]
        return found if every else None

    def run(self, prompts, counts, every=False):
        self._fail()
        return self._run(prompts, counts, every)

    def enter(self, prompts) -> None:
        assert all(prompt.done == len(prompt.tokens) for prompt in prompts)
        self._rows += [(prompt, (), (prompt.states[-1],)) for prompt in prompts]
        self.hidden = self._hidden([states[-1] for _, _, states in self._rows])

    def advance(self, rows, tokens, prompts=(), counts=(), every=False):
        self._fail()
        assert len(rows) == len(tokens)
        new = []
        for row, token in zip(rows, tokens):
            prompt, told, states = self._rows[row]
            states = list(states)
            self._read(states, token, prompt.adapter)
            new.append((prompt, (*told, int(token)), tuple(states)))
        self._rows = new
        self._note("advance", [prompt.adapter for prompt, _, _ in new])
        self.hidden = self._hidden([states[-1] for _, _, states in self._rows])
        return self._run(prompts, counts, every)

    def best(self, k, edits=None, draws=None):
        self._note("best", k)
        return self._best(self.hidden, k, edits, draws)

    def best_of(self, hidden, k, edits=None, draws=None):
        self._note("best_of", k)
        return self._best(hidden, k, edits, draws)

    def _best(self, hidden, k, edits, draws=None):
        logits = edited(logits_of(hidden, self.words), edits)
        return log_softmax_topk_numpy(logits, k, draws=draws)

    def logprobs_of(self, hidden, targets):
        values, ids = self._best(hidden, self.words, None)
        return np.array([v[i == t][0] for v, i, t in zip(values, ids, targets)], np.float32)

    def keep(self, row):
        prompt, told, states = self._rows[row]
        tokens = [*prompt.tokens, *told]
        self._note("keep", len(tokens))
        return SimpleNamespace(
            tokens=tokens,
            adapter=prompt.adapter,
            bytes=PER_TOKEN * len(tokens),
            states=[*prompt.states, *states[1:]],
        )
