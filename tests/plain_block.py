"""A transformer block forward and backward in numpy, rounded to bf16 where block.h says so.

The twin of `jlora.kernels.block` in float64: what is left between the two are sums in another
order, and the few numbers that such a sum puts on the other side of a rounding.
"""

from __future__ import annotations

import numpy as np
from tiny_models import round_bf16

from jlora.kernels.packed_linear import tiles

MASK32 = 0xFFFFFFFF


def exact(x):
    return np.asarray(x, np.float64)


def rounded(x):
    return exact(round_bf16(np.asarray(x, np.float32)))


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def dropout_factors(shape, p, seed) -> np.ndarray:
    """What `Dropout` of elementwise.h multiplies the elements by, rows filled up to runs of 32."""
    rows, width = shape
    place = np.arange(rows)[:, None] * (-(-width // 32) * 32) + np.arange(width)
    key = (seed * 0x9E3779B97F4A7C15 >> 32) & MASK32
    h = (place.astype(np.uint64) * 0x9E3779B1 & MASK32) ^ key
    h = (h ^ (h >> 16)) * 0x85EBCA6B & MASK32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & MASK32
    h ^= h >> 16
    return np.where(h >= int(p * 2**32), 1 / (1 - p), 0.0)


class Linear:
    """A frozen layer with its branch, read off a plain module of jlora."""

    def __init__(self, module, rounding):
        weight = rounding(module.weight.numpy())
        transposed = getattr(module, "fan_in_fan_out", hasattr(module, "nf"))
        self.W = weight.T if transposed else weight  # (n, k)
        self.b = 0.0 if module.bias is None else exact(module.bias.numpy())
        self.blocks, self.seed = [], None
        self.adapted = hasattr(module, "lora_A") and module.adapter_enabled
        if not self.adapted:
            return
        self.A, self.B = exact(module.lora_A.numpy()), exact(module.lora_B.numpy())
        self.scale, r = module.scaling, self.B.shape[1]
        self.p = getattr(module.lora_dropout, "p", 0.0)
        enabled = getattr(module, "enable_lora", [True])
        width = len(self.W) // len(enabled)
        for place, block in enumerate(np.flatnonzero(enabled)):
            ranks = slice(place * r, (place + 1) * r)
            own = slice(place * width, (place + 1) * width)
            self.blocks.append((slice(block * width, (block + 1) * width), ranks, own))

    def forward(self, x):
        self.factors = 1.0
        if self.adapted and self.p and self.seed is not None:
            self.factors = dropout_factors(x.shape, self.p, self.seed)
        self.x, y = x, x @ self.W.T + self.b
        if self.adapted:
            self.low = self.scale * (x * self.factors) @ self.A.T
        for outputs, ranks, own in self.blocks:
            y[:, outputs] += self.low[:, ranks] @ self.B[own].T
        return y

    def backward(self, dy):
        dx, x = dy @ self.W, self.x * self.factors
        if self.adapted:
            self.dA, self.dB = np.zeros_like(self.A), np.zeros_like(self.B)
        for outputs, ranks, own in self.blocks:
            dlow = self.scale * dy[:, outputs] @ self.B[own]
            self.dA[ranks] = dlow.T @ x
            self.dB[own] = dy[:, outputs].T @ self.low[:, ranks]
            dx = dx + self.factors * (dlow @ self.A[ranks])
        return dx


class Block:
    def __init__(self, block, starts, rotation=None, rounding=rounded, seed=None):
        """Read a plain or fused block of jlora.

        Args:
            starts: first row of each sequence, and the number of rows.
            rotation: cosine and sine, (rows, D / 2) each.
            rounding: `rounded` or `exact`.
            seed: of dropout; None drops nothing.
        """
        self.round, self.starts, self.rotation = rounding, starts, rotation
        # oneDNN's builds have no tiles, and attend in float32.
        self.inner = exact if tiles() is None else rounding
        gated = self.gated = rotation is not None
        attn, mlp = (block.self_attn if gated else block.attn), block.mlp
        norms = ("input_layernorm", "post_attention_layernorm") if gated else ("ln_1", "ln_2")
        self.norms = [getattr(block, name) for name in norms]
        self.heads = attn.heads
        self.key_heads = attn.kv_heads if gated else attn.heads
        names = ("q_proj k_proj v_proj", "o_proj") if gated else ("c_attn", "c_proj")
        layers = [[getattr(attn, n) for n in joint.split()] for joint in names]
        names = ("gate_proj up_proj", "down_proj") if gated else ("c_fc", "c_proj")
        layers += [[getattr(mlp, n) for n in joint.split()] for joint in names]
        self.joints = [[Linear(m, rounding) for m in joint] for joint in layers]
        self.D = sum(len(linear.W) for linear in self.joints[0]) // (
            self.heads + 2 * self.key_heads
        )
        if seed is not None:  # each branch has its own, by the place of its A among the adapters
            for i, linear in enumerate(x for joint in self.joints for x in joint if x.adapted):
                linear.seed = seed * 64 + 2 * i

    @property
    def gradients(self):
        adapted = [x for joint in self.joints for x in joint if x.adapted]
        return [g for linear in adapted for g in (linear.dA, linear.dB)]

    def forward(self, x):
        r = self.round
        self.x = exact(x)
        self.qkv = r(self._apply(0, r(self._norm(0, self.x))))
        self.attended = r(self._attend())
        self.mid = self.x + self._apply(1, self.attended)
        wide = self._apply(2, r(self._norm(1, self.mid)))
        self.up = r(wide)
        # Llama's activation reads what was kept; GPT-2's what was computed, before it is rounded.
        active = self._activate(self.up if self.gated else wide)
        self.kept = r(self._activate(self.up))  # what the gradient of A is computed from
        return self.mid + self._apply(3, r(active))

    def backward(self, dy):
        r, dy = self.round, exact(dy)
        self.joints[3][0].x = self.kept
        dup = r(self._slope(self._back(3, r(dy))))
        dmid = dy + self._norm_back(1, self.mid, self._back(2, dup))
        dqkv = r(self._attend_back(r(self._back(1, r(dmid)))))
        return dmid + self._norm_back(0, self.x, self._back(0, dqkv))

    def _apply(self, joint, x):
        return np.concatenate([linear.forward(x) for linear in self.joints[joint]], axis=1)

    def _back(self, joint, dy):
        ends = np.cumsum([len(linear.W) for linear in self.joints[joint]])[:-1]
        parts = np.split(dy, ends, axis=1)
        return sum(x.backward(part) for x, part in zip(self.joints[joint], parts))

    def _moments(self, i, x):
        centred = x if self.gated else x - x.mean(1, keepdims=True)
        return centred, 1 / np.sqrt((centred**2).mean(1, keepdims=True) + self.norms[i].eps)

    def _norm(self, i, x):
        centred, scale = self._moments(i, x)
        y = centred * scale * exact(self.norms[i].weight.numpy())
        return y if self.gated else y + exact(self.norms[i].bias.numpy())

    def _norm_back(self, i, x, dy):
        centred, scale = self._moments(i, x)
        g = dy * exact(self.norms[i].weight.numpy())
        along = (g * centred).mean(1, keepdims=True) * scale**2
        return scale * (g - (0 if self.gated else g.mean(1, keepdims=True)) - centred * along)

    def _sigmoid_argument(self, x):
        return 1.5957691216057308 * (x + 0.044715 * x**3)

    def _activate(self, x):
        if not self.gated:
            return x * sigmoid(self._sigmoid_argument(x))
        gate, up = np.split(x, 2, axis=1)
        return gate * sigmoid(gate) * up

    def _slope(self, dy):
        if not self.gated:
            x = self.up
            s = sigmoid(self._sigmoid_argument(x))
            return dy * (s + x * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * x**2))
        gate, up = np.split(self.up, 2, axis=1)
        s = sigmoid(gate)
        return np.concatenate([dy * up * (s + gate * s * (1 - s)), dy * gate * s], axis=1)

    def _turn(self, x, rows, sign):
        if self.rotation is None:
            return x
        cos, sin = (each[rows, None] for each in self.rotation)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - sign * b * sin, b * cos + sign * a * sin], axis=-1)

    def _sequences(self):
        """Rows, queries, keys, values (heads first, keys repeated), exp(scores) and their sums."""
        H, G, D = self.heads, self.key_heads, self.D
        for first, end in zip(self.starts[:-1], self.starts[1:]):
            rows = slice(first, end)
            q, k, v = np.split(self.qkv[rows].reshape(-1, H + 2 * G, D), [H, H + G], axis=1)
            q, k = (self.inner(self._turn(x, rows, 1)) for x in (q, k))
            q, k, v = (x.transpose(1, 0, 2) for x in (q, k, v))
            k, v = np.repeat(k, H // G, axis=0), np.repeat(v, H // G, axis=0)
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(D)
            scores = np.where(np.tri(end - first, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            yield rows, q, k, v, p, p.sum(-1, keepdims=True)

    def _attend(self):
        parts = [
            (self.inner(p) @ v / total).transpose(1, 0, 2)
            for _, _, _, v, p, total in self._sequences()
        ]
        return np.concatenate(parts).reshape(len(self.x), -1)

    def _attend_back(self, dattended):
        H, G, D, result = self.heads, self.key_heads, self.D, np.zeros_like(self.qkv)
        for rows, q, k, v, p, total in self._sequences():
            p = p / total
            d, out = (
                x[rows].reshape(-1, H, D).transpose(1, 0, 2) for x in (dattended, self.attended)
            )
            ds = self.inner(p * (d @ v.transpose(0, 2, 1) - (d * out).sum(-1, keepdims=True)))
            ds, p = ds / np.sqrt(D), self.inner(p)
            dq, dk, dv = ds @ k, ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ d
            dk, dv = (x.reshape(G, H // G, -1, D).sum(1) for x in (dk, dv))
            dq, dk, dv = (x.transpose(1, 0, 2) for x in (dq, dk, dv))
            dq, dk = self._turn(dq, rows, -1), self._turn(dk, rows, -1)
            result[rows] = np.concatenate([dq, dk, dv], axis=1).reshape(q.shape[1], -1)
        return result
