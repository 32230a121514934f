"""The engine's key-value cache for decoding: beams share what they have in common."""

from __future__ import annotations

import numpy as np

from jlora.kernels.decode_attention import Ancestry, PromptStore, decode_attention
from jlora.models.attention import KVCache
from jlora.system.runtime import jt


class BeamCache(KVCache):
    """A cache that copies nothing: prompts once, generated tokens by step, beams as a table."""

    def __init__(self, layers: int):
        super().__init__(layers)
        self.ancestry: Ancestry | None = None
        self.first: np.ndarray | None = None  # (P,) first real token of each prompt
        self.started = False  # a step whose first layer has run and that is not in the table yet

    @property
    def length(self) -> int:
        store = self.layers[0]
        return 0 if store is None else store.k.shape[1] + len(store.steps)

    def attend(self, layer, attention, q, k, v, keys):
        store = self.layers[layer]
        if store is None or k.shape[1] != 1:
            return self._attend_to_many(layer, attention, q, k, v, keys)
        if layer == 0:
            self._finish_step()
            self.started = True
        return decode_attention(q, k, v, store, self.ancestry, self.first)

    def _attend_to_many(self, layer, attention, q, k, v, keys):
        """Several new tokens: a prompt, or a text that goes on; all of it becomes the prompt."""
        past = self.layers[layer]
        if past is not None:
            if layer == 0:
                self._finish_step()
            past_k, past_v = self._whole(past)
            k, v = jt.concat([past_k, k], dim=1), jt.concat([past_v, v], dim=1)
        self.layers[layer] = PromptStore(k, v)
        if layer + 1 == len(self.layers):
            rows = k.shape[0]
            self.ancestry = Ancestry(rows)
            self.first = np.zeros(rows, np.int32) if keys is None else keys.first.numpy()
        return attention(q, k, v, keys)

    def _whole(self, store: PromptStore) -> tuple[jt.Var, jt.Var]:
        """Keys and values of all rows side by side, as a `KVCache` holds them."""
        owner, table = jt.array(self.ancestry.owner), self.ancestry.table
        parts = [(store.k[owner], store.v[owner])]
        for step, (k, v) in enumerate(store.steps):
            rows = jt.array(np.ascontiguousarray(table[:, step]))
            parts.append((k[rows], v[rows]))
        ks, vs = zip(*parts)
        return jt.concat(list(ks), dim=1), jt.concat(list(vs), dim=1)

    def _finish_step(self) -> None:
        if self.started:
            self.ancestry.grow()
            self.started = False

    def reorder(self, rows) -> None:
        rows = np.asarray(rows, dtype=np.int32)
        self._finish_step()
        self.ancestry.take(rows)
        if not self.ancestry.grouped():
            # Rows of a prompt stand apart: each is given its own prompt from here on.
            for layer, store in enumerate(self.layers):
                self.layers[layer] = PromptStore(*self._whole(store))
            self.first = self.first[self.ancestry.owner]
            self.ancestry = Ancestry(len(rows))
        if self.keys is not None:
            self.keys = self.keys.take(jt.array(rows))
