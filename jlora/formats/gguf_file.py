"""GGUF files -> Hugging Face names, shapes and config.json, as numpy arrays.

The names and layouts are those of llama.cpp's ``convert_hf_to_gguf.py``, undone:

* Llama: the rows of q_proj and k_proj are stored in the order of interleaved rotary pairs
  (0, d/2, 1, d/2+1, ...) of each head; Hugging Face keeps the two halves one after the other.
* GPT-2: Conv1D weights are stored as (out, in); Hugging Face has them as (in, out).
* Qwen2: stored as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.safetensors_file import one_line, placeholder
from jlora.system.errors import UserError
from jlora.system.files import os_error
from jlora.system.text import check_no_pointer

QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

#: Texts in lists of the metadata; each becomes some objects. 256,000 tokens with their merges make
#: a million.
MOST_ENTRIES = 2**21

#: The tensor in which GGUF keeps Llama 3's rotary scaling, one divisor a frequency.
ROPE_FACTORS = "rope_freqs.weight"
#: jlora's own key: Llama 3's scaling as config.json has it, where it is not Meta's own.
ROPE_SCALING = "jlora.rope_scaling"
#: Settings under ``<architecture>.`` that change results and are not computed here, with the values
#: that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "use_parallel_residual": (False,),
}
#: Settings that are one number for all layers here.
COUNTS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
)

LLAMA_BLOCKS, GPT2_BLOCKS = "model.layers", "transformer.h"
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass
class GGUFFile:
    """What a GGUF file holds, in Hugging Face's terms.

    ``tensors``: name -> float32 array; ``config``: as in config.json; ``metadata``: the file's own
    key-value pairs (tokenizer included).
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(repr=False)
    metadata: dict[str, Any] = field(repr=False)


def read_gguf(
    path: str | Path,
    shapes_only: bool = False,
    check: Callable[[GGUFFile], None] | None = None,
) -> GGUFFile:
    """Read a GGUF file of the llama, qwen2 or gpt2 architecture.

    Args:
        shapes_only: read no weights; the arrays are `placeholder`.
        check: called before the weights are read, with what ``shapes_only`` would give; an error
            that it raises ends the reading.

    Raises:
        UserError: no GGUF file, truncated, an unknown architecture or tensor, or a quantization
            other than F32, F16, BF16, Q8_0, Q4_0, Q4_1.
    """
    path = Path(path)
    reader = open_gguf(path)
    metadata = read_metadata(path, reader)
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "qwen2", "gpt2"):
        raise UserError(
            f"{path}: architecture {architecture!r}; only llama, qwen2 and gpt2 are read from GGUF"
        )
    names = (LLAMA_NAMES, LLAMA_BLOCKS) if architecture != "gpt2" else (GPT2_NAMES, GPT2_BLOCKS)
    raw = read_tensors(path, reader, shapes_only=True)
    factors = raw.pop(ROPE_FACTORS, None)
    shapes = rename(path, raw, *names)
    try:
        check_metadata(path, architecture, metadata)
        if architecture == "gpt2":
            config = gpt2_config(metadata, shapes)
            shapes = {n: a.T if is_conv1d(n) else a for n, a in shapes.items()}
        else:
            config = llama_config(path, architecture, metadata, shapes, factors)
    except KeyError as error:
        raise UserError(
            f"{path}: the GGUF file lacks {error.args[0]}; convert the model again with a current "
            "llama.cpp"
        ) from error
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{key}_token_id"] = None if value is None else int(value)
    outline = GGUFFile(path, config, shapes, metadata)
    if check is not None:
        check(outline)
    if shapes_only:
        return outline
    raw = read_tensors(path, reader)
    raw.pop(ROPE_FACTORS, None)
    tensors = rename(path, raw, *names)
    for name in list(tensors):
        if name not in shapes:  # GPT-2's embedding again, as its head
            del tensors[name]
        elif architecture == "gpt2" and is_conv1d(name):
            tensors[name] = np.ascontiguousarray(tensors[name].T)
        elif architecture == "llama" and ".q_proj." in name:
            tensors[name] = unpermute(tensors[name], config["num_attention_heads"])
        elif architecture == "llama" and ".k_proj." in name:
            tensors[name] = unpermute(tensors[name], config["num_key_value_heads"])
    return GGUFFile(path, config, tensors, metadata)


def read_metadata(path: Path, reader: Any) -> dict[str, Any]:
    """The key-value pairs of an open file."""
    try:
        return {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:
        raise damaged(path, error) from error


def read_tensors(path: Path, reader: Any, shapes_only: bool = False) -> dict[str, np.ndarray]:
    """Dequantized float32 tensors of an open file, under its own names.

    Args:
        shapes_only: give `placeholder` arrays; only `ROPE_FACTORS`, which belong to the
            configuration, are read.
    """
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind.name not in QUANTIZATIONS:
            raise UserError(
                f"{path}: tensor {tensor.name} is quantized as {kind.name}; only "
                f"{', '.join(QUANTIZATIONS)} are read: take a file of one of these kinds"
            )
        # GGUF lists the fastest dimension first.
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if shapes_only and tensor.name != ROPE_FACTORS:
            tensors[tensor.name] = placeholder(shape)
            continue
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are the file's own
                array = dequantize(tensor.data, kind).astype(np.float32)
            # The copy lets go of the mapped file.
            tensors[tensor.name] = np.array(array.reshape(shape))
        except Exception as error:
            raise damaged(path, error) from error
    return tensors


def open_gguf(path: Path) -> Any:
    """The gguf package's reader of a file, which finds fault with what the package overlooks.

    Raises:
        UserError: the file cannot be read, or is no GGUF file or a damaged one.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        entries = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            # The package takes as much as there is, and counts on for ever where nothing is left.
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,} of {end:,}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            start = int(orig_offs)
            kind, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
            scalar = self.gguf_scalar_to_np.get(int(kind[0]))
            if scalar is not None:
                # The package makes two objects of every number; this makes one of all.
                values = self._get(start + 12, scalar, count[0])
                types = [GGUFValueType.ARRAY, GGUFValueType(int(kind[0]))]
                return 12 + values.nbytes, [kind, count, values], [2], types
            self.entries += int(count[0])
            if self.entries > MOST_ENTRIES:
                raise ValueError(f"its metadata have over {MOST_ENTRIES:,} texts")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
            check_no_pointer(head, path)
            if head[:4] != b"GGUF":
                raise UserError(f"{path}: not a GGUF file (it does not begin with `GGUF`)")
        reader = Reader(path)
        if sum(int(tensor.n_bytes) for tensor in reader.tensors) > len(reader.data):
            raise ValueError("its tensors overlap")
    except OSError as error:
        raise os_error("read", path, error) from error
    except UserError:
        raise
    except Exception as error:  # the reader indexes into the file without checks of its own
        raise damaged(path, error) from error
    return reader


def main_kind(path: Path) -> str:
    """The type in which a GGUF file holds most of its numbers, such as Q4_1."""
    sizes: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return sizes.most_common(1)[0][0]


def damaged(path: Path, error: BaseException) -> UserError:
    """The error for a file that the gguf package cannot walk through."""
    return UserError(
        f"{path}: a damaged or incomplete GGUF file ({one_line(error)[:200]}); download it again"
    )


def rename(
    path: Path, raw: dict[str, np.ndarray], names: dict[str, str], blocks: str
) -> dict[str, np.ndarray]:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    tensors = {}
    for name, array in raw.items():
        parts = name.split(".")
        middle = ""
        if parts[0] == "blk" and len(parts) == 4 and parts[1].isdecimal():
            middle = f"{blocks}.{parts[1]}."
            parts = parts[2:]
        if len(parts) != 2 or parts[0] not in names:
            raise UserError(
                f"{path}: tensor {name} has no place in this architecture (mixtures of experts and "
                "other variants are not supported)"
            )
        tensors[f"{middle}{names[parts[0]]}.{parts[1]}"] = array
    return tensors


def check_metadata(path: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
    """Refuse settings that would change results and are not computed here.

    Raises:
        UserError: one of `NEUTRAL` has another value, a sliding window is shorter than the context,
            or a number of `COUNTS` is something else, such as a list with one for each layer.
    """

    def get(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    wrong = [key for key, fine in NEUTRAL.items() if get(key) is not None and get(key) not in fine]
    window = get("attention.sliding_window")
    if window and window < (get("context_length") or 0):
        wrong.append("attention.sliding_window")
    head = get("attention.key_length") or 0
    for key in ("attention.value_length", "rope.dimension_count"):
        if head and get(key) is not None and get(key) != head:
            wrong.append(key)
    wrong += [k for k in COUNTS if get(k) is not None and (type(get(k)) is not int or get(k) < 1)]
    if wrong:
        raise UserError(
            f"{path}: {architecture}.{wrong[0]} is {get(wrong[0])!r}, which is not supported; take "
            "another model"
        )


def is_conv1d(name: str) -> bool:
    """Whether a GPT-2 tensor is the weight of a Conv1D, (in, out) in Hugging Face's layout."""
    return name.endswith(".weight") and ("attn.c_" in name or "mlp.c_" in name)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q_proj and k_proj: (heads * d, ...) -> the same shape."""
    half = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def shortest(value: float) -> float:
    """A float32 of the metadata as the number someone wrote: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def llama_config(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """config.json of a Llama or Qwen2 model."""

    def get(key: str) -> Any:
        return metadata[f"{architecture}.{key}"]

    heads = get("attention.head_count")
    if "model.embed_tokens.weight" not in tensors:
        raise KeyError("token_embd.weight")
    hidden = get("embedding_length")
    head_dim = metadata.get(f"{architecture}.attention.key_length") or hidden // heads
    config = {
        "model_type": architecture,
        "architectures": ["Qwen2ForCausalLM" if architecture == "qwen2" else "LlamaForCausalLM"],
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(metadata.get(f"{architecture}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if architecture == "llama":  # Qwen2's biases are part of its architecture
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    factor = factor or metadata.get(f"{architecture}.rope.scale_linear")  # in files of 2023
    # llama.cpp takes a factor without a type for linear scaling.
    kind = metadata.get(f"{architecture}.rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear"):
        raise UserError(
            f"{path}: rotary scaling {kind!r} is not supported; take the model from Hugging Face"
        )
    if kind == "linear":
        factor = shortest(factor or get("rope.scaling.factor"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if factors is not None:
        known = metadata.get(ROPE_SCALING)
        config["rope_scaling"] = llama3_scaling(
            path, factors, config["rope_theta"], head_dim, known
        )
    return config


def llama3_scaling(
    path: Path,
    factors: np.ndarray,
    theta: float,
    head_dim: int,
    known: str | None = None,
) -> dict[str, Any]:
    """Llama 3's rope_scaling entry from the per-frequency divisors that GGUF keeps instead.

    Every Llama 3.x has low 1, high 4 and 8192 original positions, only the factor differs (8 or
    32). The divisors are computed again from that, or from what jlora wrote beside them
    (``known``, JSON), and must agree: otherwise nothing is guessed.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    try:
        scaling = scaling if known is None else json.loads(known)
        expected = llama3_factors(scaling, theta, head_dim)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: its {ROPE_SCALING} is damaged ({one_line(error)}); export the model again"
        ) from error
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UserError(
            f"{path}: its rope_freqs are not those of Llama 3; take the model from Hugging Face"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisor of each rotary frequency that a llama3 rope_scaling means, (head_dim / 2,)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def gpt2_config(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """config.json of a GPT-2 model; a repeated embedding under ``output`` is dropped."""
    for name, key in (
        ("transformer.wte.weight", "token_embd"),
        ("transformer.wpe.weight", "position_embd"),
    ):
        if name not in tensors:
            raise KeyError(f"{key}.weight")
    embedding = tensors["transformer.wte.weight"]
    head = tensors.get("lm_head.weight")
    # Quantizers may store the two copies with different precision; GPT-2 has only one.
    if head is not None and head.shape == embedding.shape:
        del tensors["lm_head.weight"]
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": embedding.shape[0],
        "n_positions": tensors["transformer.wpe.weight"].shape[0],
        "n_embd": metadata["gpt2.embedding_length"],
        "n_layer": metadata["gpt2.block_count"],
        "n_head": metadata["gpt2.attention.head_count"],
        "n_inner": metadata["gpt2.feed_forward_length"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shortest(metadata["gpt2.attention.layer_norm_epsilon"]),
        "tie_word_embeddings": True,
    }
