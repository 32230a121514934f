"""The benchmarks' models and batches, and their floating-point operations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
MODELS = {
    "gpt2-small": {**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {**GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def lora_settings(model: str, all_linear: bool = False) -> dict:
    """The paper's: rank 4 and alpha 32 on query and value; or on all linear layers."""
    shared = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1}
    if all_linear:
        return {**shared, "target_modules": "all-linear"}
    if model.startswith("gpt2"):
        return {**shared, "target_modules": ["c_attn"], "enable_lora": [True, False, True]}
    return {**shared, "target_modules": ["q_proj", "v_proj"]}


def even_batches(path: Path, vocabulary: int, rows: int, tokens: int, count: int = 4) -> Path:
    """Batches of equal rows, the second half of each being targets."""
    rng = np.random.default_rng(0)
    lengths = [np.full(rows, tokens)] * count
    return write_batches(path, rng, vocabulary, lengths, [lens // 2 for lens in lengths])


def e2e_batches(path: Path, data: Path, model: str, rows: int, count: int) -> Path:
    """Batches with the lengths that E2E's training rows have, grouped by length as in training.

    The tokens themselves are random: they do not change the time.
    """
    from jlora.data.batches import BatchOrder, encode_examples
    from jlora.data.tasks import get_task

    examples = get_task("e2e").read(data / "e2e" / "train.txt")[::10]
    encoded = encode_examples(examples, tokenizer_of(model), None, 0, 0)
    order = BatchOrder(
        [e.input_length for e in encoded], rows, 1, group_by_length=True, shuffle=True
    )
    lengths, starts = [], []
    for i in range(count):
        chosen = [encoded[row] for row in order.batch(i)]
        lengths.append(np.array([e.input_length for e in chosen]))
        starts.append(np.array([e.prompt_length - 1 for e in chosen]))
    rng = np.random.default_rng(0)
    return write_batches(path, rng, MODELS[model]["vocab_size"], lengths, starts)


def tokenizer_of(model: str):
    """SmolLM2's tokenizer, which a package contains; it splits E2E's texts much like GPT-2's."""
    from jlora.data.pull_models import pull
    from jlora.data.tokenizer import Tokenizer

    return Tokenizer.from_folder(pull("smollm2-135m"))


def write_batches(path: Path, rng, vocabulary: int, lengths, starts) -> Path:
    arrays = {"count": np.array(len(lengths))}
    for i, (lens, begins) in enumerate(zip(lengths, starts)):
        T = int(lens.max())
        columns = np.arange(T)
        ids = rng.integers(0, vocabulary, (len(lens), T + 1)).astype(np.int32)
        mask = (columns >= begins[:, None]) & (columns < lens[:, None])
        arrays.update({
            f"ids{i}": np.where(columns < lens[:, None], ids[:, :-1], 0).astype(np.int32),
            f"targets{i}": ids[:, 1:].copy(),
            f"mask{i}": mask.astype(np.float32),
            f"lengths{i}": lens.astype(np.int32),
        })  # fmt: skip
    np.savez(path, **arrays)
    return path


def training_flops(config: dict, lengths: np.ndarray, targets: int) -> float:
    """Floating-point operations that a LoRA step needs: forward, and the gradient of every input.

    Counted are products with frozen weights at real tokens, attention's two products below the
    diagonal, and the head at target positions only; each once forward and once backward (attention
    twice backward). LoRA's own products and element-wise operations are not counted.
    """
    tokens, squares = int(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    if config["model_type"] == "gpt2":
        width, layers = config["n_embd"], config["n_layer"]
        weights = 12 * width * width
    else:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
        weights = 2 * width * width + 2 * width * kv + 3 * width * config["intermediate_size"]
    products = 2 * 2 * tokens * weights * layers
    attention = 3 * 2 * 2 * squares / 2 * width * layers
    head = 2 * 2 * targets * width * config["vocab_size"]
    return products + attention + head
