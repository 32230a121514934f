"""Small random language models whose output is varied enough to test decoding."""

from __future__ import annotations

from pathlib import Path

#: kind -> configuration; the tiny ones become fixtures of the tests
CONFIGS = {
    "gpt2": {"vocab_size": 60, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "tiny-gpt2": {"vocab_size": 24, "n_positions": 20, "n_embd": 8, "n_layer": 2, "n_head": 2},
    "llama": {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "tiny-llama": {
        "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24,
    },
}  # fmt: skip
#: GPT-2's tokens from this id on occur in prompts only and are never generated.
SILENT = 50
#: Tokens with a raised probability: used as end tokens, they end texts at many lengths.
ENDS = (3, 8, 9)


def make_model(kind: str, seed: int, folder: Path) -> None:
    """Write a transformers model into a folder.

    The weights are large enough that some tokens are likely, and that these depend on the tokens
    before. In GPT-2 the last channel of the output is constant, which gives each token a bias.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    if kind.endswith("gpt2"):
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=3, **CONFIGS[kind]))
    else:
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.2 * noise + name.endswith("weight"))
            else:
                parameter.copy_(1.8 * parameter.shape[-1] ** -0.5 * noise)
        if kind.endswith("gpt2"):
            model.transformer.ln_f.weight[-1] = 0
            model.transformer.ln_f.bias[-1] = 10
            model.transformer.wte.weight[:, -1] = 0
            model.transformer.wte.weight[list(ENDS), -1] = 0.1
            model.transformer.wte.weight[SILENT:, -1] = -4
        else:
            model.lm_head.weight[list(ENDS)] *= 1.3
    model.save_pretrained(folder)


def load_reference(folder: Path):
    """The model in transformers, without decoding settings of its own."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(1)  # such small models gain nothing from threads
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig()
    return model
