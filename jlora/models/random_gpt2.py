"""GPT-2 files with random weights, to try a recipe before its real ones are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jlora.formats.torch_write import write_torch
from jlora.system.errors import UserError
from jlora.system.files import make_folder

#: Width and number of blocks of the four sizes (Radford et al. 2019, table 2).
SIZES = {
    "gpt2": (768, 12),
    "gpt2-medium": (1024, 24),
    "gpt2-large": (1280, 36),
    "gpt2-xl": (1600, 48),
}
VOCABULARY, CONTEXT = 50257, 1024


def write_random_gpt2(name: str, path: Path, seed: int = 0) -> None:
    """Write ``pytorch_model.bin`` of a size, with OpenAI's parameter names and random numbers.

    Matrices are normal with deviation 0.02, as before GPT-2's training.

    Raises:
        UserError: no such size, or the file cannot be written.
    """
    if name not in SIZES:
        raise UserError(f"{name} is no size of GPT-2; there are {', '.join(SIZES)}")
    width, layers = SIZES[name]
    generator = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return np.float32(0.02) * generator.standard_normal(shape, dtype=np.float32)

    tensors = {"wte.weight": matrix(VOCABULARY, width), "wpe.weight": matrix(CONTEXT, width)}
    for layer in range(layers):
        block = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{block}.{norm}.weight"] = np.ones(width, np.float32)
            tensors[f"{block}.{norm}.bias"] = np.zeros(width, np.float32)
        for linear, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            tensors[f"{block}.{linear}.weight"] = matrix(inputs, outputs)
            tensors[f"{block}.{linear}.bias"] = np.zeros(outputs, np.float32)
    tensors["ln_f.weight"] = np.ones(width, np.float32)
    tensors["ln_f.bias"] = np.zeros(width, np.float32)
    make_folder(path.parent)
    write_torch(path, tensors)
