"""Commands about texts: generate them, score them, choose them again."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from jlora.cli.options import (
    ADAPTER_HELP,
    PRECISIONS,
    Verb,
    adapter_file,
    add_adapter_options,
    add_nproc,
    refuse,
)
from jlora.system.errors import UserError

#: Options of `jlora generate` -> settings, by the method that they are for.
BEAM_OPTIONS = {
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
SAMPLE_OPTIONS = {name: name for name in ("temperature", "top_k", "top_p", "seed")}


def add_generate(verb: Verb) -> None:
    command = verb("generate", run_generate, "Answer prompts with a model and its adapter.")
    command.add_argument("--model", help="base model (default: the one of the adapter's run)")
    command.add_argument("--adapter", help=ADAPTER_HELP)
    add_adapter_options(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    source.add_argument("--data", help="a file of the task; its distinct inputs are the prompts")
    command.add_argument("--task", help="how --data is read (default: e2e)")
    command.add_argument("--out", help="predictions.jsonl to write; default: print the texts")
    command.add_argument("--method", choices=("beam", "greedy", "sample"), default="beam")
    run = "default: as the adapter's run says, else"
    command.add_argument("--max-new-tokens", type=int, help=f"{run} 64")
    command.add_argument("--batch-size", type=int, help=f"prompts decoded together; {run} 32")
    command.add_argument("--beams", type=int, help=f"of beam search; {run} 10")
    command.add_argument("--length-penalty", type=float, help=f"of beam search; {run} 0.8")
    command.add_argument("--no-repeat-ngram-size", type=int, help=f"of beam search; {run} 4")
    command.add_argument("--temperature", type=float, help="of sampling (default: 1)")
    command.add_argument("--top-k", type=int, help="of sampling (default: all words)")
    command.add_argument("--top-p", type=float, help="of sampling (default: 1)")
    command.add_argument("--seed", type=int, help="of sampling (default: 0)")
    command.add_argument("--separator-id", type=int, help="token after the prompt")
    command.add_argument("--end-id", type=int, action="append", help="end token; may repeat")
    command.add_argument(
        "--raw", action="store_true", help="no separator token: go on with the prompt's own text"
    )
    command.add_argument("--precision", default="auto", help=PRECISIONS)
    add_nproc(command)


def decoding(arguments: argparse.Namespace, trained):
    """The settings that `jlora generate` decodes with.

    Args:
        trained: `decode` of the adapter's run, whose settings are the defaults, or None.

    Raises:
        UserError: a setting is out of its range, or is of another method.
    """
    from jlora.decoding.sampling import GenerateConfig
    from jlora.runs.recipe import DecodeConfig

    def given(options: dict[str, str]) -> dict:
        found = {key: getattr(arguments, name) for name, key in options.items()}
        return {key: value for key, value in found.items() if value is not None}

    trained, method = trained or DecodeConfig(), arguments.method
    shared = given({"max_new_tokens": "max_new_tokens", "batch_size": "batch_size"})
    if method != "sample":
        refuse(arguments, SAMPLE_OPTIONS, f"is for --method sample, not {method}")
    if method != "beam":
        refuse(arguments, BEAM_OPTIONS, f"is for --method beam, not {method}")
        common = ("eos_token_ids", "max_new_tokens", "repetition_penalty", "batch_size")
        base = {name: getattr(trained, name) for name in common}
        base["temperature"] = 1.0 if method == "sample" else 0.0
        return GenerateConfig(**{**base, **shared, **given(SAMPLE_OPTIONS)})
    settings = {**shared, **given(BEAM_OPTIONS)}
    limit = trained.rank_up_to
    if limit is not None and settings.get("length_penalty", limit) > limit:
        settings["rank_up_to"] = None  # the run's shortcut is for smaller penalties
    return replace(trained, **settings)


def run_generate(arguments: argparse.Namespace) -> int:
    from jlora.data.batches import NO_SEPARATOR
    from jlora.data.tasks import get_task
    from jlora.decoding.predictions import check_out
    from jlora.runs.answer import answer
    from jlora.runs.recipe import check_precision

    # All that can be wrong with the command line, and then with the data, before a model is loaded.
    if arguments.raw:
        refuse(arguments, ["separator_id"], "says another token than --raw, which takes none")
    if not arguments.data:
        refuse(arguments, ["task"], "says how --data is read")
    if arguments.out:
        check_out(arguments.out)
    adapter = adapter_file(arguments)
    recipe = adapter and adapter.recipe
    config = decoding(arguments, recipe and recipe.decode)
    check_precision(arguments.precision)
    prompts, keeps = arguments.prompt, None
    if arguments.data:
        task = get_task(arguments.task or "e2e")
        same = recipe is not None and recipe.data.task == task.name
        groups = task.groups(task.read(arguments.data, recipe.data.template if same else None))
        prompts, keeps = [group.prompt for group in groups], [group.keep for group in groups]
    predictions = answer(
        prompts,
        arguments.model,
        adapter,
        config,
        NO_SEPARATOR if arguments.raw else arguments.separator_id,
        arguments.end_id,
        arguments.precision,
        Path(arguments.out) if arguments.out else None,
        keeps,
    )
    if not arguments.out:
        for prediction in predictions:
            print(prediction.prediction)
    return 0


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
