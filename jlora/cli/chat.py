"""`jlora chat`: a conversation in a terminal, or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from jlora.cli.generate import (
    NEW_TOKENS,
    add_choice_options,
    add_template_options,
    decoding,
    show_anything,
)
from jlora.cli.options import ADAPTER_HELP, PRECISIONS, Verb, adapter_file, add_adapter_options
from jlora.system.console import say
from jlora.system.errors import UserError

HELP = """\
/reset           forget what was said
/system TEXT     set the system prompt (without TEXT: as at the beginning); what was said stays
/adapter NAME    put another adapter on; off: the model alone; without NAME: which one is on
/help            this
/exit            end, as Ctrl-D does
A line that ends in \\ goes on in the next one; a line that begins with a space is never a command.
Ctrl-C stops an answer."""


def add_chat(verb: Verb) -> None:
    command = verb("chat", run_chat, "Talk to a model; /help shows what can be done on the way.")
    command.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="name or path of a model, or a run or adapter folder (default: the one of --adapter)",
    )  # fmt: skip
    command.add_argument("--model", dest="named", help="the same, as other commands have it")
    command.add_argument("--adapter", help=ADAPTER_HELP)
    add_adapter_options(command)
    add_template_options(command)
    add_choice_options(command, f"default: as the adapter's run says, else {NEW_TOKENS}")
    command.add_argument("--precision", default="auto", help=PRECISIONS)
    command.set_defaults(method=None, batch_size=None, beams=None, length_penalty=None)
    command.set_defaults(no_repeat_ngram_size=None)


def run_chat(arguments: argparse.Namespace) -> int:
    from jlora.runs.chat import Talk
    from jlora.runs.recipe import check_precision

    if arguments.named is not None:
        if arguments.model is not None:
            raise UserError(f"{arguments.model} and --model {arguments.named}; give one of the two")
        arguments.model = arguments.named
    if arguments.model is None and arguments.adapter is None:
        raise UserError("no model given, such as: jlora chat smollm2-135m")
    if arguments.model is not None and is_adapter(Path(arguments.model)):
        if arguments.adapter is not None:
            raise UserError(
                f"{arguments.model} is an adapter itself; give its base model, or one adapter"
            )
        arguments.adapter, arguments.model = arguments.model, None
    adapter = adapter_file(arguments)
    recipe = adapter and adapter.recipe
    config = decoding(arguments, recipe and recipe.decode, task=False)
    check_precision(arguments.precision)
    talk = Talk(
        arguments.model,
        adapter,
        config,
        arguments.system_prompt,
        arguments.chat_template,
        arguments.chat_template_args,
        arguments.precision,
        arguments.end_id,
    )
    show_anything()
    return converse(talk, sys.stdin.isatty())


def is_adapter(path: Path) -> bool:
    """Whether a folder is a run's or an adapter's, and no model's."""
    adapter = any((path / name).is_file() for name in ("config.yaml", "adapter_config.json"))
    return adapter and not (path / "config.json").is_file()


def converse(talk, interactive: bool) -> int:
    """Read lines, answer them and do what commands ask for; the exit code.

    Args:
        talk: a `jlora.runs.chat.Talk`.
        interactive: whether somebody is at the keyboard: errors do not end the conversation,
            and Ctrl-C stops an answer, not the program.
    """
    if interactive:
        say("type a message; /help shows what else can be done")
    begun = talk.chat.system
    for line in lines(interactive):
        try:
            if line.startswith("/"):
                if not obey(talk, line, begun):
                    break
            elif line.strip():
                answer(talk, line, interactive)
        except UserError as error:
            if not interactive:
                raise
            say(f"error: {' '.join(str(error).split())}")
    return 0


def lines(interactive: bool) -> Iterator[str]:
    """What is typed or piped in, line by line, with those that end in a backslash put together.

    Raises:
        UserError: a line is not UTF-8.
    """
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives `input` editing and history)
    number, begun = 0, ""
    while True:
        number += 1
        try:
            line = ask("... " if begun else "> ") if interactive else sys.stdin.readline()
            line.encode("utf-8")  # bytes of another encoding may come through as surrogates
        except KeyboardInterrupt:
            if not interactive:
                raise
            begun = ""
            print()
            say("Ctrl-D or /exit ends the conversation")
            continue
        except EOFError:
            print()
            return
        except UnicodeError as error:
            raise UserError(
                f"line {number} of standard input is not UTF-8; convert it, with iconv say"
            ) from error
        if not interactive and not line:
            if begun:
                yield begun
            return
        line = line.removesuffix("\n").removesuffix("\r")
        line = line.removeprefix("\ufeff") if number == 1 else line
        if line.endswith("\\"):
            begun += line[:-1] + "\n"
            continue
        whole, begun = begun + line, ""
        yield whole


def ask(prompt: str) -> str:
    """A line from the keyboard; ``prompt`` does not get among answers that go to a file."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def answer(talk, text: str, interactive: bool) -> None:
    """Print the answer to a message as it comes."""
    from jlora.decoding.text_stream import stripped

    with Interrupt() if interactive else contextlib.nullcontext() as interrupt:
        leave = (lambda: interrupt.requested) if interactive else (lambda: False)
        for piece in stripped(talk.say(text, leave)):
            print(piece, end="", flush=True)
    print(flush=True)
    if talk.cut:
        say("the answer was cut at its largest number of tokens (--max-new-tokens)")


def obey(talk, line: str, system: str | None) -> bool:
    """Do what a command says; whether the conversation goes on.

    Args:
        system: the system prompt of the beginning.

    Raises:
        UserError: there is no such command, or it cannot be done.
    """
    from jlora.runs.adapter_file import AdapterFile

    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit"):
        return False
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        talk.reset()
        say("begun anew")
    elif command == "/system":
        talk.set_system(rest or system)
        say(f"system prompt: {talk.chat.system or 'as the template has it'}")
    elif command == "/adapter":
        if rest:
            talk.set_adapter(None if rest == "off" else AdapterFile(Path(rest)))
        say(f"adapter: {talk.adapter or 'none'}")
    else:
        raise UserError(f"no command {command}; /help shows them (a space before it: a message)")
    return True


class Interrupt:
    """Notes Ctrl-C while an answer comes; a second one ends the program."""

    def __enter__(self) -> Interrupt:
        self.requested = False
        self._before = None
        with contextlib.suppress(ValueError):  # not in the main thread: signals are not ours
            self._before = signal.signal(signal.SIGINT, self._note)
            # Jittor takes a lock that a signal has interrupted for one that failed.
            signal.siginterrupt(signal.SIGINT, False)
        return self

    def _note(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc_info) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
