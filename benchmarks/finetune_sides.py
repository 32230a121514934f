"""The sides of ``benchmarks.finetune``: a recipe trained by jlora, by PEFT and by mlx-lm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environments import mkl
from benchmarks.sides import PYTHON, ROOT, outside
from jlora.data.batches import BatchOrder
from jlora.runs.recipe import Recipe, find_recipe, load_recipe
from jlora.runs.run_data import load_data
from jlora.training.loggers import read_metrics

MLX = ROOT / ".venv-mlx"
WARM_UP = 5  # steps of each run that do not count
ANSI = re.compile(r"\x1b\[[0-9;]*m")
#: Lines of `mlx_lm.lora`: step, loss, tokens a second, tokens so far; and step, "val", loss.
MLX_STEP = re.compile(r"\s*(\d+)\s+([\d.]+|nan) [▼▲]\s")
MLX_VALID = re.compile(r"\s*(\d+)\s+val ([\d.]+|nan)\s")


@dataclass
class Run:
    """A training.

    Attributes:
        losses, seconds: of the steps; seconds without the first `WARM_UP`.
        before, after: validation losses as the side reports them; None: it does not.
        judged: validation loss of its adapter by jlora in float32.
        exact: percent of the test questions that it answers exactly; None: there are none.
        peak_mb: largest resident memory of the process.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    judged: float | None = None
    exact: float | None = None
    peak_mb: float = 0.0


@dataclass
class Job:
    """What a training needs to know.

    Args:
        name: of the recipe.
        settings: what is other than in the recipe, as ``key=value``; steps, seed, and where model
            and data are, are among them.
        folder: empty; the adapter comes into ``folder``/adapter.
    """

    name: str
    settings: list[str]
    folder: Path

    @property
    def recipe(self) -> Recipe:
        """With the settings."""
        return load_recipe(find_recipe(self.name), self.settings)


def follow(command: list[str], **variables: str) -> tuple[list[tuple[float, str]], float]:
    """Run a command to its end.

    Returns:
        Its lines with the time at which each came, and its largest resident memory in MB.

    Raises:
        RuntimeError: it failed; has its last lines of errors.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, env={**outside(), "PYTHONUNBUFFERED": "1", **variables},
        )  # fmt: skip
        with process.stdout:
            lines = [(time.monotonic(), line.rstrip("\n")) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            said = "\n".join([*(line for _, line in lines), errors.read()])
            how = "was killed, as for want of memory" if process.returncode == -9 else "failed"
            raise RuntimeError(f"{' '.join(command)} {how}:\n{said[-2000:]}")
    return lines, usage.ru_maxrss / 1024


def jlora(job: Job, precision: str) -> Run:
    folder = job.folder / "run"
    settings = [*job.settings, f"precision={precision}", "train.log_every=1", "train.valid_every=0"]
    command = [sys.executable, "-m", "jlora", "finetune", "--recipe", job.name]
    command += ["--out", str(folder)]
    command += [part for setting in settings for part in ("--set", setting)]
    _, peak = follow(command)
    rows = read_metrics(folder / "metrics.jsonl")
    ends = [row["seconds"] for row in rows if "loss" in row]
    (folder / "adapter").rename(job.folder / "adapter")
    return Run(
        losses=[row["loss"] for row in rows if "loss" in row],
        seconds=[b - a for a, b in zip(ends, ends[1:])][WARM_UP - 1 :],
        after=next(row["valid_loss"] for row in rows if "valid_loss" in row),
        peak_mb=peak,
    )


def peft(job: Job, precision: str, batches: str = "drawn") -> Run:
    recipe, optim = job.recipe, job.recipe.train.optim
    spec = {
        "model": recipe.model, "data": recipe.data.folder, "precision": precision,
        "seed": recipe.train.seed, "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size, "lr": optim.lr, "warmup": optim.warmup_steps,
        "schedule": optim.schedule, "lora": adapter_settings(recipe), "batches": batches,
        "first": None, "out": str(job.folder / "adapter"),
    }  # fmt: skip
    if batches == "jlora's":
        spec.update(batches=batches_of_jlora(recipe), first=str(first_adapter_of_jlora(job)))
    command = [str(PYTHON["peft"]), "-W", "ignore", "-m", "benchmarks.finetune_torch"]
    lines, peak = follow([*command, json.dumps(spec)])
    found = [(at, json.loads(line)) for at, line in lines if line.startswith("{")]
    steps = [(at, row["loss"]) for at, row in found if "step" in row]
    valid = [row["valid"] for _, row in found if "valid" in row]
    return timed(steps, Run(before=valid[0], after=valid[-1], peak_mb=peak))


def batches_of_jlora(recipe: Recipe) -> list[list[int]]:
    """The row numbers of each step's batch in jlora's training."""
    lengths = [example.input_length for example in load_data(recipe, test=False).train]
    order = BatchOrder(lengths, recipe.train.batch_size, recipe.train.seed)
    return [order.batch(step) for step in range(recipe.train.steps)]


def first_adapter_of_jlora(job: Job) -> Path:
    """The adapter that jlora's training begins with."""
    from jlora import LoraConfig, get_peft_model, load
    from jlora.system.runtime import set_seed

    model = load(job.recipe.model)
    set_seed(job.recipe.train.seed)
    tuned = get_peft_model(model, LoraConfig(**adapter_settings(job.recipe)))
    tuned.save_pretrained(job.folder / "first")
    return job.folder / "first"


def mlx(job: Job, own_blas: bool = False) -> Run:
    recipe = job.recipe
    lora, optim, steps = recipe.lora, recipe.train.optim, recipe.train.steps
    settings = {
        "model": recipe.model, "train": True, "data": recipe.data.folder,
        "seed": recipe.train.seed, "mask_prompt": not trains_texts(recipe),
        # It validates before the first step and before the last, so there is one more of them.
        "iters": steps + 1, "save_every": steps, "steps_per_eval": steps + 2,
        "val_batches": -1, "steps_per_report": 1, "adapter_path": str(job.folder / "mlx"),
        "batch_size": recipe.train.batch_size, "learning_rate": optim.lr,
        "max_seq_length": recipe.train.max_length, "optimizer": "adam",
        # Not its default: without it the first hundreds of steps are up to three times as long.
        "optimizer_config": {"adam": {"bias_correction": True}},
        "num_layers": len(lora.layers_to_transform or ()) or -1,
        "lora_parameters": {
            "rank": lora.r, "scale": lora.lora_alpha / lora.r, "dropout": lora.lora_dropout,
        },
    }  # fmt: skip
    if optim.schedule == "linear":
        settings["lr_schedule"] = {
            "name": "linear_schedule", "warmup": optim.warmup_steps,
            "arguments": [optim.lr, 0.0, steps - optim.warmup_steps],
        }  # fmt: skip
    config = job.folder / "mlx.json"
    config.write_text(json.dumps(settings))
    variables = {"TOKENIZERS_PARALLELISM": "true"}
    if not own_blas:
        variables["LD_PRELOAD"] = str(mkl(MLX))
    lines, peak = follow([str(MLX / "bin" / "mlx_lm.lora"), "-c", str(config)], **variables)
    found, valid = mlx_losses(lines)
    weights = job.folder / "mlx" / f"{steps:07d}_adapters.safetensors"
    save_as_peft(weights, recipe, job.folder / "adapter")
    return timed(found[:steps], Run(before=valid[0], after=valid[-1], peak_mb=peak))


def trains_texts(recipe: Recipe) -> bool:
    """Whether the data are texts, of which every token is trained, and not conversations."""
    with open(Path(recipe.data.folder, "train.jsonl"), encoding="utf-8") as lines:
        return "text" in json.loads(next(lines))


def mlx_losses(lines: list[tuple[float, str]]) -> tuple[list[tuple[float, float]], list[float]]:
    """Of mlx-lm's output: (time, loss) of every step, and the validation losses."""
    steps, valid = [], []
    for at, line in lines:
        line = ANSI.sub("", line)
        if match := MLX_STEP.match(line):
            steps.append((at, float(match[2])))
        elif match := MLX_VALID.match(line):
            valid.append(float(match[2]))
    return steps, valid


def timed(steps: list[tuple[float, float]], run: Run) -> Run:
    """The run with losses and seconds of steps, given as (time of the end, loss)."""
    run.losses = [loss for _, loss in steps]
    ends = [at for at, _ in steps]
    run.seconds = [b - a for a, b in zip(ends, ends[1:])][WARM_UP - 1 :]
    return run


def adapter_settings(recipe: Recipe) -> dict:
    """PEFT's names of the recipe's adapter."""
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform")
    return {name: getattr(recipe.lora, name) for name in names}


def save_as_peft(weights: Path, recipe: Recipe, folder: Path) -> None:
    """Write an adapter of mlx-lm, whose matrices are the transposed ones, as PEFT would."""
    from safetensors.numpy import load_file, save_file

    tensors, targets = {}, set()
    for name, value in load_file(weights).items():
        module, _, kind = name.rpartition(".")  # kind: lora_a (in, r) or lora_b (r, out)
        key = f"base_model.model.{module}.lora_{kind[-1].upper()}.weight"
        tensors[key] = value.T.copy()
        targets.add(module.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {**adapter_settings(recipe), "target_modules": sorted(targets)}
    settings.update(peft_type="LORA", task_type="CAUSAL_LM")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


SIDES: dict[str, Callable[[Job], Run]] = {
    "jlora bf16": lambda job: jlora(job, "bf16"),
    "jlora fp32": lambda job: jlora(job, "fp32"),
    "mlx-lm": mlx,
    "mlx-lm, its own BLAS": lambda job: mlx(job, own_blas=True),
    "PEFT fp32": lambda job: peft(job, "fp32"),
    "PEFT fp32, rows of like length": lambda job: peft(job, "fp32", "like lengths"),
    "PEFT fp32, jlora's batches and first adapter": lambda job: peft(job, "fp32", "jlora's"),
    "PEFT bf16": lambda job: peft(job, "bf16"),
}
