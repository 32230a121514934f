"""Commands that train: a recipe, many of them, one's own data; and what memory it takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jlora.cli.options import (
    Setting,
    Verb,
    add_chat_options,
    add_nproc,
    add_recipe_settings,
    add_run_options,
    open_recipe,
    overrides,
    targets,
)
from jlora.system.errors import UserError

RECIPE_HELP = "a YAML file, or the name of one that comes with jlora"


def add_run(verb: Verb) -> None:
    command = verb("run", run_run, "Train, decode, score and report as a recipe says.")
    command.add_argument("recipe", nargs="?", help=RECIPE_HELP)
    command.add_argument(
        "--smoke", action="store_true", help="a few steps and inputs only: does all of it work?"
    )
    add_run_options(command)


def run_run(arguments: argparse.Namespace) -> int:
    if not arguments.recipe and not arguments.resume:
        raise UserError("no recipe given; try `jlora run e2e-smollm2-135m`")
    recipe, run = open_recipe(arguments, arguments.recipe)
    from jlora.runs import pipeline
    from jlora.system.lock import lock_run

    if arguments.smoke:
        from jlora.runs.smoke import smoke

        recipe = smoke(recipe)
    check_memory = not (arguments.smoke or arguments.no_memory_check)
    with lock_run(run):
        scores = pipeline.run_recipe(recipe, run, arguments.resume, check_memory)
    return 130 if scores is None else 0


def add_finetune(verb: Verb) -> None:
    command = verb("finetune", run_finetune, "Train an adapter on conversations, pairs or texts.")
    command.add_argument("--recipe", help="start from this recipe's settings")

    def setting(option: str, key, holder=command, **options) -> None:
        holder.add_argument(option, action=Setting, key=key, **options)

    setting("--model", "model", help="name or path of the base model")
    setting(
        "--task", "data.task", help="how the files are read, where their keys do not tell: chat, "
        "e2e (its text or CSV), webnlg, dart, boolq, jsonl or restaurants (built in)",
    )  # fmt: skip
    add_chat_options(command)
    setting("--rank", "lora.r", type=int, help="r of LoRA")
    setting("--alpha", "lora.lora_alpha", type=float, help="lora_alpha")
    setting(
        "--target-modules", "lora.target_modules", type=targets,
        help="comma-separated, such as q_proj,v_proj; or all-linear: every linear layer but the "
        "head",
    )  # fmt: skip
    setting(
        "--rslora", "lora.use_rslora", nargs=0, const=True,
        help="scale by alpha / sqrt(rank) (rsLoRA): for ranks of 32 and more",
    )  # fmt: skip
    setting(
        "--dora", "lora.use_dora", nargs=0, const=True,
        help="train the length of each output's weights too (DoRA); slower, see docs/adapters.md",
    )  # fmt: skip
    setting("--lr", "train.optim.lr", type=float, help="learning rate")
    setting("--batch-size", "train.batch_size", type=int)
    length = command.add_mutually_exclusive_group()
    setting("--steps", "train.steps", length, type=int, help="updates")
    setting(
        "--epochs", lambda epochs: {"train.epochs": epochs, "train.steps": None}, length,
        type=float, help="instead of --steps (default: 5)",
    )  # fmt: skip
    setting("--seed", "train.seed", type=int)
    add_run_options(command)


def run_finetune(arguments: argparse.Namespace) -> int:
    recipe, run = open_recipe(arguments, arguments.recipe)
    from jlora.runs import pipeline
    from jlora.system.lock import lock_run

    with lock_run(run):
        best = pipeline.train_recipe(recipe, run, arguments.resume, not arguments.no_memory_check)
    if best is None:
        return 130
    print(f"adapter: {best}")
    talks = (run / "chat_template.jinja").is_file()
    way = f"chat {run}" if talks else f"generate --adapter {run} --prompt ..."
    print(f"try it: jlora {way}")
    return 0


def add_sweep(verb: Verb) -> None:
    command = verb("sweep", run_sweep, "Run a recipe under many settings and compare the scores.")
    command.add_argument("recipe", help=RECIPE_HELP)
    command.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,VALUE",
        help="a setting's values, such as lora.r=1,2,4,8,64; of several grids all combinations",
    )  # fmt: skip
    command.add_argument("--cases", metavar="FILE", help="a YAML file of `name: {setting: value}`")
    command.add_argument("--out", help="folder of the runs (default: runs/ and the recipe's name)")
    add_recipe_settings(command)
    command.add_argument("--smoke", action="store_true", help="as of jlora run")
    add_nproc(command, dest="nproc_of_each")


def run_sweep(arguments: argparse.Namespace) -> int:
    from jlora.report.html import write_report
    from jlora.runs import sweep
    from jlora.runs.recipe import find_sweep

    if bool(arguments.grid) == bool(arguments.cases):
        raise UserError("give --grid KEY=VALUE,VALUE or --cases FILE, such as --grid lora.r=1,2,4")
    if arguments.cases:
        cases = sweep.file_cases(find_sweep(arguments.cases))
    else:
        cases = sweep.grid_cases(arguments.grid)
    out = Path(arguments.out or f"runs/sweep-{Path(arguments.recipe).stem}")
    runs = sweep.sweep(
        arguments.recipe, cases, overrides(arguments), out, arguments.smoke, arguments.nproc_of_each
    )
    print(write_report(list(runs.values()), out=out / "report.html"))
    return 0


def add_estimate(verb: Verb) -> None:
    command = verb("estimate", run_estimate, "Estimate a recipe's memory; exit code 1: too much.")
    command.add_argument("recipe", help=RECIPE_HELP)
    add_recipe_settings(command)
    command.add_argument("--json", action="store_true", help="machine-readable output, in bytes")


def run_estimate(arguments: argparse.Namespace) -> int:
    from jlora.runs.memory_check import report
    from jlora.runs.recipe import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(arguments.recipe), overrides(arguments))
    text, found = report(recipe)
    print(json.dumps(found, indent=1) if arguments.json else text)
    return 0 if found["fits"] else 1
