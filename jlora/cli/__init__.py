"""The ``jlora`` command line: how a command is called, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from jlora.cli import answers, chat, folders, generate, models, serve, setup, training
from jlora.system import distributed
from jlora.system.console import paint
from jlora.system.errors import UserError

#: Each adds one subcommand, with its options, and stands beside the function that does it.
VERBS = (
    *(setup.add_demo, setup.add_doctor, setup.add_pull, setup.add_data),
    *(training.add_run, training.add_estimate, training.add_sweep, training.add_finetune),
    *(generate.add_generate, chat.add_chat, serve.add_serve, models.add_merge, models.add_export),
    *(models.add_convert, models.add_combine, models.add_analyze),
    *(answers.add_evaluate, answers.add_rerank),
    *(folders.add_report, folders.add_runs),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for what the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    processes = getattr(arguments, "nproc", None)
    try:
        if processes is None:
            if distributed.is_one_of_several():
                raise UserError("this command is for one process; leave mpirun out")
        elif distributed.started_by_mpi():
            distributed.join()
        elif processes > 1:
            return distributed.launch(processes, list(sys.argv[1:] if argv is None else argv))
        if arguments.verbose:
            from jlora.system import runtime

            runtime.set_verbose()
        code = arguments.function(arguments) or 0
        sys.stdout.flush()  # a full disk behind `>` shows only now
        return distributed.world().finish(code)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        return end("\njlora: stopped", 130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        drop_output()
        return 0
    except OSError as error:  # of a file that is not the user's own: the output, a temporary
        from jlora.system.files import os_error

        drop_output()
        return fail(os_error("use", error.filename or "the standard output", error))
    except RuntimeError as error:
        meaning = meaning_of(error)
        if arguments.verbose or meaning is None:
            distributed.world().abort(traceback.format_exc(), 1)
            raise
        return fail(UserError(f"{meaning}; -v shows Jittor's message"))
    except Exception:
        distributed.world().abort(traceback.format_exc(), 1)
        raise


_COMPILER = "a compiler failed on an operator, most often because memory ran out; free some"
_CARD = (
    "the GPU's memory ran out; lower train.batch_size and raise train.grad_accumulation, set "
    "checkpoint_activations=true, or to generate lower decode.batch_size; nvidia-smi shows what "
    "other programs hold"
)
#: What is in Jittor's message -> what the user can do.
MEANINGS = {
    "cmd failed": _COMPILER,
    "Error happend during compilation": _COMPILER,
    "GPU memory is overflow": _CARD,
    "Unable to alloc cuda device memory": _CARD,
    "the GPU failed in the card's memory": _CARD,  # of an operator of jlora's
}


def meaning_of(error: RuntimeError) -> str | None:
    """What an error of Jittor's says to the user; None if only a traceback helps."""
    text = str(error)
    return next((meaning for sign, meaning in MEANINGS.items() if sign in text), None)


def fail(error: UserError) -> int:
    """Say what is wrong in one line."""
    word = paint("error:", "red", sys.stderr)
    return end(f"jlora: {word} {' '.join(str(error).split())}", 2)


def end(message: str, code: int) -> int:
    """Say why this is the end, of all processes if there are several; the exit code."""
    distributed.world().abort(message, code)
    print(message, file=sys.stderr)
    return code


def drop_output() -> None:
    """Keep Python from writing, at its exit, what standard output could not take."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file: a test's or a notebook's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Version(argparse.Action):
    """``--version``; the package's data are looked up only when asked for."""

    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        import importlib.metadata

        try:
            print("jlora", importlib.metadata.version("jlora"))
        except importlib.metadata.PackageNotFoundError:
            print("jlora (not installed: run from its sources)")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="jlora", description="LoRA fine-tuning of language models on Jittor."
    )
    top.add_argument("--version", action=Version)
    top.add_argument("-v", "--verbose", action="store_true", help="show Jittor's own messages")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, function, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        command.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
            help="show Jittor's own messages",
        )  # fmt: skip
        return command

    for add in VERBS:
        add(verb)
    return top
