"""How one architecture stands in GGUF files, and the layouts of weights there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlora.formats.lazy import Blocks, LazyArray


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF files, in Hugging Face's terms.

    Attributes:
        name: ``general.architecture``.
        transformers: the class in config.json.
        names: module in the file -> Hugging Face's, inside a block relative to it.
        blocks: Hugging Face's name of the list of blocks.
        read_config: (this, path, metadata, tensors, rotary tensors by name)
            -> config.json; KeyError: the file lacks that key.
        write_metadata: (gguf's writer, config.json) -> None: what llama.cpp needs to know.
        model_type: in config.json; "": as ``name``.
        transposed: modules whose weights are (in, out) in Hugging Face's layout.
        permuted: module with interleaved rows in the file -> field with its number of heads.
        plus_one: norms that multiply by 1 + w; the file has that sum.
        fused: module of queries, keys and values together, by groups, that are apart in the file:
            as ``MODULE.q``, ``MODULE.k`` and ``MODULE.v`` in ``names``; "": there is none.
        computed: settings in `gguf_file.NEUTRAL` that are computed.
        part_turned: whether rotary positions may turn a part of each head.
        windows: whether jlora reads sliding windows; whether llama.cpp computes them.
        biases: whether llama.cpp has biases behind attention and in the MLP.
        own_head: whether llama.cpp asks for a head beside the embedding.
        check: (config.json) -> why llama.cpp would compute something else, or None.
        pre: how the tokenizer of every model of it splits texts, `tokenizer.ggml.pre`; None: they
            differ.
    """

    name: str
    transformers: str
    names: Mapping[str, str] = field(repr=False)
    blocks: str
    read_config: Callable[..., dict[str, Any]] = field(repr=False)
    write_metadata: Callable[[Any, Mapping[str, Any]], None] = field(repr=False)
    model_type: str = ""
    transposed: tuple[str, ...] = ()
    permuted: Mapping[str, str] = field(default_factory=dict)
    plus_one: tuple[str, ...] = ()
    fused: str = ""
    computed: tuple[str, ...] = ()
    part_turned: bool = False
    windows: tuple[bool, bool] = (False, False)
    biases: bool = False
    own_head: bool = False
    check: Callable[[Mapping[str, Any]], str | None] | None = field(default=None, repr=False)
    pre: str | None = None

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor, by Hugging Face's name, is stored the other way round."""
        module, _, last = name.rpartition(".")
        return last == "weight" and module.endswith(self.transposed)

    def heads(self, name: str, config: Mapping[str, Any]) -> int | None:
        """The number of heads among which a tensor's rows are interleaved in the file, or None."""
        module = name.rpartition(".")[0]
        fields = [key for end, key in self.permuted.items() if module.endswith(end)]
        return config[fields[0]] if fields else None

    def to_file(self, name: str, array: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
        """A tensor in the file's layout; of a fused layer, one part of it."""
        heads = self.heads(name, config)
        if self.is_transposed(name):
            array = array.T
        elif heads is not None:
            array = permute(array, heads)
        elif self.adds_one(name):
            array = array + np.float32(1)
        return np.ascontiguousarray(array)

    def file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `to_file` gives an array of ``shape``."""
        return shape[::-1] if self.is_transposed(name) else shape

    def from_file(self, name: str, array: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
        """The inverse of `to_file`."""
        heads = self.heads(name, config)
        if self.is_transposed(name):
            return np.ascontiguousarray(array.T)
        if heads is not None:
            return unpermute(array, heads)
        return array - np.float32(1) if self.adds_one(name) else array

    def our_blocks(self, name: str, array: LazyArray, config: Mapping[str, Any]) -> Blocks | None:
        """The file's blocks of a tensor, its rows in our order."""
        blocks, heads = array.blocks, self.heads(name, config)
        if blocks is None or heads is None:
            return blocks
        return Blocks(blocks.kind, lambda: unpermute(blocks.read(), heads))

    def check_shape(self, name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
        """Raises: ValueError: `from_file` cannot put rows of that many heads in order."""
        heads = self.heads(name, config)
        if heads is not None and (not shape or shape[0] % (2 * heads)):
            raise ValueError(f"{name} has {shape[:1]} rows for {heads} heads")

    def adds_one(self, name: str) -> bool:
        return bool(self.plus_one) and name.rpartition(".")[0].endswith(self.plus_one)

    def split(
        self, name: str, array: np.ndarray, config: Mapping[str, Any]
    ) -> list[tuple[str, np.ndarray]]:
        """The file's parts of a tensor: itself, or queries, keys and values of a fused one."""
        module, _, last = name.rpartition(".")
        if not self.fused or not module.endswith(self.fused):
            return [(name, array)]
        groups = config["num_key_value_heads"]
        share = config["num_attention_heads"] // groups
        # Of each group its queries, a key and a value, each of D rows.
        rows = array.reshape(groups, share + 2, -1, *array.shape[1:])
        parts = {"q": rows[:, :share], "k": rows[:, share], "v": rows[:, share + 1]}
        rest = array.shape[1:]
        return [(f"{module}.{key}.{last}", part.reshape(-1, *rest)) for key, part in parts.items()]

    def join(self, tensors: dict[str, LazyArray], config: Mapping[str, Any]) -> None:
        """Put the parts of fused layers together again, in place."""
        if not self.fused:
            return
        groups = config["num_key_value_heads"]
        for name in [n for n in tensors if f"{self.fused}.q." in n]:
            module, _, last = name.rpartition(".q.")
            parts = [tensors.pop(f"{module}.{key}.{last}") for key in "qkv"]
            for part in parts:
                if len(part) % groups or part.shape[1:] != parts[0].shape[1:]:
                    raise ValueError(f"{module} has a part of shape {part.shape}")
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            read, blocks = functools.partial(_joined, parts, groups), None
            kinds = {part.blocks and part.blocks.kind for part in parts}
            if len(kinds) == 1 and None not in kinds:
                own = [part.blocks for part in parts]
                blocks = Blocks(*kinds, functools.partial(_joined, own, groups))
            tensors[f"{module}.{last}"] = LazyArray(shape, np.float32, read, blocks)


def _joined(parts: Sequence[LazyArray | Blocks], groups: int) -> np.ndarray:
    """Rows of queries, keys and values: of each group its queries, its keys, its values."""
    arrays = [part.read() for part in parts]
    rest = arrays[0].shape[1:]
    rows = [array.reshape(groups, -1, *rest) for array in arrays]
    return np.concatenate(rows, axis=1).reshape(-1, *rest)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of q_proj and k_proj in llama.cpp's order; inverse of `unpermute`."""
    half = rows.shape[0] // heads // 2
    halves = rows.reshape(heads, 2, half, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q_proj and k_proj: (heads * d, ...) -> the same shape."""
    half = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def shortest(value: float) -> float:
    """A float32 of the metadata as the number someone wrote: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))
