"""GPT-2 in plain numpy float64 with jlora's model interface: a second opinion for tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from jlora.system.runtime import jt


class PlainCache:
    def __init__(self, layers: int):
        self.layers = [None] * layers  # per layer keys and values, (B, S, H, D) each
        self.first = None  # (B,) first real token of each row

    def reorder(self, rows) -> None:
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        self.first = self.first[rows]


class PlainGPT2:
    """The part of a jlora model that decoding uses; counts the rows it runs."""

    def __init__(self, weights: dict[str, np.ndarray], heads: int, eps: float = 1e-5):
        self.weights = {key: value.astype(np.float64) for key, value in weights.items()}
        self.n_layer = sum(key.endswith("ln_1.weight") for key in weights)
        self.heads, self.eps = heads, eps
        vocabulary, positions = (len(weights[f"transformer.{k}.weight"]) for k in ("wte", "wpe"))
        self.config = SimpleNamespace(vocab_size=vocabulary, max_positions=positions)
        self.head = self.weights.get("lm_head.weight", self.weights["transformer.wte.weight"])
        self.rows_run = 0

    @classmethod
    def random(cls, seed: int, vocabulary: int, scale=1.0, positions=64, width=8, layers=2):
        generator = np.random.default_rng(seed)
        shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (positions, width)}
        for i in range(layers):
            shapes[f"h.{i}.attn.c_attn.weight"] = (width, 3 * width)
            shapes[f"h.{i}.attn.c_attn.bias"] = (3 * width,)
            shapes[f"h.{i}.attn.c_proj.weight"] = (width, width)
            shapes[f"h.{i}.attn.c_proj.bias"] = (width,)
            shapes[f"h.{i}.mlp.c_fc.weight"] = (width, 4 * width)
            shapes[f"h.{i}.mlp.c_fc.bias"] = (4 * width,)
            shapes[f"h.{i}.mlp.c_proj.weight"] = (4 * width, width)
            shapes[f"h.{i}.mlp.c_proj.bias"] = (width,)
        weights = {key: scale * generator.standard_normal(shape) for key, shape in shapes.items()}
        for name in [f"h.{i}.ln_{j}" for i in range(layers) for j in (1, 2)] + ["ln_f"]:
            weights[f"{name}.weight"], weights[f"{name}.bias"] = np.ones(width), np.zeros(width)
        weights = {f"transformer.{key}": value for key, value in weights.items()}
        # A head of its own: with a tied one a random model only repeats its last token.
        weights["lm_head.weight"] = scale * generator.standard_normal((vocabulary, width))
        return cls(weights, heads=2)

    def new_cache(self) -> PlainCache:
        return PlainCache(self.n_layer)

    def hidden_states(self, input_ids, attention_mask=None, cache=None):
        mask = None if attention_mask is None else attention_mask.numpy()
        return jt.array(self.states(input_ids.numpy(), mask, cache).astype(np.float32))

    def lm_head_logits(self, hidden):
        logits = hidden.numpy().astype(np.float64) @ self.head.T
        return jt.array(logits.astype(np.float32))

    def logits(self, ids: list[int]) -> np.ndarray:
        """One sequence -> (T, V), without cache, padding or Jittor."""
        states = self.states(np.array([ids]), None, None)[0].astype(np.float32)
        return (states.astype(np.float64) @ self.head.T).astype(np.float32)

    def states(self, ids, mask, cache) -> np.ndarray:
        (B, T), weights = ids.shape, self.weights
        self.rows_run += B
        cache = cache or self.new_cache()
        past = 0 if cache.layers[0] is None else cache.layers[0][0].shape[1]
        if past == 0:
            cache.first = np.zeros(B, dtype=int) if mask is None else mask.argmax(1)
        key, query = np.arange(past + T), np.arange(past, past + T)
        seen = (key <= query[:, None]) & (key >= cache.first[:, None, None])  # (B, T, S)
        seen |= key == query[:, None]  # padding sees itself: no empty softmax
        position = np.maximum(query - cache.first[:, None], 0)
        x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][position]
        for i in range(self.n_layer):
            name = f"transformer.h.{i}"
            qkv = self._linear(self._norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
            q, k, v = (a.reshape(B, T, self.heads, -1) for a in np.split(qkv, 3, axis=-1))
            if past:
                k = np.concatenate([cache.layers[i][0], k], axis=1)
                v = np.concatenate([cache.layers[i][1], v], axis=1)
            cache.layers[i] = (k, v)
            scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
            scores = np.where(seen[:, None], scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            a = np.einsum("bhts,bshd->bthd", scores, v).reshape(B, T, -1)
            x = x + self._linear(a, f"{name}.attn.c_proj")
            h = self._linear(self._norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + self._linear(h, f"{name}.mlp.c_proj")
        return self._norm(x, "transformer.ln_f")

    def _linear(self, x, name):
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
