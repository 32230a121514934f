"""``make bench ARGS=wikisql``: the recipe `wikisql-smollm2-135m` beside mlx-lm and PEFT.

Every training is a process of its own on the same files and settings, one after another; with
``--rounds`` they alternate, each round with another seed. Their adapters are judged by jlora in
float32 too, because mlx-lm's loss also counts the padding token behind every text. With ``--keep``
each result is written down at once and not computed again, so that it can be cut and go on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from benchmarks.environments import mkl
from benchmarks.sides import PYTHON, ROOT, outside
from jlora.data.batches import BatchOrder
from jlora.data.pull_models import pull
from jlora.data.tokenizer import Tokenizer
from jlora.runs.recipe import Recipe, find_recipe, load_recipe
from jlora.system.files import write_text
from jlora.system.machine import cpu_model, processors
from jlora.training.loggers import read_metrics

RECIPE = "wikisql-smollm2-135m"
MLX = ROOT / ".venv-mlx"
WARM_UP = 5  # steps of each run that do not count
LAST = 50  # steps whose losses are averaged
FEW = 8  # validation texts of ``--times``
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
        peak_mb: largest resident memory of the process.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    judged: float | None = None
    peak_mb: float = 0.0


@dataclass
class Job:
    """What a training needs to know."""

    recipe: Recipe
    model: Path
    data: Path
    steps: int
    seed: int
    folder: Path  # empty; the adapter comes into `folder`/adapter


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seed", type=int, default=1, help="of the first round")
    options.add_argument("--keep", type=Path, help="folder of results: of those to come, and there")
    options.add_argument("--times", action="store_true", help="of interest are seconds and memory: "
                         f"{FEW} validation texts, and no adapter is judged")  # fmt: skip
    options.add_argument("--sides", nargs="+", choices=list(SIDES),
                         default=["jlora bf16", "jlora fp32", "mlx-lm", "PEFT fp32"])  # fmt: skip
    chosen = options.parse_args()
    recipe = load_recipe(find_recipe(RECIPE))
    model = Path(pull(recipe.model))
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    data = data / recipe.data.folder
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    if not chosen.times:
        before = kept(chosen.keep, "before.json", lambda: Run(judged=judge(model, data, None)))
        print(f"before, by jlora in fp32: {before.judged:.4f}", flush=True)
    runs: dict[str, list[Run]] = {side: [] for side in chosen.sides if installed(side)}
    for seed in range(chosen.seed, chosen.seed + chosen.rounds):
        for side, done in runs.items():

            def train(side=side, seed=seed) -> Run:
                print(f"{side}, seed {seed}: load {os.getloadavg()[0]:.1f}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    own = few_to_validate(data, Path(folder) / "data") if chosen.times else data
                    job = Job(recipe, model, own, chosen.steps, seed, Path(folder))
                    run = SIDES[side](job)
                    if not chosen.times:
                        run.judged = judge(model, data, job.folder / "adapter")
                return run

            name = f"{re.sub('[^0-9A-Za-z]+', '-', side)}-{chosen.steps}-steps-seed-{seed}"
            name += "-times.json" if chosen.times else ".json"
            done.append(kept(chosen.keep, name, train))
    print("\n" + table(runs, chosen.steps))


def few_to_validate(data: Path, folder: Path) -> Path:
    """``folder`` with the same training texts and `FEW` of those for validation."""
    folder.mkdir()
    shutil.copy(data / "train.jsonl", folder)
    lines = (data / "valid.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "valid.jsonl").write_text("".join(lines[:FEW]), encoding="utf-8")
    return folder


def kept(folder: Path | None, name: str, compute: Callable[[], Run]) -> Run:
    """What ``folder`` has under ``name``, else what ``compute`` gives; that is written there."""
    file = folder and folder / name
    if file and file.is_file():
        return Run(**json.loads(file.read_text()))
    run = compute()
    if file:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(asdict(run)) + "\n")
    return run


def installed(side: str) -> bool:
    """Whether the side's environment is there; says so if not."""
    needed = {"m": [MLX / "bin" / "python"], "P": [PYTHON["peft"]]}.get(side[0], [])
    if side == "mlx-lm":
        needed.append(mkl(MLX) or MLX / "lib" / "libmkl_rt.so")
    missing = [file for file in needed if not file.exists()]
    if missing:
        print(f"{side}: left out, {missing[0]} is missing; `make bench ARGS=wikisql` installs it")
    return not missing


def table(runs: dict[str, list[Run]], steps: int) -> str:
    lines = [
        f"| {steps} steps | before | after | after, by jlora in fp32 | training, last {LAST} "
        "| s a step | peak MB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for side, done in runs.items():
        losses = [statistics.mean(run.losses[-LAST:]) for run in done]
        seconds = [each for run in done for each in run.seconds]
        cells = [
            *(mean([getattr(run, name) for run in done]) for name in ("before", "after", "judged")),
            mean(losses),
            f"{statistics.median(seconds):.2f}" if seconds else "",
            f"{max(run.peak_mb for run in done):,.0f}",
        ]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean(values: list[float | None]) -> str:
    """The mean, and of several the standard deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"


def judge(model: Path, data: Path, adapter: Path | None) -> float:
    """Mean loss of the validation texts by jlora in float32."""
    command = [sys.executable, "-m", "jlora", "evaluate", "perplexity", "--model", str(model)]
    command += ["--data", str(data), "--split", "valid", "--precision", "fp32", "--json"]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    return json.loads(follow(command)[0][-1][1])["loss"]


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
            raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return lines, usage.ru_maxrss / 1024


def jlora(job: Job, precision: str) -> Run:
    folder = job.folder / "run"
    settings = {
        "data.folder": job.data, "model": job.model, "precision": precision,
        "train.steps": job.steps, "train.seed": job.seed, "train.log_every": 1,
        "train.valid_every": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "jlora", "finetune", "--recipe", RECIPE, "--out", str(folder)]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
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
    spec = {
        "model": str(job.model), "data": str(job.data), "precision": precision, "seed": job.seed,
        "steps": job.steps, "batch_size": job.recipe.train.batch_size,
        "lr": job.recipe.train.optim.lr, "lora": adapter_settings(job.recipe),
        "batches": batches, "first": None, "out": str(job.folder / "adapter"),
    }  # fmt: skip
    if batches == "jlora's":
        spec.update(batches=batches_of_jlora(job), first=str(first_adapter_of_jlora(job)))
    command = [str(PYTHON["peft"]), "-W", "ignore", "-m", "benchmarks.wikisql_torch"]
    lines, peak = follow([*command, json.dumps(spec)])
    found = [(at, json.loads(line)) for at, line in lines if line.startswith("{")]
    steps = [(at, row["loss"]) for at, row in found if "step" in row]
    valid = [row["valid"] for _, row in found if "valid" in row]
    return timed(steps, Run(before=valid[0], after=valid[-1], peak_mb=peak))


def batches_of_jlora(job: Job) -> list[list[int]]:
    """The row numbers of each step's batch in jlora's training."""
    tokenizer = Tokenizer.from_folder(job.model)
    lines = (job.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["text"])) for line in lines]
    order = BatchOrder(lengths, job.recipe.train.batch_size, job.seed)
    return [order.batch(step) for step in range(job.steps)]


def first_adapter_of_jlora(job: Job) -> Path:
    """The adapter that jlora's training begins with."""
    from jlora import LoraConfig, get_peft_model, load
    from jlora.system.runtime import set_seed

    model = load(str(job.model))
    set_seed(job.seed)
    tuned = get_peft_model(model, LoraConfig(**adapter_settings(job.recipe)))
    tuned.save_pretrained(job.folder / "first")
    return job.folder / "first"


def mlx(job: Job, own_blas: bool = False) -> Run:
    lora, optim = job.recipe.lora, job.recipe.train.optim
    settings = {
        "model": str(job.model), "train": True, "data": str(job.data), "seed": job.seed,
        # It validates before the first step and before the last, so there is one more of them.
        "iters": job.steps + 1, "save_every": job.steps, "steps_per_eval": job.steps + 2,
        "val_batches": -1, "steps_per_report": 1, "adapter_path": str(job.folder / "mlx"),
        "batch_size": job.recipe.train.batch_size, "learning_rate": optim.lr,
        "max_seq_length": job.recipe.train.max_length, "optimizer": "adam",
        # Not its default: without it the first hundreds of steps are up to three times as long.
        "optimizer_config": {"adam": {"bias_correction": True}},
        "num_layers": len(lora.layers_to_transform),
        "lora_parameters": {"rank": lora.r, "scale": lora.lora_alpha / lora.r, "dropout": 0.0},
    }  # fmt: skip
    config = job.folder / "mlx.json"
    config.write_text(json.dumps(settings))
    variables = {"TOKENIZERS_PARALLELISM": "true"}
    if not own_blas:
        variables["LD_PRELOAD"] = str(mkl(MLX))
    lines, peak = follow([str(MLX / "bin" / "mlx_lm.lora"), "-c", str(config)], **variables)
    steps, valid = mlx_losses(lines)
    weights = job.folder / "mlx" / f"{job.steps:07d}_adapters.safetensors"
    save_as_peft(weights, job.recipe, job.folder / "adapter")
    return timed(steps[: job.steps], Run(before=valid[0], after=valid[-1], peak_mb=peak))


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
    names = ("r", "lora_alpha", "target_modules", "layers_to_transform")
    return {name: getattr(recipe.lora, name) for name in names}


def save_as_peft(weights: Path, recipe: Recipe, folder: Path) -> None:
    """Write an adapter of mlx-lm, whose matrices are the transposed ones, as PEFT would."""
    from safetensors.numpy import load_file, save_file

    tensors = {}
    for name, value in load_file(weights).items():
        module, _, kind = name.rpartition(".")  # kind: lora_a (in, r) or lora_b (r, out)
        key = f"base_model.model.{module}.lora_{kind[-1].upper()}.weight"
        tensors[key] = value.T.copy()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **adapter_settings(recipe)}
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


if __name__ == "__main__":
    main()
