"""The speed part of `make gpu-check`: training and decoding on a card, beside PyTorch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import work
from benchmarks.sides import Side, problems_of, start, stop, take_turns


def timed(what: str, function: Callable[[], Any]) -> Any:
    started = time.monotonic()
    result = function()
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
    return result


def train(chosen: argparse.Namespace) -> None:
    """Training steps of each side; batches of E2E have another length at each step."""
    sizes = chosen.sizes
    shapes = {"even": f"{sizes.even[0]} x {sizes.even[1]} tokens", "e2e": f"E2E, {sizes.rows} rows"}
    pairs = [("gpt2-medium", "even"), *((model, "e2e") for model in sizes.configs)]
    for model, batch in pairs:
        spec = training_spec(chosen, model, batch)
        print(
            f"{model}, {shapes[batch]}, {sizes.steps} steps each; estimated: "
            f"{estimated_mb(spec):.0f} MB of the card",
            flush=True,
        )
        run_sides(
            chosen,
            "train",
            spec,
            "PEFT bf16",
            rounds=sizes.steps,
            warmup=min(6, sizes.steps),
            inputs=1,
        )


def training_spec(chosen: argparse.Namespace, model: str, batch: str) -> dict:
    return {
        "config": chosen.sizes.configs[model], "lora": work.lora_settings(model),
        "batches": str(chosen.inputs / f"{batch}.npz"), "label_smoothing": 0.1, "device": "cuda",
        "precision": "bf16",
    }  # fmt: skip


def estimated_mb(spec: dict) -> float:
    """What `jlora estimate` would say of this training, in MiB."""
    from jlora.models.hub import Outline, build_model
    from jlora.runs.memory_check import on_card
    from jlora.runs.memory_estimate import Texts, estimate
    from jlora.runs.recipe import make_recipe

    batches = np.load(spec["batches"])
    numbers = range(int(batches["count"]))
    lengths = np.concatenate([batches[f"lengths{i}"] for i in numbers]).tolist()
    targets = np.concatenate([batches[f"mask{i}"].sum(1) for i in numbers]).astype(int).tolist()
    settings = {"lora": spec["lora"], "precision": spec["precision"], "model": "any"}
    settings["train"] = {"batch_size": len(lengths) // len(numbers)}
    model = build_model(spec["config"])
    model.name_or_path = "any"
    texts = Texts(lengths, targets, 0, [1], 0)
    found = estimate(make_recipe(settings, "the check"), Outline(model, None), texts)
    return on_card(found).total("train") / 2**20


def decode(chosen: argparse.Namespace) -> None:
    """Steps by their parts; beam search of many inputs at a time."""
    from jlora.system.runtime import use_gpu

    use_gpu(True)
    sizes = chosen.sizes
    inputs, beams = sizes.inputs, sizes.beams
    for precision in ("bf16", "int4"):
        print(f"{precision}: ", end="")
        step_times(sizes.configs["gpt2-medium"], precision, inputs=inputs, beams=beams, steps=20)
    print(
        f"gpt2-medium, {inputs} inputs at a time, {beams} beams, {sizes.new_tokens} tokens; for "
        "each input:",
        flush=True,
    )
    spec = json.loads((chosen.inputs / "decode.json").read_text())
    spec.update(
        prompts=str(chosen.inputs / "prompts.json"), batch_size=inputs, inputs=inputs,
        early_stopping=False,
    )  # fmt: skip
    run_sides(chosen, "decode", spec, "transformers bf16", rounds=2, warmup=1, inputs=inputs)


def step_times(config: dict, precision: str, inputs: int, beams: int, steps: int) -> None:
    """What the parts of a decoding step take, without the search's own work."""
    from jlora import engine
    from jlora.decoding.decoder import decoder_of
    from jlora.layers import set_trainable
    from jlora.models.hub import build_model

    def prepared():
        model = build_model(config)
        set_trainable(model, ())
        engine.prepare(model, precision, keep_weights=False)
        model.eval()
        return model

    model = timed("a model", prepared)
    rng = np.random.default_rng(0)
    decoder = decoder_of(model)
    prompts = rng.integers(0, config["vocab_size"], (inputs, 60)).tolist()
    timed(f"{inputs} prompts of 60 tokens", lambda: decoder.enter(prompts))
    rows, seconds = np.repeat(np.arange(inputs), beams), np.zeros((steps, 2))
    for step in range(steps):
        began = time.monotonic()
        decoder.advance(rows, rng.integers(0, config["vocab_size"], len(rows)))
        between = time.monotonic()
        decoder.best(2 * beams)
        seconds[step] = between - began, time.monotonic() - between
        rows = np.arange(len(rows))
    layers, words = 1000 * np.median(seconds, axis=0)
    print(
        f"{type(decoder).__name__}, a step of {len(rows)} rows: layers {layers:.1f} ms, words "
        f"{words:.1f} ms",
        flush=True,
    )


def epochs(chosen: argparse.Namespace) -> None:
    """Five epochs of E2E with GPT-2 medium, from some hundred steps of its batches."""
    from benchmarks import jlora_train

    step = jlora_train.make(training_spec(chosen, "gpt2-medium", "e2e"))
    for _ in range(5):
        step()
    started = time.monotonic()
    losses = []
    wanted = chosen.sizes.epoch_steps
    steps = 5 * 42061 / chosen.sizes.rows  # E2E's training rows
    for done in range(1, wanted + 1):
        losses.append(step()["loss"])
        if done % (wanted // 4) == 0:
            each = (time.monotonic() - started) / done
            print(
                f"{done} steps: {1000 * each:.1f} ms each, loss {losses[0]:.3f} to "
                f"{losses[-1]:.3f}; five epochs of {steps / 5:.0f} steps: {steps * each / 60:.1f} "
                "min",
                flush=True,
            )


def run_sides(
    chosen: argparse.Namespace,
    module: str,
    spec: dict,
    peer: str,
    rounds: int,
    warmup: int,
    inputs: int,
) -> None:
    """Run jlora and its peer, one after the other: two programs on one card would take turns.

    The first round is told at once, in case that the others do not end within the stage.

    Args:
        module: "train" or "decode".
        inputs: of a round, by which its time is divided.
    """
    path = {} if chosen.torch_path is None else {"PYTHONPATH": chosen.torch_path}
    spec = {**spec, "device": "cuda", "precision": "bf16"}
    ours, less = (
        Side(f"jlora {p}", f"jlora_{module}", "jlora", {**spec, "precision": p})
        for p in ("bf16", "int4")
    )
    theirs = Side(peer, f"torch_{module}", "peft", spec, variables=path)
    for side in (ours, less) if chosen.rehearsal else (ours, theirs, less):
        started = time.monotonic()
        start([side])
        take_turns([side], 1, warmup)
        if side.problem is None:
            print(
                f"  {side.name:20} {1000 * side.seconds[0] / inputs:9.2f} ms, one round, first "
                f"{side.first_seconds:6.1f} s, begun and warm {time.monotonic() - started:.0f} s",
                flush=True,
            )
        for _ in range(rounds - 1):
            with problems_of(side):
                side.seconds += [side.round()] if side.problem is None else []
        stop([side])
        if side.problem is not None:
            print(f"  {side.problem}", flush=True)  # the other one runs all the same
            continue
        ratio = f", ratio {side.median / ours.median:.2f}" if ours.problem is None else ""
        memory = f", {side.extra['gpu_mb']:.0f} MB of the card" if "gpu_mb" in side.extra else ""
        print(f"  {side.name:20} {1000 * side.median / inputs:9.2f} ms{memory}{ratio}", flush=True)
