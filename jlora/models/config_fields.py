"""Checks of config.json that the model families share: types, and fields that are not computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

#: Fields with which other models change what is computed, and their values that change nothing.
#: transformers' classes of the supported families read some of these (cross-attention, pruned
#: heads); the rest tell that another architecture goes by a supported name.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "alibi": (None, False),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "full_attn_mod": (None, 1),
    "interpolate_factor": (None, 1),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "lm_head_bias": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "qk_layernorm": (None, False),
    "qk_norm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "rotary_pct": (None, 1),
    "scale_emb": (None, 1),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
}


def check_not_computed(
    config: Mapping[str, Any],
    also: Mapping[str, tuple[Any, ...]] = {},
    computed: Collection[str] = (),
) -> None:
    """Refuse a config.json with a field that would change results and is not computed here.

    Args:
        also: more fields like `NEUTRAL`'s, of one family.
        computed: those of `NEUTRAL` that the family computes.

    Raises:
        ValueError: a field has another value than those that change nothing.
    """
    for name, neutral in {**NEUTRAL, **also}.items():
        if name in config and name not in computed and config[name] not in neutral:
            raise ValueError(f"{name} {shown(config[name])} is not supported")


def number(name: str, value: Any, above: float = 0.0) -> float:
    """``value`` if it is a finite number above a bound.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    if value <= above:
        raise ValueError(f"{name} is {value}, and must be above {above:g}")
    return value


def known_fields(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that a config.json has, their types checked.

    A null means "not given" where the field may be None, and false for a switch, as in
    transformers. Token ids are taken as they are.

    Raises:
        ValueError: a value of another type, named with its field.
    """
    values = {}
    for field in fields(cls):
        if field.name not in config or field.name.endswith("_token_id"):
            continue
        value, kind = config[field.name], str(field.type)
        if value is None and kind.endswith("| None"):
            pass
        elif kind.startswith("bool"):
            value = False if value is None else value
            if not isinstance(value, bool):
                raise ValueError(f"{field.name} is {shown(value)}, not true or false")
        elif kind.startswith("int"):
            if type(value) is not int or value < 1:
                raise ValueError(f"{field.name} is {shown(value)}, no whole number above 0")
        elif kind.startswith("float"):
            number(field.name, value)
        elif kind.startswith("str") and not isinstance(value, str):
            raise ValueError(f"{field.name} is {shown(value)}, not a text")
        values[field.name] = value
    tokens = ("bos_token_id", "eos_token_id")
    return {**values, **{name: config[name] for name in tokens if name in config}}


def shown(value: Any) -> str:
    """A JSON value much as its file has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return repr(value)
