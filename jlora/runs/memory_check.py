"""Does a run fit this machine, or its GPU? `jlora estimate`, and the check before a run's weights
are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jlora.data.tasks import get_task
from jlora.kernels import packed_linear
from jlora.kernels.gpu_library import on_gpu
from jlora.metrics import find_metric
from jlora.models.hub import outline
from jlora.runs.memory_estimate import MIB, Estimate, Texts, estimate
from jlora.runs.recipe import Recipe
from jlora.runs.run_data import RunData, load_data
from jlora.system import machine
from jlora.system.distributed import world
from jlora.system.errors import UserError

GIB = 1 << 30
#: What CUDA, cuBLAS and Jittor take of a card besides the run's own arrays, about.
CARD = GIB
#: Parts of an estimate that are in the processor's memory alone; a GPU's weights come by the piece.
_NOT_ON_CARD = ("process", "data", "checkpoint", "Java")
#: A change of settings that lowers a stage's memory: ``KEY=VALUE`` for --set, as many as it takes.
Change = tuple[str, ...]


def measure_texts(recipe: Recipe, test: bool = True) -> Texts:
    """Tokens of the recipe's data; without ``test`` there are no test inputs.

    Raises:
        UserError: data or model are not there, or do not fit each other.
    """
    return texts_of(load_data(recipe, test))


def texts_of(data: RunData) -> Texts:
    """What of a run's data its memory depends on."""
    by_length = sorted(data.valid, key=lambda example: example.input_length)
    size = data.recipe.train.valid_batch_size
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return Texts(
        [example.input_length for example in data.train],
        [example.target_count for example in data.train],
        max((sum(e.target_count for e in batch) for batch in batches), default=0),
        [len(prompt) for prompt in data.prompts],
        sum(len(example.ids) for example in [*data.train, *data.valid]),
    )


def assumed_texts(recipe: Recipe) -> Texts:
    """What `measure_texts` might give, where the data are not at hand: the longest allowed."""
    longest, train = recipe.train.max_length, recipe.train
    return Texts(
        [longest] * train.batch_size,
        [longest // 2] * train.batch_size,
        longest // 2 * train.valid_batch_size,
        [longest] * recipe.decode.batch_size,
        0,
    )


def estimate_recipe(recipe: Recipe, texts: Texts) -> Estimate:
    """`estimate` of a recipe whose data are known; on a GPU, of what it holds."""
    task = get_task(recipe.data.task)
    names = recipe.data.metrics or task.metrics
    java = not task.choices and any(find_metric(name).meteor for name in names)
    found = estimate(recipe, outline(recipe.model), texts, java)
    return on_card(found) if on_gpu() else found


def on_card(found: Estimate) -> Estimate:
    """What of a run's memory is a GPU's."""
    stages = {
        stage: {
            "CUDA": CARD,
            **{part: size for part, size in parts.items() if part not in _NOT_ON_CARD},
        }
        for stage, parts in found.stages.items()
        if stage in ("train", "decode")
    }
    return replace(found, stages=stages)


def changes(recipe: Recipe, found: Estimate) -> Iterator[tuple[Change, Recipe]]:
    """What lowers the memory of the largest stage, what costs least first."""
    train, decode, stage = recipe.train, recipe.decode, found.peak_stage
    packs = found.precision in packed_linear.KINDS
    if stage == "train":
        if packs and recipe.method == "lora" and not recipe.checkpoint_activations:
            yield ("checkpoint_activations=true",), replace(recipe, checkpoint_activations=True)
        if train.batch_size > 1:
            batch, parts = train.batch_size // 2, train.grad_accumulation * 2
            yield (
                (f"train.batch_size={batch}", f"train.grad_accumulation={parts}"),
                replace(recipe, train=replace(train, batch_size=batch, grad_accumulation=parts)),
            )
    if stage in ("decode", "score") and decode.batch_size > 1:
        batch = decode.batch_size // 2
        yield (
            (f"decode.batch_size={batch}",),
            replace(recipe, decode=replace(decode, batch_size=batch)),
        )
    if found.precision == "bf16":
        yield ("precision=int8",), replace(recipe, precision="int8")
    if found.precision in ("int8", "int8-both"):
        yield ("precision=int4",), replace(recipe, precision="int4")
    if stage in ("decode", "score") and decode.num_beams > 1:
        beams = decode.num_beams // 2
        yield (
            (f"decode.num_beams={beams}",),
            replace(recipe, decode=replace(decode, num_beams=beams)),
        )


def advise(recipe: Recipe, texts: Texts, limit: int) -> list[tuple[dict[str, str], Estimate]]:
    """Settings step by step until the run fits ``limit`` bytes, or nothing lowers it any more.

    Returns:
        All settings changed so far and what they come to, for each step; the last is the advice.
    """
    found, steps, settings = estimate_recipe(recipe, texts), [], {}
    while found.peak > limit:
        tried = ((*each, estimate_recipe(each[1], texts)) for each in changes(recipe, found))
        better = next((each for each in tried if each[2].peak < 0.99 * found.peak), None)
        if better is None:
            break
        change, recipe, found = better
        settings = {**settings, **dict(setting.split("=") for setting in change)}
        steps.append((settings, found))
    return steps


def options(settings: dict[str, str]) -> str:
    """``--set A=1 --set B=2``"""
    return " ".join(f"--set {key}={value}" for key, value in settings.items())


def way_out(found: Estimate, steps: list[tuple[dict[str, str], Estimate]], limit: int) -> str:
    """What would make a run fit, in words."""
    settings, last = steps[-1] if steps else ({}, found)
    if last.peak <= limit:
        return f"it fits with {options(settings)} ({gigabytes(last.peak)})"
    least = f" (least: {gigabytes(last.peak)} with {options(settings)})" if settings else ""
    return (
        f"no settings make it fit{least}: to {last.peak_stage} takes that much; choose a smaller "
        "model or a larger machine"
    )


def check_fits(recipe: Recipe, data: RunData) -> None:
    """Check that a run fits this machine, before its weights are read.

    Of several processes each has the weights, its share of the batch, and of the memory.

    Raises:
        UserError: it does not, with the settings that would make it fit.
    """
    here = world()
    where = "the GPU" if on_gpu() else "this machine"
    limit = machine.free_gpu_memory() if on_gpu() else machine.usable_memory(here.local_size)
    if limit is None:
        return
    share = -(-recipe.train.batch_size // here.size)
    recipe = replace(recipe, train=replace(recipe.train, batch_size=share))
    texts = texts_of(data)
    found = estimate_recipe(recipe, texts)
    if found.peak <= limit:
        return
    each = " for each process" if here.size > 1 else ""
    advice = way_out(found, advise(recipe, texts, limit), limit)
    raise UserError(
        f"this run takes about {gigabytes(found.peak)} of memory{each} (to {found.peak_stage}), "
        f"and {where} has {gigabytes(limit)} free{each}; {advice}. "
        "`jlora estimate` shows the parts; --no-memory-check runs it all the same"
    )


def gigabytes(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def table(found: Estimate) -> str:
    """Stages as columns, parts as rows, in MiB."""
    stages = list(found.stages)
    parts = list(dict.fromkeys(part for stage in stages for part in found.stages[stage]))
    rows = [[part, *(_cell(found.stages[stage].get(part)) for stage in stages)] for part in parts]
    rows.append(["together", *(_cell(found.total(stage)) for stage in stages)])
    widths = [max(len(row[i]) for row in [["MiB", *stages], *rows]) for i in range(len(stages) + 1)]
    lines = []
    for row in [["MiB", *stages], *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"


def _room() -> tuple[str, int]:
    """The memory that there is, in words, and how much of it a run may take."""
    if not on_gpu():
        limit, free = machine.memory_limit(), machine.available_memory()
        return f"this machine has {gigabytes(limit)}, {gigabytes(free)} of it free", limit
    card = machine.free_gpu_memory()
    if card is None:
        return "nvidia-smi does not say what the GPU has", sys.maxsize
    return f"the GPU has {gigabytes(card)} free", card


def report(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """What `jlora estimate` says: as text, and as JSON."""
    room, limit = _room()
    assumed = None
    try:
        texts = measure_texts(recipe)
    except UserError as error:
        texts, assumed = assumed_texts(recipe), str(error)
    found = estimate_recipe(recipe, texts)
    steps = advise(recipe, texts, limit)
    lines = [table(found), ""]
    if assumed:
        lines.append(
            f"Data not at hand ({assumed}): all examples taken as {recipe.train.max_length} tokens."
        )
    lines.append(
        f"precision {found.precision}; largest batch {found.batch.tokens:,} tokens. Peak "
        f"{gigabytes(found.peak)}, to {found.peak_stage}; {room}."
    )
    fits = found.peak <= limit
    for settings, smaller in steps:
        lines.append(f"  {gigabytes(smaller.peak)} with {options(settings)}")
    lines.append("It fits." if fits else f"It does not fit: {way_out(found, steps, limit)}.")
    return "\n".join(lines), {
        "fits": fits,
        "peak_bytes": found.peak,
        "process_peak_bytes": found.process_peak,
        "peak_stage": found.peak_stage,
        "memory_bytes": limit,
        "precision": found.precision,
        "batch_tokens": found.batch.tokens,
        "data": assumed or "measured",
        "stages": found.stages,
        "advice": [{"set": settings, "peak_bytes": e.peak} for settings, e in steps],
    }
