"""A small model of every family: sizes that the block operator takes, short windows, low caps."""

from __future__ import annotations

from tiny_models import randomise

from jlora.models.hub import build_model

WIDE = {
    "vocab_size": 23, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
USED = {**WINDOW, "use_sliding_window": True}
TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.5] * 8,
    "long_factor": [2.0, 3.0] * 8,
}
GEMMA = {**WINDOW, **TYPES, "query_pre_attn_scalar": 20}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
ALL = {
    "mistral": {"model_type": "mistral", **WINDOW},
    "qwen2": {"model_type": "qwen2", **USED, **TYPES},
    "qwen3": {"model_type": "qwen3", **USED, "max_window_layers": 1},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "olmo2": {"model_type": "olmo2"},
    "olmo2-one-key-head": {"model_type": "olmo2", "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **GEMMA, **CAPS},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "rope_local_base_freq": 50.0},
    "phi3": {
        "model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 20,
        **WINDOW,
    },
    "glm": {"model_type": "glm", "head_dim": 64},
    "glm4": {"model_type": "glm4", "head_dim": 64},
    "internlm2": {"model_type": "internlm2"},
    "internlm3": {"model_type": "internlm3"},
}  # fmt: skip
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Linear layers where they are not `LAYERS`.
OTHER_LAYERS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "glm": [*LAYERS[:4], "gate_up_proj", "down_proj"],
    "glm4": [*LAYERS[:4], "gate_up_proj", "down_proj"],
    "internlm2": ["wqkv", "wo", "w1", "w2", "w3"],
}


def tiny(name: str, seed: int = 0, scale: float = 0.15, **changes):
    """A model of `ALL` with random weights; its norms multiply by about 1."""
    model = randomise(build_model({**WIDE, **ALL[name], **changes}), seed, scale)
    if model.config.norm_offset:
        for parameter in model.parameters():
            if len(parameter.shape) == 1:
                parameter -= model.config.norm_offset
        model.model.embedding_scale = 1.5  # 8 would leave the blocks no say
    return model
