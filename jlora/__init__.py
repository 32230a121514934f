"""LoRA fine-tuning for Jittor."""
