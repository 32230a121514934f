"""SmolLM3: Llama without rotary positions in every fourth layer (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.models import llama
from jlora.models.windows import FULL, SLIDING, check_unused_windows, read_windows


@dataclass
class SmolLM3Config(llama.LlamaConfig):
    model_type: str = "smollm3"
    no_rope_layers: list[int] | None = None  # of each layer: 1 with rotary positions, 0 without
    computed: ClassVar = ("no_rope_layers",)
    architectures: ClassVar = {"smollm3": "SmolLM3ForCausalLM"}
    defaults: ClassVar = {
        "smollm3": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        }
    }

    @classmethod
    def from_dict(cls, config: dict) -> SmolLM3Config:
        layers = config.get("num_hidden_layers", cls.defaults["smollm3"]["num_hidden_layers"])
        turned, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
        if turned is None:
            if type(every) is not int or every < 1:
                raise ValueError(f"no_rope_layer_interval is {every!r}, no whole number above 0")
            numbers = range(layers) if type(layers) is int else ()
            turned = [int((layer + 1) % every != 0) for layer in numbers]
        if not isinstance(turned, list) or not all(t in (0, 1) for t in turned):
            raise ValueError(f"no_rope_layers {turned!r} is not a list of 0 and 1")
        if type(layers) is int and len(turned) != layers:
            raise ValueError(
                f"no_rope_layers has {len(turned)} entries, and the model {layers} layers"
            )
        return super().from_dict({**config, "no_rope_layers": turned})

    @classmethod
    def read_layers(cls, config, result):
        windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
        own = [SLIDING if windowed and not turned else FULL for turned in result.no_rope_layers]
        if not windowed:
            check_unused_windows(config)
        return read_windows(config, result.num_hidden_layers, own, listed=True)

    @property
    def layer_ropes(self):
        return [0 if turned else None for turned in self.no_rope_layers]


class SmolLM3ForCausalLM(llama.LlamaForCausalLM):
    pass
