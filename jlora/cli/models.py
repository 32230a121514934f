"""Commands about models and adapters as files: merge, export, convert, analyze."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jlora.cli.options import (
    ADAPTER_HELP,
    Verb,
    adapter_file,
    add_adapter_options,
    decimals,
    positive,
)
from jlora.system.errors import UserError


def add_merge(verb: Verb) -> None:
    command = verb(
        "merge", run_merge, "Write base and adapter as one model that transformers loads."
    )
    command.add_argument("base", help="name or path of the base model")
    command.add_argument("adapter", help=ADAPTER_HELP)
    command.add_argument("out", help="folder to write, new or empty")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights: larger "
        "models become several files and an index (default: 5GB)",
    )  # fmt: skip
    add_adapter_options(command)


def run_merge(arguments: argparse.Namespace) -> int:
    from jlora.adapters.export_folder import bytes_of, write_merged
    from jlora.runs.adapter_file import open_model
    from jlora.system.files import check_absent

    check_absent(arguments.out)  # before a minute of loading
    most = bytes_of(arguments.max_shard_size)
    adapter = adapter_file(arguments)
    model = open_model(arguments.base, adapter)
    tokens, template = trained_tokens(model, adapter), trained_template(adapter)
    say_rounding(model, adapter)
    print(write_merged(model, arguments.out, arguments.dtype, tokens, template, most))
    return 0


def add_export(verb: Verb) -> None:
    command = verb("export", run_export, "Write a model, merged or plain, as a GGUF file.")
    command.add_argument("model", help="name or path of the base model")
    command.add_argument("--gguf", required=True, metavar="OUT.gguf", help="file to write")
    command.add_argument("--adapter", help=f"merge this first: {ADAPTER_HELP}")
    command.add_argument(
        "--type", default="f32", help="of the matrices: f32 (default), f16, bf16, q8_0, q5_0, "
        "q5_1, q4_0, q4_1; with the package libgguf q6_k, q5_k_m, q4_k_m",
    )  # fmt: skip
    command.add_argument(
        "--no-tokenizer", action="store_true", help="leave out the tokenizer, which llama.cpp needs"
    )
    add_adapter_options(command)


def run_export(arguments: argparse.Namespace) -> int:
    from jlora.adapters.export_gguf import export_gguf
    from jlora.formats.gguf_kinds import check_written
    from jlora.runs.adapter_file import base_name, open_model
    from jlora.runs.chat import find_chat_template
    from jlora.system.files import check_absent

    check_written(arguments.type.upper())  # before a minute of loading
    check_absent(arguments.gguf)
    adapter = adapter_file(arguments)
    model = open_model(arguments.model, adapter)
    tokens, tokenizer = trained_tokens(model, adapter), not arguments.no_tokenizer
    template = find_chat_template(base_name(arguments.model, adapter), adapter)
    say_rounding(model, adapter)
    print(export_gguf(model, arguments.gguf, arguments.type, tokenizer, tokens, template))
    return 0


def say_rounding(model: Any, adapter: Any) -> None:
    """What the adapter is merged into, where it was trained on something coarser."""
    precision = adapter.recipe.precision if adapter is not None and adapter.recipe else "auto"
    if precision.startswith("int"):
        print(
            f"the adapter was trained beside weights rounded to {precision}; it is merged into "
            f"those of {model.source.name} as they are there"
        )


def trained_tokens(model: Any, adapter: Any) -> Any:
    """The tokens around the completions in the run of an `AdapterFile`, where it is known."""
    from jlora.adapters.trained_tokens import UNKNOWN, TrainedTokens

    if adapter is None or adapter.recipe is None:
        return UNKNOWN
    if not adapter.of_task:
        from jlora.data.end_tokens import template_end

        template = trained_template(adapter)
        return TrainedTokens(end=template and template_end(model.tokenizer, template)[0])
    data = adapter.recipe.data
    return TrainedTokens.of(model.tokenizer, data.separator_id, data.end_id)


def trained_template(adapter: Any) -> Any:
    """The chat template that an adapter was trained with, or None."""
    from jlora.data.chat_template import find_template

    if adapter is None or adapter.recipe is None or adapter.of_task:
        return None
    return find_template(adapter.folder)


def add_convert(verb: Verb) -> None:
    command = verb("convert", run_convert, "Write an adapter as loralib's .pt file, or back.")
    command.add_argument("adapter", help=ADAPTER_HELP)
    command.add_argument("out", help="a .pt file for a folder, a folder for a .pt file")
    command.add_argument("--model", help="base model (default: the one of the adapter's run)")
    add_adapter_options(command)


def run_convert(arguments: argparse.Namespace) -> int:
    from jlora.adapters.loralib import is_loralib, loralib_note
    from jlora.runs.adapter_file import open_model
    from jlora.system.files import check_absent

    to_file = is_loralib(arguments.out)
    if to_file == is_loralib(arguments.adapter):
        raise UserError("give a folder and a .pt file, or a .pt file and a folder")
    check_absent(arguments.out)
    adapter = adapter_file(arguments)
    model = open_model(arguments.model, adapter)
    if to_file:
        print(loralib_note(model.save_loralib(arguments.out), model.lora_layers()))
    else:
        model.save_pretrained(arguments.out)
    tokens, own = trained_tokens(model, adapter), model.tokenizer and model.tokenizer.eos_token_id
    if {tokens.separator, tokens.end} - {None, own}:
        print(
            "an adapter's files do not say which tokens it was trained with: give "
            f"--separator-id {tokens.separator} --end-id {tokens.end} to generate"
        )
    print(f"written: {arguments.out}")
    return 0


def add_combine(verb: Verb) -> None:
    command = verb("combine", run_combine, "Make one adapter of several of the same base model.")
    command.add_argument("adapters", nargs="+", help="run folders or adapter folders")
    command.add_argument(
        "--weights", type=decimals, metavar=".7,.3", help="one for each (default: 1 divided by "
        "their number)",
    )  # fmt: skip
    command.add_argument(
        "--type", choices=("svd", "linear", "cat"), default="svd",
        help="svd: the nearest change of a rank (default); cat: exact, of the sum of the ranks; "
        "linear: A and B added each by itself",
    )  # fmt: skip
    command.add_argument("--rank", type=positive, help="of svd (default: the largest of theirs)")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    command.add_argument(
        "--force", action="store_true", help="combine adapters made for different base models"
    )


def run_combine(arguments: argparse.Namespace) -> int:
    from jlora.runs.adapter_file import AdapterFile
    from jlora.runs.combining import combine_files

    count = len(arguments.adapters)
    weights = arguments.weights or [1 / count] * count
    config = combine_files(
        arguments.adapters, weights, arguments.out, arguments.type, arguments.rank, arguments.force
    )
    ranks = sorted({config.r, *config.rank_pattern.values()})
    if any(AdapterFile(Path(adapter)).recipe for adapter in arguments.adapters):
        print(
            "its files do not say with which template and tokens round the texts its parts were "
            "trained: to generate, give the same options as for those"
        )
    print(f"rank {' and '.join(map(str, ranks))}; written: {arguments.out}")
    return 0


def add_analyze(verb: Verb) -> None:
    command = verb("analyze", run_analyze, "What an adapter learned: the LoRA paper's figures.")
    command.add_argument("adapter", help=ADAPTER_HELP)
    command.add_argument("--other", metavar="ADAPTER", help="another one, to compare subspaces")
    command.add_argument(
        "--model", help="base model, for the amplification of its directions (default: the one of "
        "the adapter's run)",
    )  # fmt: skip
    command.add_argument(
        "--of", choices=("A", "B", "dW"), default="A",
        help="whose directions are compared: A's right-singular vectors (the paper; the default), "
        "B's left ones, or those of the whole change",
    )  # fmt: skip
    command.add_argument("--layers", metavar="REGEX", help="only layers in whose name it is found")
    command.add_argument("--out", metavar="FOLDER", help="write analysis.json and figures there")
    add_adapter_options(command)


def run_analyze(arguments: argparse.Namespace) -> int:
    from jlora.adapters.loralib import is_loralib
    from jlora.analysis.figures import write_study
    from jlora.analysis.study import analyze
    from jlora.analysis.tables import tables
    from jlora.runs.adapter_file import AdapterFile
    from jlora.system.files import check_writable

    if arguments.out:
        check_writable(arguments.out)  # before a minute of loading
    paths = [Path(path) for path in (arguments.adapter, arguments.other) if path is not None]
    no_file = not any(is_loralib(path) for path in paths)
    files = []
    for path in paths:
        # The options of .pt files are for those of the two that are such files.
        of_file = (arguments.lora_alpha, arguments.enable_lora)
        settings = of_file if no_file or is_loralib(path) else (None, None)
        files.append(AdapterFile(path, *settings, arguments.force))
    study = analyze(files, arguments.model, arguments.of, arguments.layers)
    print(tables(study))
    if arguments.out:
        written = write_study(study, Path(arguments.out))
        print("written:", *written)
    return 0
