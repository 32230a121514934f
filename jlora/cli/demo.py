"""``jlora demo``: tune a small model, and show what it said before and says now."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jlora.cli.chat import converse
from jlora.data.cafe import conversations, write_cafe
from jlora.data.readers import json_lines, shorten
from jlora.data.tasks import get_task
from jlora.decoding.sampling import GenerateConfig
from jlora.report.tables import pair_samples, samples
from jlora.runs.adapter_file import AdapterFile
from jlora.runs.chat import Talk
from jlora.runs.pipeline import run_recipe, say, train_recipe
from jlora.runs.recipe import find_recipe, load_recipe
from jlora.system.errors import UserError
from jlora.system.lock import lock_run


def main(out: str, data: str | None = None) -> int:
    """Run the demo; the exit code of ``jlora demo``.

    Args:
        out: run folder; a number is added when a finished demo is there.
        data: folder with the E2E files; None: the usual places, else the built-in corpus.
    """
    started = time.monotonic()
    run, resume = choose_folder(Path(out))
    recipe = load_recipe(find_recipe("demo"))
    recipe.data.folder = data
    try:
        get_task("e2e").find_data(data, "train")
    except UserError:
        if data is not None:
            raise
        say("no E2E data on this machine, so the built-in restaurant corpus is used")
        recipe.data = dataclasses.replace(recipe.data, task="restaurants", valid_stride=3)
    with lock_run(run):
        finished = run_recipe(recipe, run, resume) is not None
    if not finished:
        return 130
    records = [
        [row for _, row in json_lines(run / name)]
        for name in ("predictions.jsonl", "predictions_before.jsonl")
    ]
    print()
    print(samples(pair_samples(*records), count=5))
    prompt = records[0][0]["prompt"]
    print(f"Took {(time.monotonic() - started) / 60:.1f} minutes. Open {run / 'report.html'}")
    print("Ask the tuned model something else, then go on with the README:")
    print(f'  jlora generate --adapter {run} --prompt "{prompt}"')
    return 0


def talk(out: str) -> int:
    """Run the demo that ends in a conversation; the exit code of ``jlora demo --chat``.

    Args:
        out: run folder; a number is added when a finished demo is there. The conversations that
            are learned are written beside it, with ``-data`` in the name.
    """
    started = time.monotonic()
    run, resume = choose_folder(Path(out))
    data = run.with_name(f"{run.name}-data")
    write_cafe(data)
    recipe = load_recipe(find_recipe("demo-chat"))
    recipe.data.folder = str(data)
    questions = [messages[0]["content"] for messages in conversations("valid")[:12:3]]
    # As much of what the untouched model would say as is shown.
    before = answers(Talk(recipe.model, None, GenerateConfig((), 24)), questions)
    with lock_run(run):
        finished = train_recipe(recipe, run, resume) is not None
    if not finished:
        return 130
    config = GenerateConfig((), recipe.decode.max_new_tokens)
    tuned = Talk(recipe.model, AdapterFile(run), config)
    print()
    for question, old, new in zip(questions, before, answers(tuned, questions)):
        print(f"{question}\n  before: {shorten(old, 90)}\n  now:    {shorten(new, 90)}")
    print(
        f"\nTook {(time.monotonic() - started) / 60:.1f} minutes. What it learned stands in {data},"
    )
    print("these questions in other words. Ask it yourself, now or later:")
    print(f"  jlora chat {run}", flush=True)
    return converse(tuned, sys.stdin.isatty())


def answers(asked: Talk, questions: Sequence[str]) -> list[str]:
    """What a model says to each question alone."""
    found = []
    for question in questions:
        found.append("".join(asked.say(question)))
        asked.reset()
    return found


def choose_folder(out: Path) -> tuple[Path, bool]:
    """The run folder, and whether an interrupted demo in it goes on."""
    run, number = out, 1
    while (run / "config.yaml").exists():
        if not (run / "report.html").exists():
            return run, True
        number += 1
        run = out.with_name(f"{out.name}-{number}")
    return run, False
