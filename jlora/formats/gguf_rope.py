"""Rotary positions in GGUF files: scaling by metadata, by tensors of divisors, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.formats.gguf_architecture import shortest
from jlora.formats.safetensors_file import one_line
from jlora.system.errors import UserError

#: The tensor in which GGUF keeps Llama 3's rotary scaling, one divisor a frequency.
ROPE_FACTORS = "rope_freqs.weight"
#: And LongRoPE's, up to the old context and beyond.
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
#: They belong to the configuration.
ROPE_TENSORS = (ROPE_FACTORS, SHORT, LONG)
#: jlora's own key: that scaling as config.json has it, JSON.
ROPE_SCALING = "jlora.rope_scaling"
CONTEXT = "original_max_position_embeddings"


def read_scaling(
    path: Path,
    name: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    rotary_size: int,
) -> dict[str, Any] | None:
    """config.json's rope_scaling; None: there is none.

    Args:
        name: of the architecture.
        tensors: those of `ROPE_TENSORS` that the file has.
        config: with rope_theta and max_position_embeddings.
        rotary_size: how many numbers of a head are turned.
    """

    def get(key: str) -> Any:
        return metadata.get(f"{name}.rope.scaling.{key}")

    known = metadata.get(ROPE_SCALING)
    if ROPE_FACTORS in tensors:
        return llama3_scaling(path, tensors[ROPE_FACTORS], config["rope_theta"], rotary_size, known)
    if SHORT in tensors and LONG in tensors:
        return longrope_scaling(metadata, name, tensors, config)
    if isinstance(known, str) and '"dynamic"' in known:  # which changes nothing up to the context
        return own_scaling(path, known)
    # In files of 2023 the factor has another name; without a type llama.cpp takes it for linear.
    factor = get("factor") or metadata.get(f"{name}.rope.scale_linear")
    kind = get("type") or ("linear" if factor else "none")
    if kind not in ("none", "linear"):
        raise UserError(
            f"{path}: rotary scaling {kind!r} is not supported; take the model from Hugging Face"
        )
    if kind == "none":
        return None
    if factor is None:
        raise KeyError(f"{name}.rope.scaling.factor")
    return {"rope_type": "linear", "factor": shortest(factor)}


def write_scaling(writer: Any, config: Mapping[str, Any]) -> None:
    """What `read_scaling` reads, the tensors aside."""
    from gguf import RopeScalingType

    kind, scaling = rope_scaling(config)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(old_context(config))
        writer.add_rope_scaling_attn_factors(amplitude(config))
    if kind in ("llama3", "dynamic", "longrope"):
        writer.add_string(ROPE_SCALING, json.dumps(config["rope_scaling"]))


def rope_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors that GGUF keeps of a rotary scaling, float32 (rotary size / 2,)."""
    kind, scaling = rope_scaling(config)
    if kind == "llama3":
        size = config["head_dim"]
        return {ROPE_FACTORS: llama3_factors(scaling, config["rope_theta"], size).astype("f")}
    if kind == "longrope":
        return {
            name: np.array(scaling[f"{length}_factor"], np.float32)
            for name, length in ((LONG, "long"), (SHORT, "short"))
        }
    return {}


def rope_scaling(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(kind, settings) of a config's rope_scaling."""
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default")), scaling


# Llama 3 ---------------------------------------------------------------------------------------


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
        CONTEXT: 8192,
    }
    try:
        scaling = scaling if known is None else json.loads(known)
        expected = llama3_factors(scaling, theta, head_dim)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise damaged(path, error) from error
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UserError(
            f"{path}: its rope_freqs are not those of Llama 3; take the model from Hugging Face"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisor of each rotary frequency that a llama3 rope_scaling means, (head_dim / 2,)."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling[CONTEXT] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def own_scaling(path: Path, known: str) -> dict[str, Any]:
    """jlora's own note of a scaling, which must be a JSON object."""
    try:
        scaling = json.loads(known)
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(scaling, dict):
        raise damaged(path, ValueError("no object"))
    return scaling


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: its {ROPE_SCALING} is damaged ({one_line(error)}); export the model again"
    )


# LongRoPE --------------------------------------------------------------------------------------


def longrope_scaling(
    metadata: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """LongRoPE's rope_scaling entry; the file has the resulting amplitude, not the factor."""
    scaling = {
        "rope_type": "longrope",
        "short_factor": [shortest(value) for value in tensors[SHORT]],
        "long_factor": [shortest(value) for value in tensors[LONG]],
        CONTEXT: metadata[f"{name}.rope.scaling.original_context_length"],
    }
    found = metadata.get(f"{name}.rope.scaling.attn_factor")
    usual = amplitude({**config, "rope_scaling": scaling})
    if found is not None and not math.isclose(found, usual, rel_tol=1e-6):
        scaling["attention_factor"] = shortest(found)
    return scaling


def amplitude(config: Mapping[str, Any]) -> float:
    """What LongRoPE multiplies turned numbers by (arXiv 2402.13753, as in transformers)."""
    _, scaling = rope_scaling(config)
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    old = old_context(config)
    factor = scaling.get("factor", config["max_position_embeddings"] / old)
    return math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0


def old_context(config: Mapping[str, Any]) -> int:
    """LongRoPE's context before it was extended."""
    return int(rope_scaling(config)[1].get(CONTEXT) or config[CONTEXT])
