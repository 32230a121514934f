"""Commands for the beginning: is all there, what is fetched, a demo, data files."""

from __future__ import annotations

import argparse

from jlora.cli.options import (
    Setting,
    Verb,
    add_chat_options,
    data_settings,
    make_recipe_of,
    positive,
    refuse,
    whole_numbers,
)


def add_demo(verb: Verb) -> None:
    command = verb(
        "demo", run_demo, "Tune a small model on E2E in minutes: scores before and after. With "
        "--chat: on conversations, and then talk to it.",
    )  # fmt: skip
    command.add_argument("--chat", action="store_true", help="end in a conversation")
    command.add_argument("--out", help="run folder (default: runs/demo, runs/demo-chat)")
    command.add_argument("--data", help="folder with the E2E files")


def run_demo(arguments: argparse.Namespace) -> int:
    from jlora.cli import demo

    if arguments.chat:
        refuse(arguments, ["data"], "is of the demo without --chat, which brings its own")
        return demo.talk(arguments.out or "runs/demo-chat")
    return demo.main(arguments.out or "runs/demo", arguments.data)


def add_doctor(verb: Verb) -> None:
    command = verb(
        "doctor", run_doctor, "Check this machine; exit code 0 when all needed is there."
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")


def run_doctor(arguments: argparse.Namespace) -> int:
    from jlora.cli import doctor

    return doctor.main(as_json=arguments.json)


def add_pull(verb: Verb) -> None:
    command = verb("pull", run_pull, "Fetch a pretrained model or a dataset into jlora's cache.")
    command.add_argument(
        "name", help="smollm2-135m, a Hugging Face name such as gpt2-medium, or a dataset: e2e, "
        "webnlg, dart, boolq",
    )  # fmt: skip


def run_pull(arguments: argparse.Namespace) -> int:
    from jlora.data.pull_datasets import pull_any

    print(pull_any(arguments.name))
    return 0


def add_data(verb: Verb) -> None:
    command = verb("data", run_split, "Show examples as a model sees them, split or convert files.")
    steps = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    split = steps.add_parser("split", help="seeded parts; no input stands in two of them")
    split.add_argument("file", help="JSON Lines, context||target text, or WebNLG's or DART's JSON")
    split.add_argument("folder", help="to write, new or empty")
    split.add_argument(
        "--sizes", required=True, type=whole_numbers, metavar="TRAIN,VALID,TEST",
        help="distinct inputs of each part; two numbers: train and test",
    )  # fmt: skip
    split.add_argument("--seed", type=int, default=0)
    split.set_defaults(function=run_split)
    show = steps.add_parser("show", help="examples as the model sees them, and what is trained")
    show.add_argument(
        "data", action=Setting, key=data_settings, metavar="DATA", help="as --data of finetune"
    )
    show.add_argument("--model", action=Setting, key="model", required=True, help="name or path")
    show.add_argument("--task", action=Setting, key="data.task", help="as of finetune")
    add_chat_options(show)
    show.add_argument("-n", type=positive, default=3, help="how many examples (default: 3)")
    show.add_argument("--html", metavar="FILE.html", help="write a page instead")
    show.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto",
        help="without colour what is trained stands between \u27e6 and \u27e7",
    )  # fmt: skip
    show.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="any setting of a recipe, such as train.max_length=1024; may be repeated",
    )  # fmt: skip
    show.set_defaults(function=run_show)
    layout = steps.add_parser("convert", help="BoolQ's original layout and SuperGLUE's")
    layout.add_argument("file", help="JSON Lines in either layout")
    layout.add_argument("out", help="file to write")
    layout.add_argument("--to", required=True, choices=("superglue", "original"))
    layout.set_defaults(function=run_convert_data)


def run_split(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks.split import split_file

    for part in split_file(arguments.file, arguments.folder, arguments.sizes, arguments.seed):
        print(f"{part.path}: {part.inputs:,} inputs, {part.rows:,} rows")
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from jlora.runs.run_data import load_data
    from jlora.runs.show_data import page, uses_colour, view
    from jlora.system.files import write_text

    recipe = make_recipe_of(arguments)
    data = load_data(recipe, test=False)
    if arguments.html:
        write_text(arguments.html, page(data, arguments.n))
        print(arguments.html)
    else:
        print(view(data, arguments.n, uses_colour(arguments.color)))
    return 0


def run_convert_data(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks.boolq import convert_file

    count = convert_file(arguments.file, arguments.out, arguments.to)
    print(f"{arguments.out}: {count:,} rows")
    return 0
