"""Commands about texts: score them, choose them again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jlora.cli.options import Verb
from jlora.system.errors import UserError


def add_evaluate(verb: Verb) -> None:
    command = verb("evaluate", run_evaluate, "Score texts by the metrics of a task.")
    command.add_argument("task", help="e2e, webnlg, dart, boolq, ...")
    command.add_argument(
        "--refs", required=True, help="references, groups split by empty lines; of a choice as "
        "BoolQ: the right answers, one a line",
    )  # fmt: skip
    command.add_argument("--hyps", required=True, help="hypotheses, one a line")
    command.add_argument("--metrics", metavar="A,B", help="instead of the task's own")
    command.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks import get_task
    from jlora.metrics import evaluate, read_answers, read_hypotheses, read_references

    task = get_task(arguments.task)
    if task.choices:
        from jlora.metrics.accuracy import accuracy, parse_choice

        if arguments.metrics:
            raise UserError(f"{task.name} is scored by accuracy alone; leave --metrics out")
        texts = read_hypotheses(arguments.hyps)
        answers = [parse_choice(text, task.choices) for text in texts]
        scores = accuracy(answers, read_answers(arguments.refs, task.choices), task.choices)
    else:
        given = (arguments.metrics or "").split(",")
        names = [name.strip() for name in given if name.strip()] or task.metrics
        scores = evaluate(names, read_hypotheses(arguments.hyps), read_references(arguments.refs))
    if arguments.json:
        print(json.dumps(scores))
    else:
        width = max(8, *map(len, scores))
        for name, value in scores.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:{width}} {shown}")
    return 0


def add_rerank(verb: Verb) -> None:
    command = verb("rerank", run_rerank, "Choose again for another length penalty; no decoding.")
    command.add_argument("predictions", help="predictions.jsonl")
    command.add_argument("--length-penalty", type=float, required=True)
    command.add_argument("--out", required=True, help="predictions.jsonl to write (and .txt)")


def run_rerank(arguments: argparse.Namespace) -> int:
    from jlora.decoding.predictions import check_out, read_predictions, rerank, save_predictions

    check_out(arguments.out)
    config = Path(arguments.predictions).parent / "config.yaml"
    if config.is_file():
        from jlora.runs.recipe import load_run_recipe

        recipe = load_run_recipe(config)
        limit = recipe and recipe.decode.rank_up_to
        if limit is not None and arguments.length_penalty > limit:
            raise UserError(
                f"this run's search stopped early where no length penalty up to {limit} needed "
                f"more (decode.rank_up_to), so {arguments.length_penalty} cannot be judged; "
                "decode again with a larger rank_up_to, or null"
            )
    predictions = rerank(read_predictions(arguments.predictions), arguments.length_penalty)
    save_predictions(arguments.out, predictions)
    return 0
