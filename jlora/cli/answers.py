"""Commands about texts: score them, choose them again."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import Any

from jlora.cli.options import (
    ADAPTER_HELP,
    PRECISIONS,
    Verb,
    adapter_file,
    add_adapter_options,
    json_object,
    positive,
    refuse,
)
from jlora.system.errors import UserError

#: What `jlora evaluate` computes with a model, and not from files of texts.
BY_MODEL = ("perplexity", "exact-match")
OF_FILES, OF_MODEL = ("refs", "hyps", "metrics"), ("model", "adapter", "data")
MODEL_OPTIONS = (
    *OF_MODEL, "lora_alpha", "enable_lora", "force", "split", "task", "chat_template",
    "chat_template_args", "set", "max_length", "precision", "batch_size", "max_new_tokens", "out",
)  # fmt: skip


def add_evaluate(verb: Verb) -> None:
    command = verb(
        "evaluate", run_evaluate,
        "Score texts by the metrics of a task, or a model by held-out data.",
    )  # fmt: skip
    command.add_argument(
        "what", metavar="TASK", help="of --refs and --hyps: e2e, webnlg, dart, boolq, ...; of a "
        "model and its --data: perplexity or exact-match",
    )  # fmt: skip
    texts = command.add_argument_group("texts")
    texts.add_argument(
        "--refs", help="references, groups split by empty lines; of a choice as BoolQ: the right "
        "answers, one a line",
    )  # fmt: skip
    texts.add_argument("--hyps", help="hypotheses, one a line")
    texts.add_argument("--metrics", metavar="A,B", help="instead of the task's own")
    model = command.add_argument_group("perplexity and exact-match")
    model.add_argument("--model", help="base model (default: the one of the adapter's run)")
    model.add_argument("--adapter", help=ADAPTER_HELP)
    add_adapter_options(model)
    model.add_argument("--data", help="a file of examples, or a folder with test or valid data")
    model.add_argument("--split", help="of the folder (default: test, else valid)")
    model.add_argument(
        "--task", help="how --data is read (default: as the adapter's run "
        "says, else by its keys)",
    )  # fmt: skip
    model.add_argument(
        "--chat-template", metavar="FILE|NAME", help="instead of the model's or the adapter's own"
    )
    model.add_argument("--chat-template-args", type=json_object, metavar="JSON")
    model.add_argument(
        "--set", action="append", metavar="data.KEY=VALUE", help="how the examples are read, as in "
        "a recipe, such as data.answer_after='\"\\nA: \"' (default: as in the adapter's run)",
    )  # fmt: skip
    model.add_argument(
        "--max-length", type=positive, metavar="N",
        help="tokens of an example for perplexity (default: as in the training, else 2048)",
    )  # fmt: skip
    model.add_argument(
        "--max-new-tokens", "--max-tokens", type=positive, metavar="N",
        help="of an answer for exact-match (default: as the run says, else 256)",
    )  # fmt: skip
    model.add_argument("--out", help="predictions.jsonl of exact-match to write")
    model.add_argument("--batch-size", type=positive, metavar="N")
    model.add_argument("--precision", help=f"{PRECISIONS} (default: auto)")
    command.add_argument("--json", action="store_true", help="print JSON")


def run_evaluate(arguments: argparse.Namespace) -> int:
    by_model = arguments.what in BY_MODEL
    scores = model_scores(arguments) if by_model else text_scores(arguments)
    if arguments.json:
        print(json.dumps(scores))
    else:
        width = max(8, *map(len, scores))
        for name, value in scores.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:{width}} {shown}")
    return 0


def model_scores(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a model makes of held-out data."""
    from jlora.decoding.predictions import check_out
    from jlora.decoding.sampling import GenerateConfig
    from jlora.runs.held_out import HeldOut
    from jlora.runs.recipe import check_precision

    what = arguments.what
    refuse(arguments, OF_FILES, f"is for the scores of a task, not for {what}")
    if what == "perplexity":
        refuse(arguments, ("max_new_tokens", "out"), "is for exact-match, not for perplexity")
    else:
        refuse(arguments, ("max_length",), "is for perplexity, not for exact-match")
    if arguments.data is None:
        raise UserError(f"{what} needs data: --data FILE, in the form of the training's")
    precision = arguments.precision or "auto"
    check_precision(precision)
    if arguments.out:
        check_out(arguments.out)
    adapter = adapter_file(arguments)
    held_out = HeldOut(
        arguments.model, adapter, Path(arguments.data), arguments.split, arguments.task,
        arguments.chat_template, arguments.chat_template_args, arguments.set or (),
        arguments.max_length, precision, arguments.batch_size or 8,
    )  # fmt: skip
    if what == "perplexity":
        return held_out.perplexity()
    recipe = adapter and adapter.recipe
    tokens = arguments.max_new_tokens or (recipe.decode.max_new_tokens if recipe else 256)
    ends = tuple((recipe and recipe.decode.eos_token_ids) or ())
    config = GenerateConfig(
        ends, tokens, batch_size=arguments.batch_size or 32,
        repetition_penalty=recipe.decode.repetition_penalty if recipe else 1.0,
    )  # fmt: skip
    return held_out.exact_match(config, Path(arguments.out) if arguments.out else None)


def text_scores(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scores of hypotheses against references."""
    from jlora.data.tasks import get_task, task_names
    from jlora.metrics import evaluate, read_answers, read_hypotheses, read_references

    if arguments.what not in task_names():
        near = difflib.get_close_matches(arguments.what, BY_MODEL, n=1)
        if near:
            raise UserError(f"no task {arguments.what!r}; did you mean {near[0]}?")
    task = get_task(arguments.what)
    refuse(arguments, MODEL_OPTIONS, f"is for {' and '.join(BY_MODEL)}")
    if arguments.refs is None or arguments.hyps is None:
        raise UserError(f"{task.name} is scored by --refs and --hyps; give both")
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
    return scores


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
