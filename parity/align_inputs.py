"""What both sides of `parity.align` start from: ``python -m parity.align_inputs OUT [SETTING...]``.

Writes OUT/config.yaml (the recipe), OUT/inputs.safetensors (token ids in the order of the steps),
OUT/start (the adapter of step 0, as `jlora run` draws it) and OUT/settings.json for PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks import work
from jlora.data.batches import BatchOrder, TokenExample
from jlora.data.pull_models import pull
from jlora.runs.pipeline import build
from jlora.runs.recipe import dump_recipe, load_recipe
from jlora.runs.run_data import load_data
from jlora.system.files import write_text

RECIPE = Path(__file__).with_name("align-e2e.yaml")
TIMED = 16  # batches for the measurement of seconds a step


def main(out: Path, changes: list[str]) -> None:
    recipe = load_recipe(RECIPE, changes)
    model = recipe.model if Path(recipe.model).is_dir() else str(pull(recipe.model))
    data, train = load_data(recipe), recipe.train
    lengths = [example.input_length for example in data.train]
    order = BatchOrder(lengths, train.batch_size, train.seed, train.group_by_length, train.shuffle)
    batches = [[data.train[row] for row in order.batch(step)] for step in range(train.steps)]
    starts = np.cumsum([0, *map(len, batches)]).astype(np.int32)
    arrays = {"starts": starts, **padded("train", [each for batch in batches for each in batch])}
    arrays.update(padded("valid", data.valid))
    arrays.update(padded("test", [TokenExample(ids, len(ids)) for ids in data.prompts]))
    write_timed(out / "batches.npz", batches[-TIMED:])
    build(recipe).save_pretrained(out / "start")
    save_file(arrays, out / "inputs.safetensors")
    settings = {
        "model": model, "steps": train.steps, "seed": train.seed,
        "label_smoothing": train.label_smoothing, "valid_batch": train.valid_batch_size,
        "save_every": train.save_every, "dropout": recipe.lora.lora_dropout,
        "lr": train.optim.lr, "warmup": train.optim.warmup_steps, "eps": train.optim.eps,
        "betas": [train.optim.beta1, train.optim.beta2], "weight_decay": train.optim.weight_decay,
        "end_id": recipe.data.end_id, "max_new_tokens": recipe.decode.max_new_tokens,
        "decode_batch": recipe.decode.batch_size, "changes": changes,
    }  # fmt: skip
    write_text(out / "config.yaml", dump_recipe(recipe))
    references = [{"prompt": g.prompt, "references": g.references} for g in data.groups]
    write_text(out / "references.json", json.dumps(references, ensure_ascii=False) + "\n")
    write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")  # last: all is there


def padded(name: str, examples: Sequence[TokenExample]) -> dict[str, np.ndarray]:
    """ids (N, L) int32, zeros behind each example; lengths and prompts (N,) int32."""
    lengths = np.array([len(example.ids) for example in examples], np.int32)
    ids = np.zeros((len(examples), lengths.max()), np.int32)
    for row, example in zip(ids, examples):
        row[: len(example.ids)] = example.ids
    prompts = np.array([example.prompt_length for example in examples], np.int32)
    return {f"{name}.ids": ids, f"{name}.lengths": lengths, f"{name}.prompts": prompts}


def write_timed(path: Path, batches: Sequence[Sequence[TokenExample]]) -> None:
    """Batches of those lengths, as `make bench` measures them."""
    lengths = [np.array([each.input_length for each in batch]) for batch in batches]
    prompts = [np.array([each.prompt_length - 1 for each in batch]) for batch in batches]
    vocabulary = work.MODELS["smollm2-135m"]["vocab_size"]
    work.write_batches(path, np.random.default_rng(0), vocabulary, lengths, prompts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
