"""``make bench ARGS="finetune RECIPE"``: a chat recipe beside mlx-lm and PEFT.

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
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path

from benchmarks.environments import mkl
from benchmarks.finetune_sides import MLX, SIDES, Job, Run, follow
from benchmarks.sides import PYTHON, ROOT
from jlora.data.pull_models import pull
from jlora.runs.recipe import Recipe, find_recipe, load_recipe
from jlora.system.files import write_text
from jlora.system.machine import cpu_model, processors

LAST = 50  # steps whose losses are averaged
FEW = 8  # validation texts of ``--times``


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("recipe", nargs="?", default="wikisql-smollm2-135m")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                         help="other than in the recipe, for all sides")  # fmt: skip
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--seed", type=int, default=1, help="of the first round")
    options.add_argument("--keep", type=Path, help="folder of results and adapters: of those to "
                         "come, and there")  # fmt: skip
    options.add_argument("--times", action="store_true", help="of interest are seconds and memory: "
                         f"{FEW} validation texts, and no adapter is judged")  # fmt: skip
    options.add_argument("--sides", nargs="+", choices=list(SIDES),
                         default=["jlora bf16", "jlora fp32", "mlx-lm", "PEFT fp32"])  # fmt: skip
    chosen = options.parse_args()
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    recipe = load_recipe(find_recipe(chosen.recipe), chosen.set)
    model = Path(pull(recipe.model))
    data = data / recipe.data.folder
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    if not chosen.times:
        before = kept(chosen.keep, "before.json", lambda: judged(Run(), recipe, model, data, None))
        print(f"before, by jlora in fp32: {before.judged:.4f}", flush=True)
        if before.exact is not None:
            print(f"exact answers to test data before: {before.exact:g} %", flush=True)
    runs: dict[str, list[Run]] = {side: [] for side in chosen.sides if installed(side)}
    for seed in range(chosen.seed, chosen.seed + chosen.rounds):
        for side, done in runs.items():
            name = f"{re.sub('[^0-9A-Za-z]+', '-', side)}-{chosen.steps}-steps-seed-{seed}"

            def train(side=side, seed=seed, name=name) -> Run:
                print(f"{side}, seed {seed}: load {os.getloadavg()[0]:.1f}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    own = few_to_validate(data, Path(folder) / "data") if chosen.times else data
                    settings = [*chosen.set, f"data.folder={own}", f"model={model}"]
                    settings += [f"train.steps={chosen.steps}", f"train.seed={seed}"]
                    run = SIDES[side](Job(chosen.recipe, settings, Path(folder)))
                    adapter = Path(folder) / "adapter"
                    if chosen.keep:
                        place = chosen.keep / f"{name}-adapter"
                        shutil.rmtree(place, ignore_errors=True)  # of a run that was cut
                        adapter = shutil.move(adapter, place)
                    return run if chosen.times else judged(run, recipe, model, data, adapter)

            suffix = "-times.json" if chosen.times else ".json"
            try:
                done.append(kept(chosen.keep, name + suffix, train))
            except RuntimeError as error:  # one side may need more memory than there is
                print(f"{side}, seed {seed}: {error}", flush=True)
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
    if file:
        folder.mkdir(parents=True, exist_ok=True)
    run = compute()
    if file:
        write_text(file, json.dumps(asdict(run)) + "\n")
    return run


def installed(side: str) -> bool:
    """Whether the side's environment is there; says so if not."""
    needed = {"m": [MLX / "bin" / "python"], "P": [PYTHON["peft"]]}.get(side[0], [])
    if side == "mlx-lm":
        needed.append(mkl(MLX) or MLX / "lib" / "libmkl_rt.so")
    missing = [file for file in needed if not file.exists()]
    if missing:
        print(f"{side}: left out, {missing[0]} is missing; `make bench ARGS=finetune` installs it")
    return not missing


def table(runs: dict[str, list[Run]], steps: int) -> str:
    lines = [
        f"| {steps} steps | before | after | after, by jlora in fp32 | exact answers, % "
        f"| training, last {LAST} | s a step | peak MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for side, done in runs.items():
        if not done:
            lines.append(f"| {side} | failed |" + " |" * 6)
            continue
        losses = [statistics.mean(run.losses[-LAST:]) for run in done]
        seconds = [each for run in done for each in run.seconds]
        cells = [
            *(mean([getattr(run, name) for run in done]) for name in ("before", "after", "judged")),
            mean([run.exact for run in done]),
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


def judged(run: Run, recipe: Recipe, model: Path, data: Path, adapter: Path | None) -> Run:
    """The run with what jlora in float32 finds of its adapter.

    That is the mean loss of the validation data, and of texts that the recipe cuts into question
    and answer the share of the test data's that it answers exactly.
    """
    run.judged = evaluate("perplexity", model, data, adapter, "--split", "valid")["loss"]
    if recipe.data.answer_after:
        cut = f"data.answer_after={json.dumps(recipe.data.answer_after)}"
        tokens = str(recipe.decode.max_new_tokens)
        found = evaluate(
            "exact-match", model, data, adapter,
            "--split", "test", "--set", cut, "--max-new-tokens", tokens,
        )  # fmt: skip
        run.exact = 100 * found["exact_match"]
    return run


def evaluate(what: str, model: Path, data: Path, adapter: Path | None, *options: str) -> dict:
    command = [sys.executable, "-m", "jlora", "evaluate", what, "--model", str(model)]
    command += ["--data", str(data), "--precision", "fp32", "--json", *options]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    return json.loads(follow(command)[0][-1][1])


if __name__ == "__main__":
    main()
