"""config.json of the Llama family, and what other families' configs start from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from jlora.models.config_fields import check_not_computed, known_fields, number
from jlora.models.rope import Rope, make_rope, rope_settings
from jlora.models.windows import FULL, SLIDING, check_unused_windows, read_windows

SILU = ("silu", "swish")  # two names of one function


@dataclass
class LlamaConfig:
    """The fields of a Llama-family ``config.json`` that change what is computed."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    model_type: str = "llama"
    sliding_window: int | None = None
    layer_types: list[str] | None = None  # None: no layer has a window
    gated: ClassVar[bool] = True
    #: model_type -> transformers' class.
    architectures: ClassVar[dict[str, str]] = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    }
    #: model_type -> what transformers takes for fields that a file lacks, where it is not Llama's.
    defaults: ClassVar[dict[str, dict]] = {
        "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8},
        "qwen2": {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    }
    #: model_type -> switches for biases that transformers' class does not read.
    unread: ClassVar[dict[str, tuple[str, ...]]] = {
        "mistral": ("attention_bias", "mlp_bias"),
        "qwen2": ("attention_bias", "mlp_bias"),
    }
    #: The field that names the activation, and its names for this family's.
    activation: ClassVar[tuple[str, tuple[str, ...]]] = ("hidden_act", SILU)
    #: Fields of `config_fields.NEUTRAL` that this family computes.
    computed: ClassVar[tuple[str, ...]] = ()
    #: Whether transformers' class reads ``layer_types``; by model_type.
    lists_layers: ClassVar[tuple[str, ...]] = ("qwen2",)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict) -> LlamaConfig:
        """Take what this class knows out of a ``config.json``.

        Raises:
            ValueError: the file asks for something that is not built here.
        """
        model_type = config.get("model_type", cls.model_type)
        if model_type not in cls.architectures:
            types = ", ".join(cls.architectures)
            raise ValueError(f"model_type {model_type!r} is not one of {types}")
        config = {**cls.defaults.get(model_type, {}), **config, "model_type": model_type}
        config.update(dict.fromkeys(cls.unread.get(model_type, ()), False))
        config = cls.read_rope(config)
        layers = ("sliding_window", "layer_types")
        result = cls(**known_fields(cls, {k: v for k, v in config.items() if k not in layers}))
        check_not_computed(config, computed=cls.computed)
        result.sliding_window, result.layer_types = cls.read_layers(config, result)
        field, names = cls.activation
        if config.get(field, names[0]) not in names:
            raise ValueError(f"{field} {config[field]!r} is not supported")
        result.check_sizes(config)
        result.ropes()
        return result

    @classmethod
    def read_rope(cls, config: dict) -> dict:
        """The config with the rotary embedding's base and scaling in two fields."""
        theta, scaling = rope_settings(config)
        return {**config, "rope_theta": theta, "rope_scaling": scaling}

    @classmethod
    def read_layers(cls, config: dict, result: LlamaConfig) -> tuple[int | None, list[str] | None]:
        """The window, and the kind of each layer where some have a window."""
        layers, model_type = result.num_hidden_layers, result.model_type
        own, window = [FULL] * layers, config.get("sliding_window", 4096)  # as in transformers
        config = {**config, "sliding_window": window}
        if model_type == "mistral":
            own = [FULL if window is None else SLIDING] * layers
        elif model_type not in cls.lists_layers:
            if config.get("use_sliding_window"):
                raise ValueError(f"use_sliding_window true is not computed for {model_type}")
        elif config.get("use_sliding_window"):
            first = config.get("max_window_layers", 28)
            number("max_window_layers", first, above=-1)
            own = [FULL if window is None or i < first else SLIDING for i in range(layers)]
        else:
            check_unused_windows(config)
        return read_windows(config, layers, own, model_type in cls.lists_layers)

    def check_sizes(self, config: dict) -> None:
        """Raises: ValueError: sizes that no attention can have."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if config.get("head_dim") is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{heads}, and there is no head_dim"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary embedding takes pairs")
        if self.rotary_size < 2 or self.rotary_size % 2:
            share = getattr(self, "partial_rotary_factor", 1.0)
            raise ValueError(
                f"partial_rotary_factor {share} turns {self.rotary_size} of a head's "
                f"{self.head_dim} numbers, and rotary embedding takes pairs"
            )

    def to_dict(self) -> dict:
        """What ``config.json`` holds, transformers' architecture name included."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.model_type == "mistral":
            values.pop("layer_types", None)
            values["sliding_window"] = self.sliding_window  # absent means a window to transformers
        elif self.layer_types is not None:
            values["use_sliding_window"] = True
        architecture = self.architectures[self.model_type]
        field, names = self.activation
        return {"architectures": [architecture], field: names[0], **values}

    # What `models.llama`'s modules are made of; a family's config overrides what is different.

    @property
    def windows(self) -> list[int | None]:
        """How many tokens each layer sees; None: all."""
        types = self.layer_types or [FULL] * self.num_hidden_layers
        return [self.sliding_window if kind == SLIDING else None for kind in types]

    def ropes(self) -> list[Rope]:
        """The rotary positions that layers can have."""
        scaling, context = self.rope_scaling, self.max_position_embeddings
        return [make_rope(self.rope_theta, self.rotary_size, scaling, context)]

    @property
    def layer_ropes(self) -> list[int | None]:
        """Which of `ropes` turns queries and keys of each layer; None: none."""
        return [0] * self.num_hidden_layers

    @property
    def rotary_size(self) -> int:
        """How many numbers of a head are turned."""
        return self.head_dim

    @property
    def score_scale(self) -> float | None:
        """What scores are multiplied by; None: 1 / sqrt(head_dim)."""
        return None

    @property
    def score_cap(self) -> float | None:
        """See `CausalAttention`."""
        return None

    @property
    def logit_cap(self) -> float | None:
        """See `LanguageHead`."""
        return None

    @property
    def norm_offset(self) -> float:
        """See `RMSNorm`."""
        return 0.0

    @property
    def embedding_scale(self) -> float:
        """What the embeddings of tokens are multiplied by."""
        return 1.0

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has biases on q, k and v alone; ``attention_bias`` puts them on o as well."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        return self.attention_bias

    @property
    def layers(self) -> int:
        return self.num_hidden_layers

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings

    @property
    def heads(self) -> int:
        return self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.intermediate_size

    @property
    def norm_eps(self) -> float:
        return self.rms_norm_eps
