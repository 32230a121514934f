"""Commands that look at run folders."""

from __future__ import annotations

import argparse
import json

from jlora.cli.options import (
    Verb,
)


def add_report(verb: Verb) -> None:
    command = verb("report", run_report, "Write one HTML page about a run, or comparing several.")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    command.add_argument(
        "--out", metavar="FILE.html",
        help="default: RUN/report.html; of several runs, runs/report.html",
    )  # fmt: skip


def run_report(arguments: argparse.Namespace) -> int:
    from jlora.report.html import write_report

    print(write_report(arguments.runs, out=arguments.out))
    return 0


def add_runs(verb: Verb) -> None:
    command = verb("runs", run_runs, "List run folders with their scores.")
    command.add_argument(
        "folder", nargs="?", default="runs", help="where to look, three levels deep (default: runs)"
    )
    command.add_argument("--group", action="store_true", help="seeds as one row: mean ± s.d.")
    command.add_argument(
        "--sort", choices=("name", "age", "loss"), default="name", help="default: %(default)s"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def run_runs(arguments: argparse.Namespace) -> int:
    from jlora.report.listing import describe_runs, list_runs, sort_runs
    from jlora.report.runs import find_runs, read_run

    found = sort_runs([read_run(path) for path in find_runs(arguments.folder)], arguments.sort)
    if arguments.json:
        print(json.dumps(describe_runs(found, arguments.group), indent=1))
    elif found:
        print(list_runs(found, arguments.group))
    else:
        print(f"no runs in {arguments.folder}")
    return 0
