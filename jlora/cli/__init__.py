"""The ``jlora`` command line: one subcommand a verb; what they do is in `jlora.cli.commands`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from jlora.cli import commands
from jlora.system import distributed
from jlora.system.errors import UserError
from jlora.training.loggers import LOGGERS

PRECISIONS = "auto, bf16, int8, int8-both (gradients too), fp32 or plain"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    processes = getattr(arguments, "nproc", None)
    try:
        size = distributed.announced_size()
        if processes is None:
            if distributed.started_by_mpi() and size is not None:
                raise UserError("this command is for one process; leave mpirun out")
        elif processes > 1 and (size is None or not distributed.started_by_mpi()):
            return distributed.launch(processes, list(sys.argv[1:] if argv is None else argv))
        else:
            distributed.join()
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
        if arguments.verbose or "cmd failed" not in str(error):
            distributed.world().abort(traceback.format_exc(), 1)
            raise
        return fail(
            UserError(
                "the C++ compiler failed on an operator, most often because memory ran out; free "
                "some, or set use_parallel_op_compiler=1 in the environment; -v shows its output"
            )
        )
    except Exception:
        distributed.world().abort(traceback.format_exc(), 1)
        raise


def fail(error: UserError) -> int:
    """Say what is wrong in one line."""
    return end(f"jlora: error: {' '.join(str(error).split())}", 2)


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

    demo = verb(
        "demo", commands.run_demo, "Tune a small model on E2E in minutes: scores before and after."
    )
    demo.add_argument("--out", default="runs/demo", help="run folder (default: %(default)s)")
    demo.add_argument("--data", help="folder with the E2E files")

    doctor = verb(
        "doctor", commands.run_doctor, "Check this machine; exit code 0 when all needed is there."
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable output")

    pull = verb(
        "pull", commands.run_pull, "Fetch a pretrained model or a dataset into jlora's cache."
    )
    pull.add_argument(
        "name", help="smollm2-135m, a Hugging Face name such as gpt2-medium, or a dataset: e2e, "
        "webnlg, dart, boolq",
    )  # fmt: skip

    text = "Split a dataset's file, or convert BoolQ's."
    data = verbs.add_parser("data", help=text, description=text)
    steps = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    split = steps.add_parser("split", help="seeded parts; no input stands in two of them")
    split.add_argument("file", help="JSON Lines, context||target text, or WebNLG's or DART's JSON")
    split.add_argument("folder", help="to write, new or empty")
    split.add_argument(
        "--sizes", required=True, type=whole_numbers, metavar="TRAIN,VALID,TEST",
        help="distinct inputs of each part; two numbers: train and test",
    )  # fmt: skip
    split.add_argument("--seed", type=int, default=0)
    split.set_defaults(function=commands.run_split)
    layout = steps.add_parser("convert", help="BoolQ's original layout and SuperGLUE's")
    layout.add_argument("file", help="JSON Lines in either layout")
    layout.add_argument("out", help="file to write")
    layout.add_argument("--to", required=True, choices=("superglue", "original"))
    layout.set_defaults(function=commands.run_convert_data)

    run = verb("run", commands.run_run, "Train, decode, score and report as a recipe says.")
    run.add_argument("recipe", nargs="?", help="a YAML file, or the name of one that comes along")
    run.add_argument(
        "--smoke", action="store_true", help="a few steps and inputs only: does all of it work?"
    )
    add_run_options(run)

    estimate = verb(
        "estimate", commands.run_estimate, "Estimate a recipe's memory; exit code 1: too much."
    )
    estimate.add_argument("recipe", help="a YAML file, or the name of one that comes along")
    estimate.add_argument("--data", help="as of jlora run")
    estimate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    estimate.add_argument("--json", action="store_true", help="machine-readable output, in bytes")

    sweep = verb(
        "sweep", commands.run_sweep, "Run a recipe under many settings and compare the scores."
    )
    sweep.add_argument("recipe", help="a YAML file, or the name of one that comes along")
    sweep.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,VALUE",
        help="a setting's values, such as lora.r=1,2,4,8,64; of several grids all combinations",
    )  # fmt: skip
    sweep.add_argument("--cases", metavar="FILE", help="a YAML file of `name: {setting: value}`")
    sweep.add_argument("--out", help="folder of the runs (default: runs/ and the recipe's name)")
    sweep.add_argument("--data", help="as of jlora run")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    sweep.add_argument("--smoke", action="store_true", help="as of jlora run")
    add_nproc(sweep, dest="nproc_of_each")

    finetune = verb(
        "finetune", commands.run_finetune, "Train an adapter on prompt/completion data."
    )
    finetune.add_argument("--recipe", help="start from this recipe's settings")
    finetune.add_argument("--model", help="name or path of the base model")
    finetune.add_argument(
        "--task", help="how the files are read: e2e (its text or CSV; the default), webnlg, dart, "
        "boolq, jsonl or restaurants (built in)",
    )  # fmt: skip
    finetune.add_argument("--rank", type=int, help="r of LoRA")
    finetune.add_argument("--alpha", type=float, help="lora_alpha")
    finetune.add_argument("--target-modules", help="comma-separated, such as q_proj,v_proj")
    finetune.add_argument("--lr", type=float, help="learning rate")
    finetune.add_argument("--batch-size", type=int)
    length = finetune.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="updates")
    length.add_argument("--epochs", type=float, help="instead of --steps (default: 5)")
    finetune.add_argument("--seed", type=int)
    add_run_options(finetune)

    generate = verb(
        "generate", commands.run_generate, "Answer prompts with a model and its adapter."
    )
    generate.add_argument("--model", help="base model (default: the one of the adapter's run)")
    generate.add_argument("--adapter", help=ADAPTER_HELP)
    add_adapter_options(generate)
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    source.add_argument("--data", help="a file of the task; its distinct inputs are the prompts")
    generate.add_argument("--task", help="how --data is read (default: e2e)")
    generate.add_argument("--out", help="predictions.jsonl to write; default: print the texts")
    generate.add_argument("--method", choices=("beam", "greedy", "sample"), default="beam")
    run = "default: as the adapter's run says, else"
    generate.add_argument("--max-new-tokens", type=int, help=f"{run} 64")
    generate.add_argument("--batch-size", type=int, help=f"prompts decoded together; {run} 32")
    generate.add_argument("--beams", type=int, help=f"of beam search; {run} 10")
    generate.add_argument("--length-penalty", type=float, help=f"of beam search; {run} 0.8")
    generate.add_argument("--no-repeat-ngram-size", type=int, help=f"of beam search; {run} 4")
    generate.add_argument("--temperature", type=float, help="of sampling (default: 1)")
    generate.add_argument("--top-k", type=int, help="of sampling (default: all words)")
    generate.add_argument("--top-p", type=float, help="of sampling (default: 1)")
    generate.add_argument("--seed", type=int, help="of sampling (default: 0)")
    generate.add_argument("--separator-id", type=int, help="token after the prompt")
    generate.add_argument("--end-id", type=int, action="append", help="end token; may repeat")
    generate.add_argument(
        "--raw", action="store_true", help="no separator token: go on with the prompt's own text"
    )
    generate.add_argument("--precision", default="auto", help=PRECISIONS)
    add_nproc(generate)

    merge = verb(
        "merge", commands.run_merge, "Write base and adapter as one model that transformers loads."
    )
    merge.add_argument("base", help="name or path of the base model")
    merge.add_argument("adapter", help=ADAPTER_HELP)
    merge.add_argument("out", help="folder to write, new or empty")
    merge.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add_adapter_options(merge)

    export = verb("export", commands.run_export, "Write a model, merged or plain, as a GGUF file.")
    export.add_argument("model", help="name or path of the base model")
    export.add_argument("--gguf", required=True, metavar="OUT.gguf", help="file to write")
    export.add_argument("--adapter", help=f"merge this first: {ADAPTER_HELP}")
    export.add_argument(
        "--type", default="f32", choices=("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"),
        help="of the matrices (default: f32)",
    )  # fmt: skip
    export.add_argument(
        "--no-tokenizer", action="store_true", help="leave out the tokenizer, which llama.cpp needs"
    )
    add_adapter_options(export)

    convert = verb(
        "convert", commands.run_convert, "Write an adapter as loralib's .pt file, or back."
    )
    convert.add_argument("adapter", help=ADAPTER_HELP)
    convert.add_argument("out", help="a .pt file for a folder, a folder for a .pt file")
    convert.add_argument("--model", help="base model (default: the one of the adapter's run)")
    add_adapter_options(convert)

    analyze = verb(
        "analyze", commands.run_analyze, "What an adapter learned: the LoRA paper's figures."
    )
    analyze.add_argument("adapter", help=ADAPTER_HELP)
    analyze.add_argument("--other", metavar="ADAPTER", help="another one, to compare subspaces")
    analyze.add_argument(
        "--model", help="base model, for the amplification of its directions (default: the one of "
        "the adapter's run)",
    )  # fmt: skip
    analyze.add_argument(
        "--of", choices=("A", "B", "dW"), default="A",
        help="whose directions are compared: A's right-singular vectors (the paper; the default), "
        "B's left ones, or those of the whole change",
    )  # fmt: skip
    analyze.add_argument("--layers", metavar="REGEX", help="only layers in whose name it is found")
    analyze.add_argument("--out", metavar="FOLDER", help="write analysis.json and figures there")
    add_adapter_options(analyze)

    evaluate = verb("evaluate", commands.run_evaluate, "Score texts by the metrics of a task.")
    evaluate.add_argument("task", help="e2e, webnlg, dart, boolq, ...")
    evaluate.add_argument(
        "--refs", required=True, help="references, groups split by empty lines; of a choice as "
        "BoolQ: the right answers, one a line",
    )  # fmt: skip
    evaluate.add_argument("--hyps", required=True, help="hypotheses, one a line")
    evaluate.add_argument("--metrics", metavar="A,B", help="instead of the task's own")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    rerank = verb(
        "rerank", commands.run_rerank, "Choose again for another length penalty; no decoding."
    )
    rerank.add_argument("predictions", help="predictions.jsonl")
    rerank.add_argument("--length-penalty", type=float, required=True)
    rerank.add_argument("--out", required=True, help="predictions.jsonl to write (and .txt)")

    report = verb(
        "report", commands.run_report, "Write one HTML page about a run, or comparing several."
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    report.add_argument(
        "--out", metavar="FILE.html",
        help="default: RUN/report.html; of several runs, runs/report.html",
    )  # fmt: skip

    runs = verb("runs", commands.run_runs, "List run folders with their scores.")
    runs.add_argument(
        "folder", nargs="?", default="runs", help="where to look, three levels deep (default: runs)"
    )
    runs.add_argument("--group", action="store_true", help="seeds as one row: mean ± s.d.")
    runs.add_argument(
        "--sort", choices=("name", "age", "loss"), default="name", help="default: %(default)s"
    )
    runs.add_argument("--json", action="store_true", help="print JSON")
    return top


ADAPTER_HELP = "run folder, adapter folder such as RUN/best, or loralib's .pt file"


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


def whole_numbers(text: str) -> list[int]:
    """``2400,400,470`` -> [2400, 400, 470]"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2400,400,470") from None


def add_nproc(command: argparse.ArgumentParser, dest: str = "nproc") -> None:
    command.add_argument(
        "--nproc", dest=dest, type=positive, default=1, metavar="N",
        help="processes on this machine that divide every batch among them (needs MPI: "
        "pip install 'jlora[mpi]'); the result does not depend on N",
    )  # fmt: skip


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_run_options(command: argparse.ArgumentParser) -> None:
    add_nproc(command)
    command.add_argument("--out", help="run folder (default: runs/ and the recipe's name)")
    command.add_argument(
        "--data", help="folder with train, valid and test files, or the training file itself; "
        "valid may be missing",
    )  # fmt: skip
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    command.add_argument("--precision", help=PRECISIONS)
    command.add_argument(
        "--checkpoint-activations", action="store_true", default=None,
        help="compute activations again in the backward pass: less memory, a third more time",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="change any setting of the recipe, such as train.steps=100; may be repeated",
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


if __name__ == "__main__":
    sys.exit(main())
