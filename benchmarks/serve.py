"""``make bench ARGS=serve``: `jlora serve` beside llama.cpp's server, mlx-lm's server and PEFT.

Every side is a process of its own that has a model and its adapters (r = 8 on all linear layers) in
memory. Streams of one round start together, each with a prompt of its own, and take their adapters
in turn; answers are greedy and equally long. The sides alternate, scenario by scenario. PEFT has no
server: it generates a batch by `adapter_names`. llama.cpp computes requests of different adapters
one after another, and mlx-lm's server has one adapter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.serve_client import Answer, stream
from benchmarks.serve_inputs import MODELS, Inputs
from benchmarks.serve_sides import PYTHONS, START, Side
from benchmarks.sides import ROOT
from jlora.system.machine import cpu_model, processors

SIDES = ("jlora bf16", "llama.cpp bf16", "llama.cpp f16", "mlx-lm", "PEFT bf16")
SCENARIOS = ((1, 1), (4, 1), (4, 4), (16, 1), (16, 16), (64, 1), (64, 64))  # streams, adapters
BESIDE = 16  # streams that run when a short prompt comes
SHORT = 16  # tokens of that prompt


def make_prompts(tokenizer, number: int, tokens: int, seed: int) -> list[str]:
    """Different texts of English words, each so many tokens long."""
    random = np.random.default_rng(seed)
    words = [w[1:] for w in tokenizer.backend.get_vocab() if w[:1] == "Ġ" and w[1:].isalpha()]
    words = sorted(word for word in words if word.isascii() and len(word) > 2)
    found = []
    while len(found) < number:
        text = " ".join(random.choice(words, tokens - 1))
        ids = tokenizer.encode(text)[:tokens]
        text = tokenizer.decode(ids)
        if len(tokenizer.encode(text)) == tokens:
            found.append(text)
    return found


def time_beside(side: Side, tokenizer, adapters: int, tries: int) -> dict[str, float]:
    """Time to the first token of a short prompt, alone and beside `BESIDE` running streams.

    Returns:
        Medians in seconds: ``step`` of the streams before the prompt comes, ``alone``, ``beside``.
    """
    prompts = make_prompts(tokenizer, BESIDE, SHORT, 5)
    shorts = make_prompts(tokenizer, 2 * tries, SHORT, 6)
    alone = [side.ask([short], [0], 2)[0].first for short in shorts[:tries]]

    async def run() -> tuple[list[float], float]:
        enough, ready, before = asyncio.Event(), asyncio.Event(), {}

        def watch(number: int):
            def on_piece(answer: Answer) -> bool:
                before[number] = answer
                if len(before) == BESIDE and all(len(a.times) > 8 for a in before.values()):
                    ready.set()
                return enough.is_set()

            return on_piece

        bodies = [side.body(p, i % adapters, 1000) for i, p in enumerate(prompts)]
        streams = [
            asyncio.ensure_future(stream(side.address, body, on_piece=watch(i)))
            for i, body in enumerate(bodies)
        ]
        await asyncio.wait_for(ready.wait(), START)
        step = statistics.median(answer.step for answer in before.values())
        firsts = []
        for short in shorts[tries:]:
            firsts.append((await stream(side.address, side.body(short, 0, 2))).first)
        enough.set()
        await asyncio.gather(*streams)
        return firsts, step

    firsts, step = asyncio.run(run())
    return {"step": step, "alone": statistics.median(alone), "beside": statistics.median(firsts)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="less of everything, 11 minutes")
    options.add_argument(
        "--minutes", type=float, help="for all models; what is left then is done for jlora alone"
    )
    options.add_argument(
        "--prepare", action="store_true", help="only make models and adapters, which are kept"
    )
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:2])
    options.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options.add_argument("--streams", nargs="+", type=int, default=[1, 4, 16, 64])
    options.add_argument("--prompt", type=int, default=64, help="tokens")
    options.add_argument("--tokens", type=int, default=64, help="of an answer")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    chosen = options.parse_args()
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    print("python -m benchmarks.serve " + " ".join(sys.argv[1:]), flush=True)
    if chosen.prepare:
        for model in chosen.models:
            prepare(inputs_of(model), max(chosen.streams))
        return
    if chosen.quick and chosen.minutes is None:
        chosen.minutes = 11
    results, began = {}, time.monotonic()
    for done, model in enumerate(chosen.models, 1):
        sides = make_sides(chosen, model)
        share = 60 * (chosen.minutes or 1e6) * done / len(chosen.models)
        measure(model, sides, chosen, until=began + share)
        print("\n" + table(model, sides, chosen) + "\n\n" + "\n".join(verdicts(sides)), flush=True)
        results[model] = {
            side.name: {
                "beside": side.beside,
                "rounds": {f"{s} x {a}": [vars(r) for r in done]
                           for (s, a), done in side.rounds.items()},
            } for side in sides
        }  # fmt: skip
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "serve.json").write_text(json.dumps(results, indent=1))


def inputs_of(model: str) -> Inputs:
    return Inputs(model, ROOT / "runs" / "benchmarks" / "serve" / model.replace(" ", "-"))


def prepare(inputs: Inputs, adapters: int) -> None:
    """Make all files that a side may ask for."""
    inputs.mlx_adapter()
    for number in range(adapters):
        inputs.adapter(number)
        inputs.gguf_adapter(number)
    for kind in ("bf16", "f16"):
        inputs.gguf(kind)
    print(f"{inputs.folder}: made", flush=True)


def make_sides(chosen: argparse.Namespace, model: str) -> list[Side]:
    """The sides that are installed, and what each is spared."""
    big = model == list(MODELS)[1]
    limits = {
        "jlora bf16": Side("jlora bf16"),
        "llama.cpp bf16": Side("llama.cpp bf16", (64, 64)),
        "llama.cpp f16": Side("llama.cpp f16", (16, 1)),
        "mlx-lm": Side("mlx-lm", (16, 1), 16),
        "PEFT bf16": Side("PEFT bf16", (16, 16), 8),
    }
    if chosen.quick:
        limits["llama.cpp bf16"].most = (16, 16)
        limits["mlx-lm"].most = (4, 1)
        chosen.rounds, chosen.tokens = 2, 32
        if big:  # what is left of the peers is the one that the targets name
            del limits["llama.cpp f16"], limits["mlx-lm"]
    return [limits[name] for name in chosen.sides if name in limits and installed(name)]


def installed(name: str) -> bool:
    """Whether the side's environment is there; says so if not."""
    python = PYTHONS[name.split()[0]]
    if not python.exists():
        print(
            f"{name}: left out, {python} is missing; `make bench ARGS=serve` makes it", flush=True
        )
    return python.exists()


def scenarios_of(side: Side, streams: Sequence[int]) -> list[tuple[int, int]]:
    return [
        (s, a) for s, a in SCENARIOS
        if s in streams and s <= side.most[0] and a <= side.most[1]
    ]  # fmt: skip


def measure(model: str, sides: list[Side], chosen: argparse.Namespace, until: float) -> None:
    """Start all sides, and let them take turns.

    Args:
        until: time from which on only jlora's first round is done, by `time.monotonic`.
    """
    from jlora.data.tokenizer import Tokenizer

    inputs = inputs_of(model)
    tokenizer = Tokenizer.from_folder(inputs.model)
    streams, context = max(chosen.streams), chosen.prompt + chosen.tokens + 1024
    with tempfile.TemporaryDirectory() as scratch, started() as running:
        for side in sides:
            began = time.monotonic()
            running.append(side)
            log = Path(scratch) / side.name.replace(" ", "-")
            side.start(inputs, streams, min(streams, side.most[0]), context, log)
            warm = make_prompts(tokenizer, 2, chosen.prompt, 9)
            side.round(warm, [0, 0], chosen.tokens)
            print(f"{model}: {side.name} started in {time.monotonic() - began:.0f} s", flush=True)
        for turn in range(chosen.rounds):
            for scenario in SCENARIOS:
                for side in sides:
                    if scenario not in scenarios_of(side, chosen.streams):
                        continue
                    if time.monotonic() > until and (turn or side.kind != "jlora"):
                        print(f"{side.name}, {scenario}: left out, no time", flush=True)
                        continue
                    one_round(side, scenario, turn, tokenizer, chosen)
        for side in sides:
            if side.kind in ("jlora", "llama.cpp") and side.most[0] >= BESIDE <= streams:
                adapters = min(side.most[1], BESIDE)
                side.beside = time_beside(side, tokenizer, adapters, tries=5)
                print(f"{side.name}, beside {BESIDE} streams: {side.beside}", flush=True)


def one_round(side: Side, scenario: tuple[int, int], turn: int, tokenizer, chosen) -> None:
    streams, adapters = scenario
    prompts = make_prompts(tokenizer, streams, chosen.prompt, seed=1000 * turn + streams + adapters)
    done = side.round(prompts, [i % adapters for i in range(streams)], chosen.tokens)
    side.rounds.setdefault(scenario, []).append(done)
    print(
        f"{side.name}, {streams} streams, {adapters} adapters: "
        f"{streams * chosen.tokens / done.seconds:.1f} tokens/s, first token after "
        f"{done.first:.3f} s, step {1000 * done.step:.1f} ms (load {os.getloadavg()[0]:.1f})",
        flush=True,
    )


@contextlib.contextmanager
def started() -> Iterator[list[Side]]:
    """A list of sides that end with the block."""
    sides: list[Side] = []
    try:
        yield sides
    finally:
        for side in sides:
            side.stop()


def speed(side: Side, scenario: tuple[int, int]) -> float | None:
    """Answers a second, the median of the rounds; None: not measured."""
    done = side.rounds.get(scenario)
    return scenario[0] / statistics.median(each.seconds for each in done) if done else None


def table(model: str, sides: list[Side], chosen: argparse.Namespace) -> str:
    """Speeds, times to the first token, and ratios."""
    lines = [
        f"{model}: prompts of {chosen.prompt} tokens, answers of {chosen.tokens}; tokens/s of all "
        "streams, median time to the first token, jlora's speed divided by the side's\n",
        "| streams | adapters | " + " | ".join(side.name for side in sides) + " |",
        "|--:|--:|" + "--:|" * len(sides),
    ]
    for scenario in SCENARIOS:
        cells = []
        for side in sides:
            own, ours = speed(side, scenario), speed(sides[0], scenario)
            if own is None:
                cells.append("")
                continue
            first = statistics.median(each.first for each in side.rounds[scenario])
            ratio = f", {ours / own:.1f}x" if side is not sides[0] and ours else ""
            cells.append(f"{own * chosen.tokens:.1f}, {first:.2f} s{ratio}")
        if any(cells):
            lines.append(f"| {scenario[0]} | {scenario[1]} | " + " | ".join(cells) + " |")
    for side in sides:
        if side.tokens and side.tokens < chosen.tokens:
            lines.append(f"\n{side.name}: answers of {side.tokens} tokens, extrapolated.")
    return "\n".join(lines)


def verdicts(sides: list[Side]) -> list[str]:
    """The targets, and what was measured."""
    by_name = {side.name: side for side in sides}
    ours = by_name.get("jlora bf16")
    if ours is None:
        return []
    lines = []

    def compare(what: str, target: float, top: float | None, bottom: float | None, unit: str):
        if top and bottom:
            met = "met" if top / bottom >= target else "NOT met"
            lines.append(f"{what}: {top / bottom:.2f}{unit}, target {target:.2f}{unit}: {met}")

    for n, target in ((16, 0.9), (64, 0.8)):
        what = f"{n} adapters beside one, {n} streams"
        compare(what, target, speed(ours, (n, n)), speed(ours, (n, 1)), "")
    for side in sides:
        if side.kind == "llama.cpp":
            for n, target in ((1, 1.0), (16, 3.0)):
                what = f"beside {side.name}, {n} streams, one adapter"
                compare(what, target, speed(ours, (n, 1)), speed(side, (n, 1)), "x")
    peft = by_name.get("PEFT bf16")
    if peft is not None:
        what = "beside PEFT's mixing, 16 streams, 16 adapters"
        compare(what, 10.0, speed(ours, (16, 16)), speed(peft, (16, 16)), "x")
    if ours.beside:
        step, alone, beside = (ours.beside[key] for key in ("step", "alone", "beside"))
        met = "met" if beside < 2 * step + alone else "NOT met"
        lines.append(
            f"first token of a short prompt beside {BESIDE} streams: {1000 * beside:.0f} ms, "
            f"target below two steps and its time alone, {2000 * step:.0f} + {1000 * alone:.0f} "
            f"ms: {met}"
        )
    return lines


if __name__ == "__main__":
    main()
