"""What several commands have in common: options, and what they mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jlora.system.errors import UserError
from jlora.training.loggers import LOGGERS

#: Adds a subcommand: name, function, help; gives its parser.
Verb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
PRECISIONS = "auto, bf16, int8, int8-both (gradients too), int4, fp32 or plain"
ADAPTER_HELP = "run folder, adapter folder such as RUN/best, or loralib's .pt file"


class Setting(argparse.Action):
    """An option that stands for settings of the recipe; they are collected in ``settings``.

    Args:
        key: the setting, or a function from the option's value to settings and their values.
    """

    def __init__(self, option_strings, dest, key: str | Callable[[Any], dict[str, Any]], **options):
        if option_strings and options.get("nargs") != 0:
            name = option_strings[-1].lstrip("-")
            options.setdefault("metavar", name.replace("-", "_").upper())
        super().__init__(option_strings, "settings", default=(), **options)
        self.key = key

    def __call__(self, parser, namespace, values, option_string=None):
        value = self.const if self.nargs == 0 else values
        found = {self.key: value} if isinstance(self.key, str) else self.key(value)
        namespace.settings = [
            *namespace.settings,
            *(f"{key}={json.dumps(each)}" for key, each in found.items()),
        ]


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The recipe settings that a command line gives, as ``KEY=VALUE``; ``--set`` comes last."""
    log = getattr(arguments, "log", None)
    return [*arguments.settings, *([f"log={json.dumps(log)}"] if log else []), *arguments.set]


def data_settings(path: str) -> dict[str, str]:
    """What ``--data`` means: a folder, or the training file, with the other splits beside it."""
    if Path(path).is_file():
        return {"data.train": path, "data.folder": str(Path(path).parent)}
    return {"data.folder": str(Path(path))}


def add_recipe_settings(command: argparse.ArgumentParser) -> None:
    """``--data`` and ``--set``, of every command that takes a recipe."""
    command.add_argument(
        "--data", action=Setting, key=data_settings, help="folder with train, valid and test "
        "files, or the training file itself; valid may be missing",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting of the recipe, such as train.steps=100; may be repeated",
    )  # fmt: skip


def add_run_options(command: argparse.ArgumentParser) -> None:
    add_nproc(command)
    add_recipe_settings(command)
    command.add_argument("--out", help="run folder (default: runs/ and the recipe's name)")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument("--precision", action=Setting, key="precision", help=PRECISIONS)
    command.add_argument(
        "--checkpoint-activations", action=Setting, key="checkpoint_activations",
        nargs=0, const=True,
        help="compute activations again in the backward pass: less memory, a third more time",
    )  # fmt: skip
    command.add_argument(
        "--no-memory-check", action="store_true",
        help="start even if the run seems not to fit into memory (see jlora estimate)",
    )  # fmt: skip
    command.add_argument(
        "--log", action="append", choices=tuple(LOGGERS),
        help="log there as well, offline unless WANDB_MODE or SWANLAB_MODE say otherwise; may be "
        "repeated",
    )  # fmt: skip


def add_chat_options(command: argparse.ArgumentParser) -> None:
    """What becomes of conversations; see `jlora.runs.data_config.DataConfig`."""

    def setting(option: str, key: str, holder=command, **options) -> None:
        holder.add_argument(option, action=Setting, key=f"data.{key}", **options)

    setting(
        "--chat-template", "chat_template", metavar="NAME|FILE", help="instead of the model's own: "
        "chatml, llama-3, gemma, mistral, alpaca, a Jinja file, or none",
    )  # fmt: skip
    setting(
        "--chat-template-args", "chat_template_args", type=json_object, metavar="JSON",
        help="more variables for the template, such as '{\"enable_thinking\": false}'",
    )  # fmt: skip
    mask = command.add_mutually_exclusive_group()
    setting(
        "--mask-prompt", "mask_prompt", mask, nargs=0, const=True,
        help="train answers alone (the default, but for whole texts)",
    )  # fmt: skip
    setting("--no-mask-prompt", "mask_prompt", mask, nargs=0, const=False, help="train every token")
    setting(
        "--train-on", "train_on", choices=("all", "last", "each"), help="which answers of a "
        "conversation: all (default), the last, or each as an example of its own",
    )  # fmt: skip
    setting(
        "--valid-split", "valid_split", type=float, metavar="SHARE",
        help="of the training file for validation, such as 0.05",
    )  # fmt: skip


def json_object(text: str) -> dict[str, Any]:
    """``{"enable_thinking": false}`` -> a dict"""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def add_adapter_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lora-alpha", type=float, help="of a .pt file, which does not say it")
    command.add_argument(
        "--enable-lora", type=flags, metavar="1,0,1",
        help="of a .pt file: which blocks of fused layers have LoRA",
    )  # fmt: skip
    command.add_argument(
        "--force", action="store_true", help="take an adapter made for another base model"
    )


def flags(text: str) -> list[bool]:
    """``1,0,1`` -> [True, False, True]"""
    if not set(text.split(",")) <= {"0", "1"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1,0,1")
    return [flag == "1" for flag in text.split(",")]


def utf8(text: str) -> str:
    """A text of the command line, whose bytes were UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # other bytes have come through as surrogates
        raise argparse.ArgumentTypeError(
            f"{ascii(text)} is not UTF-8; set the terminal to it"
        ) from None
    return text


def whole_numbers(text: str) -> list[int]:
    """``2400,400,470`` -> [2400, 400, 470]"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2400,400,470") from None


def decimals(text: str) -> list[float]:
    """``.7,.3`` -> [0.7, 0.3]"""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form .7,.3") from None


def add_nproc(command: argparse.ArgumentParser, dest: str = "nproc") -> None:
    command.add_argument(
        "--nproc", dest=dest, type=positive, default=1, metavar="N",
        help="processes on this machine that divide every batch among them (needs MPI: "
        "pip install 'jlora[mpi]'); the result does not depend on N",
    )  # fmt: skip


def targets(text: str) -> list[str] | str:
    """``q_proj, v_proj`` -> ["q_proj", "v_proj"], and ``all-linear`` as it is."""
    if text.strip().lower() == "all-linear":
        return "all-linear"
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing; write a,b")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def open_recipe(arguments: argparse.Namespace, name: str | None):
    """The recipe and the run folder that a command line means."""
    from jlora.runs.recipe import find_recipe, load_recipe

    if arguments.resume:
        if overrides(arguments) or getattr(arguments, "smoke", False):
            raise UserError(
                "--resume takes every setting from the run folder; leave the others out"
            )
        out = arguments.out or (f"runs/{Path(name).stem}" if name else None)
        if out is None:
            raise UserError("--resume needs the run folder: --out RUN")
        config = Path(out) / "config.yaml"
        if not config.is_file():
            raise UserError(f"{out}: no run to resume there; start it without --resume")
        return load_recipe(config), Path(out)
    if name:
        recipe = load_recipe(find_recipe(name), overrides(arguments))
    else:
        recipe = make_recipe_of(arguments)
    return recipe, Path(arguments.out or f"runs/{Path(name).stem if name else 'finetune'}")


def make_recipe_of(arguments: argparse.Namespace):
    """The recipe that a command line alone says."""
    from jlora.runs.chat_data import complete
    from jlora.runs.recipe import apply_override, make_recipe

    values: dict = {}
    for override in overrides(arguments):
        apply_override(values, override)
    if "model" not in values:
        raise UserError("no --model given, such as --model smollm2-135m")
    return make_recipe(complete(values), "command line")


def refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse options that would have no effect.

    Args:
        names: of options whose default is None or false.
        why: what the option is for, or what else decides it.

    Raises:
        UserError: one of them is given.
    """
    for name in names:
        if getattr(arguments, name) is not None and getattr(arguments, name) is not False:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {why}; leave it out")


def adapter_file(arguments: argparse.Namespace):
    """The adapter that a command line names, or None.

    Raises:
        UserError: there is none, but options of one.
    """
    from jlora.runs.adapter_file import AdapterFile

    if arguments.adapter is None:
        refuse(arguments, ("lora_alpha", "enable_lora", "force"), "is for an --adapter")
        return None
    path = Path(arguments.adapter)
    return AdapterFile(path, arguments.lora_alpha, arguments.enable_lora, arguments.force)
