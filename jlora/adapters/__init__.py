"""LoRA adapters on whole models, in PEFT's vocabulary and file format.

model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"]))
...                                    # train model.trainable_parameters()
model.save_pretrained("adapter")
model = PeftModel.from_pretrained(base, "adapter")
"""

from jlora.adapters.config import LoraConfig
from jlora.adapters.merged import MergedWeights, merged_weights
from jlora.adapters.merging import MergeReport
from jlora.adapters.model import PeftModel, get_peft_model
from jlora.adapters.partial import METHODS, PartialModel, is_partial
from jlora.adapters.tuned import TunedModel

__all__ = [
    "METHODS",
    "LoraConfig",
    "MergeReport",
    "MergedWeights",
    "PartialModel",
    "PeftModel",
    "TunedModel",
    "get_peft_model",
    "is_partial",
    "merged_weights",
]
