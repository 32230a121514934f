"""``make bench``: training and decoding beside the peers, on one page.

Cases are measured one after another, and each result is written down at once: a run that was cut
goes on with the cases that it lacks, if it is started with the same options and code. The page, its
figures as JSON and a chart come into the folder --out; the page goes to standard output too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks import training, work
from benchmarks.cases import SLOW, Plan, cases
from benchmarks.chart import draw
from benchmarks.environments import ISA, PACKAGES, missing, versions
from benchmarks.inputs import Inputs
from benchmarks.page import page
from benchmarks.sides import ROOT
from benchmarks.size import git
from jlora.system import machine
from jlora.system.files import write_text

QUICK = {
    "rounds": 2, "seconds": 3.0, "warmup": 1, "ours": 32, "theirs": 8, "tokens": 32,
    "peak_rounds": 4, "left_out": SLOW,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    options = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true",
                         help="one model, few rounds, no slow sides: five minutes")  # fmt: skip
    options.add_argument("--isa", choices=ISA, default="native",
                         help="avx2: hold all sides to what most laptops have")  # fmt: skip
    options.add_argument("--models", nargs="+", choices=work.MODELS, help="to train")
    options.add_argument("--only", nargs="+", metavar="CASE",
                         help="names, or how they begin: training, beam, streams")  # fmt: skip
    options.add_argument("--also", nargs="+", default=[], metavar="PEER",
                         choices=[n for n in training.PEERS if n.startswith(training.MICROSOFT)],
                         help="train with microsoft/LoRA's code too (it is cloned)")  # fmt: skip
    options.add_argument("--rounds", type=int)
    options.add_argument("--again", action="store_true", help="forget the results of a cut run")
    options.add_argument("--list", action="store_true", help="name the cases and end")
    options.add_argument("--models-folder", type=Path, default=ROOT / "runs" / "bench" / "models")
    options.add_argument(
        "--page",
        type=Path,
        metavar="FILE.md",
        help="write the page there too, with its pictures beside it",
    )
    options.add_argument("--out", type=Path, help="default: runs/bench/ISA, or ISA-quick")
    chosen = options.parse_args(arguments)
    name = chosen.isa + ("-quick" if chosen.quick else "")
    out = chosen.out or ROOT / "runs" / "bench" / name
    trained = chosen.models or (["gpt2-small"] if chosen.quick else list(work.MODELS))
    wanted = cases(trained, chosen.also)
    if chosen.only:
        begin = tuple(chosen.only)
        wanted = {n: case for n, case in wanted.items() if n == "peak" or n.startswith(begin)}
    if chosen.list:
        print("\n".join(wanted))
        return
    settings = {**(QUICK if chosen.quick else {}), **({"rounds": chosen.rounds} if chosen.rounds
                                                      else {})}  # fmt: skip
    plan = Plan(chosen.isa, Inputs(chosen.models_folder), chosen.also, **settings)
    results = measured(wanted, plan, out, settings, chosen.again)
    figures = {"head": head(chosen.isa, arguments), "results": results}
    write_text(out / "page.json", json.dumps(figures, indent=1) + "\n")
    for file in [out / "page.md", *([chosen.page] if chosen.page else [])]:
        draw(figures, file.with_suffix(""))
        write_text(file, page(figures, file.with_suffix(".svg").name))
    shutil.rmtree(out / "parts")
    print((out / "page.md").read_text())


def measured(wanted: dict, plan: Plan, out: Path, settings: dict, again: bool) -> list[dict]:
    """The results of all cases; those of a run that was cut, with the same settings and code, are
    kept."""
    parts = out / "parts"
    same = json.dumps([plan.isa, list(plan.also), settings, code()], default=list)
    if again or not parts.is_dir() or (parts / "settings").read_text() != same:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_text(parts / "settings", same)
    results = []
    for name, case in wanted.items():
        file = parts / f"{name}.json"
        started = time.monotonic()
        if not file.is_file():
            print(f"{name} ...", end="", file=sys.stderr, flush=True)
            write_text(file, json.dumps(case(plan)))
            print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        results += json.loads(file.read_text())
    return results


def code() -> str:
    """The commit, and whether the tree differs from it."""
    return git(ROOT, "rev-parse", "--short", "HEAD") + "+" * bool(git(ROOT, "status", "--short"))


def head(isa: str, arguments: list[str]) -> dict:
    """The machine, and what ran on it."""
    memory = machine.memory_limit() / 2**30
    used = f"make bench ARGS={shlex.quote(' '.join(arguments))}" if arguments else "make bench"
    return {
        "processor": machine.cpu_model(), "processors": machine.processors(),
        "features": machine.cpu_features(), "memory_gb": round(memory), "isa": isa,
        "date": str(date.today()), "command": used, "commit": code(),
        "load": os.getloadavg()[0],
        "versions": {e: versions(e) for e in PACKAGES if missing(e) is None},
    }  # fmt: skip
