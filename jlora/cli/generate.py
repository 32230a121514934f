"""`jlora generate`, and what it has in common with `jlora chat`: how tokens are chosen."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jlora.cli.options import (
    ADAPTER_HELP,
    PRECISIONS,
    Verb,
    adapter_file,
    add_adapter_options,
    add_nproc,
    json_object,
    refuse,
    utf8,
)
from jlora.system.errors import UserError

#: Options -> settings, by the method that they are for.
BEAM_OPTIONS = {
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
SAMPLE_OPTIONS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
SHARED_OPTIONS = {name: name for name in ("max_new_tokens", "batch_size", "repetition_penalty")}
TEMPLATE_OPTIONS = ("system_prompt", "chat_template", "chat_template_args")
NEW_TOKENS = 256  # of an answer that is not a task's


def add_generate(verb: Verb) -> None:
    command = verb("generate", run_generate, "Answer prompts with a model and its adapter.")
    command.add_argument("--model", help="base model (default: the one of the adapter's run)")
    command.add_argument("--adapter", help=ADAPTER_HELP)
    add_adapter_options(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", type=utf8, help="a prompt; may be given several times; - "
        "reads one from standard input",
    )  # fmt: skip
    source.add_argument("--data", help="a file of the task; its distinct inputs are the prompts")
    command.add_argument("--task", help="how --data is read (default: e2e; chat for a chat run)")
    command.add_argument("--out", help="predictions.jsonl to write; default: print the texts")
    command.add_argument(
        "--method", choices=("beam", "greedy", "sample"),
        help="default: beam for a task or with an option of it, sample with --temp, else greedy",
    )  # fmt: skip
    add_template_options(command)
    command.add_argument(
        "--raw", "--ignore-chat-template", action="store_true",
        help="go on with the prompt's own text: no chat template, no separator token",
    )  # fmt: skip
    run = "default: as the adapter's run says, else"
    add_choice_options(command, f"{run} {NEW_TOKENS}, for a task 64")
    command.add_argument("--batch-size", type=int, help=f"prompts decoded together; {run} 32")
    command.add_argument("--beams", type=int, help=f"of beam search; {run} 10")
    command.add_argument("--length-penalty", type=float, help=f"of beam search; {run} 0.8")
    command.add_argument("--no-repeat-ngram-size", type=int, help=f"of beam search; {run} 4")
    command.add_argument("--separator-id", type=int, help="token after the prompt of a task")
    command.add_argument("--precision", default="auto", help=PRECISIONS)
    add_nproc(command)


def add_template_options(command: argparse.ArgumentParser) -> None:
    """How a conversation is written, of ``generate`` and ``chat``; see `template_options`."""
    command.add_argument(
        "--system-prompt", metavar="TEXT", type=utf8, help="what stands before the first turn"
    )
    command.add_argument(
        "--chat-template", metavar="FILE|NAME", help="instead of the model's or the adapter's own"
    )
    command.add_argument(
        "--chat-template-args", type=json_object, metavar="JSON",
        help='variables of the template, such as \'{"enable_thinking": false}\'',
    )  # fmt: skip


def add_choice_options(command: argparse.ArgumentParser, new_tokens: str) -> None:
    """How tokens are chosen and when it ends, of ``generate`` and ``chat``, named as in mlx-lm."""
    command.add_argument(
        "--max-new-tokens", "--max-tokens", type=int, metavar="N", help=f"at most; {new_tokens}"
    )
    command.add_argument(
        "--temp", "--temperature", dest="temperature", type=float,
        help="above 0 tokens are drawn, the more freely the higher (default: the likeliest; 1 "
        "with --method sample)",
    )  # fmt: skip
    command.add_argument("--top-p", type=float, help="draw among the likeliest of this probability")
    command.add_argument(
        "--min-p", type=float, help="draw among tokens this many times as likely as the likeliest"
    )
    command.add_argument("--top-k", type=int, help="draw among so many of the likeliest")
    command.add_argument("--seed", type=int, help="of the draws (default: 0)")
    command.add_argument(
        "--repetition-penalty", type=float,
        help="above 1 makes tokens that were there less likely (default: 1, or as the run says)",
    )  # fmt: skip
    command.add_argument(
        "--stop", action="append", metavar="TEXT", type=utf8, help="ends an answer; may be repeated"
    )
    command.add_argument("--end-id", type=int, action="append", help="end token; may repeat")


def method_of(arguments: argparse.Namespace, task: bool) -> str:
    """How tokens are chosen: beam, greedy or sample."""
    if arguments.method == "sample" and arguments.temperature == 0:
        raise UserError("--temp 0 takes the likeliest token and is not for --method sample")
    if arguments.method:
        return arguments.method
    if arguments.temperature is not None:
        return "sample" if arguments.temperature else "greedy"
    beams = any(getattr(arguments, name) is not None for name in BEAM_OPTIONS)
    return "beam" if task or beams else "greedy"


def decoding(arguments: argparse.Namespace, trained, task: bool):
    """The settings that `jlora generate` decodes with.

    Args:
        trained: `decode` of the adapter's run, whose settings are the defaults, or None.
        task: whether the prompts are inputs of a task.

    Raises:
        UserError: a setting is out of its range, or is of another method.
    """
    from jlora.decoding.sampling import GenerateConfig
    from jlora.runs.recipe import DecodeConfig

    method = method_of(arguments, task)
    if not task and trained is None:
        trained = DecodeConfig(max_new_tokens=NEW_TOKENS)
    trained = trained or DecodeConfig()
    shared = given(arguments, SHARED_OPTIONS)
    if method != "sample" and not (method == "greedy" and arguments.temperature == 0):
        refuse(arguments, ["temperature"], f"is for --method sample, not {method}")
    if method != "sample":
        names = [name for name in SAMPLE_OPTIONS if name != "temperature"]
        refuse(arguments, names, f"is for --method sample, not {method} (--temp above 0 samples)")
    if method != "beam":
        refuse(arguments, BEAM_OPTIONS, f"is for --method beam, not {method}")
        common = ("eos_token_ids", "max_new_tokens", "repetition_penalty", "batch_size")
        base = {name: getattr(trained, name) for name in common}
        base["temperature"] = 1.0 if method == "sample" else 0.0
        base["stops"] = tuple(arguments.stop or ())
        return GenerateConfig(**{**base, **shared, **given(arguments, SAMPLE_OPTIONS)})
    refuse(arguments, ["stop"], "is for --method greedy or sample, not beam")
    settings = {**shared, **given(arguments, BEAM_OPTIONS)}
    limit = trained.rank_up_to
    if limit is not None and settings.get("length_penalty", limit) > limit:
        settings["rank_up_to"] = None  # the run's shortcut is for smaller penalties
    return replace(trained, **settings)


def given(arguments: argparse.Namespace, options: dict[str, str]) -> dict[str, Any]:
    """Settings and values of the options that the command line has."""
    found = {key: getattr(arguments, name) for name, key in options.items()}
    return {key: value for key, value in found.items() if value is not None}


def run_generate(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks import get_task
    from jlora.decoding.predictions import check_out
    from jlora.decoding.sampling import GenerateConfig
    from jlora.runs.answer import answer, stream_answer
    from jlora.runs.data_config import DataConfig
    from jlora.runs.form import find_form
    from jlora.runs.recipe import check_precision
    from jlora.system.distributed import world

    # All that can be wrong with the command line, and then with the data, before a model is loaded.
    if arguments.raw:
        refuse(arguments, ["separator_id"], "says another token than --raw, which takes none")
        refuse(arguments, TEMPLATE_OPTIONS, "is for a chat template, which --raw leaves out")
    if not arguments.data:
        refuse(arguments, ["task"], "says how --data is read")
    if arguments.out:
        check_out(arguments.out)
    adapter = adapter_file(arguments)
    recipe = adapter and adapter.recipe
    trained = recipe and recipe.decode
    decoding(arguments, trained, task=False)  # what is wrong in itself
    check_precision(arguments.precision)
    prompts, keeps, asked = arguments.prompt, None, None
    data, texts = None, False
    if arguments.data:
        talks = adapter is not None and recipe is not None and not adapter.of_task
        task = get_task(arguments.task or ("chat" if talks else "e2e"))
        same = recipe is not None and recipe.data.task == task.name
        if task.name == "chat":
            refuse(arguments, ["system_prompt"], "is for --prompt; conversations have their own")
            rows = task.read_file(arguments.data, recipe.data.features if same else None)
        else:
            rows = task.read(arguments.data, recipe.data.template if same else None)
        groups, data = task.groups(rows), recipe.data if same else DataConfig(task=task.name)
        prompts, keeps = [group.prompt for group in groups], [group.keep for group in groups]
        if task.name == "chat":
            if not groups:
                raise UserError(f"{arguments.data}: no example ends with an answer to ask for")
            asked = [group.asked for group in groups]
            texts = all(each.text is not None for each in asked)
    else:
        prompts = [read_prompt() if prompt == "-" else prompt for prompt in prompts]
    form = find_form(
        arguments.model, adapter, data=data, texts=texts, raw=arguments.raw,
        system=arguments.system_prompt, choice=arguments.chat_template,
        arguments=arguments.chat_template_args, separator_id=arguments.separator_id,
        end_ids=arguments.end_id, shorten=arguments.max_new_tokens is None,
    )  # fmt: skip
    config = decoding(arguments, trained, form.of_task)
    shown = [arguments.model, adapter, config, form, arguments.precision]
    show_anything()
    streams = isinstance(config, GenerateConfig) and world().size == 1 and not arguments.data
    if streams and len(prompts) == 1 and not arguments.out:
        for piece in stream_answer(prompts[0], *shown):
            print(piece, end="", flush=True)
        print()
        return 0
    out = Path(arguments.out) if arguments.out else None
    predictions = answer(prompts, *shown, out, keeps, asked)
    if not arguments.out:
        for prediction in predictions:
            print(prediction.prediction)
    return 0


def show_anything() -> None:
    """Print characters that the terminal's encoding lacks as question marks."""
    with contextlib.suppress(AttributeError):  # a test's or a notebook's output takes all
        sys.stdout.reconfigure(errors="replace")


def read_prompt() -> str:
    """Standard input as a prompt.

    Raises:
        UserError: it is no UTF-8.
    """
    try:
        text = sys.stdin.read()
        text.encode("utf-8")  # bytes of another encoding may have come through as surrogates
    except UnicodeError as error:
        raise UserError("standard input is not UTF-8; convert it, with iconv say") from error
    return text.removeprefix("\ufeff").removesuffix("\n")
