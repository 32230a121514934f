"""A GPT-2 of two small layers with its own tokenizer, so that a whole run takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jlora.data.tasks.restaurants import corpus
from jlora.formats.safetensors_file import write_safetensors

WIDTH = 32
CONTEXT = 128
END = "<|endoftext|>"


def train_tokenizer(size: int = 400) -> Tokenizer:
    """A byte-level BPE learned from the built-in corpus; the end token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{each.prompt} {each.completion}" for each in corpus("train")[:200]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def weights(vocab: int, width: int = WIDTH, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names."""
    random = np.random.default_rng(seed)
    tensors = {"wte.weight": (vocab, width), "wpe.weight": (CONTEXT, width)}
    for layer in range(2):
        for norm in ("ln_1", "ln_2"):
            tensors[f"h.{layer}.{norm}.weight"] = tensors[f"h.{layer}.{norm}.bias"] = (width,)
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            tensors[f"h.{layer}.{name}.weight"] = (inputs, outputs)
            tensors[f"h.{layer}.{name}.bias"] = (outputs,)
    tensors["ln_f.weight"] = tensors["ln_f.bias"] = (width,)
    return {
        f"transformer.{name}": (random.standard_normal(shape) * 0.1).astype(np.float32)
        for name, shape in tensors.items()
    }


def config(vocab: int, width: int = WIDTH) -> dict:
    return {
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": CONTEXT,
        "n_embd": width,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_model(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """config.json, model.safetensors and tokenizer.json in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    vocab = tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config(vocab, width)))
    write_safetensors(folder / "model.safetensors", weights(vocab, width, seed))
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chat_model(folder: Path, seed: int = 0) -> Path:
    """`write_model` with ChatML's tokens (400 and 401) and template."""
    write_model(folder, seed=seed)
    tokenizer = train_tokenizer()
    special = [AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config(402)))
    write_safetensors(folder / "model.safetensors", weights(402, seed=seed))
    return folder
