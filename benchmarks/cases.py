"""The cases of `make bench`: what is measured together, and the result of each as plain data."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from benchmarks import decoding, lora_code, training
from benchmarks.environments import ISA
from benchmarks.inputs import Inputs
from benchmarks.peak import bandwidth, measure
from benchmarks.sides import Side, alternate, start, stop, take_turns, with_arguments, working

#: Sides that `--quick` leaves out.
SLOW = (
    "PEFT bf16, compiled", "PEFT on Jittor 2.0", "CTranslate2 float32", "OpenVINO GenAI bf16",
    "transformers bf16", "transformers fp32", "jlora fp32", "llama.cpp bf16, AVX2 wheel",
    "llama.cpp q8_0, AVX2 wheel",
)  # fmt: skip


@dataclass
class Plan:
    """How much is measured.

    Attributes:
        rounds, seconds: of a side, as `sides.alternate`.
        ours, theirs: inputs that jlora and its peers decode in a round of beam search.
        tokens, together: new tokens of a single stream, and of one of many.
        peak_rounds: of each matrix product.
        left_out: names of sides that are not measured, as `--quick` says.
    """

    isa: str
    inputs: Inputs
    also: Sequence[str] = ()
    rounds: int = 5
    seconds: float = 10
    warmup: int = 2
    ours: int = 64
    theirs: int = 8
    tokens: int = 64
    together: int = 32
    peak_rounds: int = 12
    left_out: Sequence[str] = field(default_factory=tuple)

    def ready(self, sides: list[Side]) -> list[Side]:
        """The sides with the instructions that they may use."""
        for side in sides:
            side.variables = {**ISA[self.isa], **side.variables}
            if side.name in self.left_out and side.problem is None:
                side.problem = "left out by --quick"
            if self.isa == "native":
                continue
            if side.module.endswith(".mjs"):
                side.problem = "chooses its instructions by the processor and cannot be held"
            # Without AVX-512 torch takes minutes for a step in bf16, here 134 s instead of 1.3.
            if side.module == "torch_train" and side.spec["precision"] in ("bf16", "nf4"):
                side.most_rounds = 1
                if side.name in ("PEFT bf16, memory kept", "PEFT bf16, compiled"):
                    side.problem = "left out: without AVX-512 a step takes as long as PEFT bf16's"
        return sides


def cases(models: Sequence[str], also: Sequence[str] = ()) -> dict[str, Callable[[Plan], list]]:
    """Name -> what measures it."""
    found: dict[str, Callable[[Plan], list]] = {"peak": peak}
    for model in models:
        for number in range(len(training.GROUPS) + bool(also)):
            found[f"training-{model}-{number + 1}"] = lambda plan, model=model, number=number: [
                train(plan, model, number)
            ]
    found["beam"], found["streams"] = lambda plan: [beam(plan)], streams
    return found


def peak(plan: Plan) -> list[dict]:
    variables = ISA[plan.isa]
    products = measure(plan.peak_rounds, variables)
    return [{"kind": "peak", "products": products, "bandwidth": bandwidth(variables=variables)}]


def train(plan: Plan, model: str, group: int) -> dict:
    """A group of `training.GROUPS` on batches of 8 with E2E's lengths; behind the last, peers that
    were asked for by name."""
    groups = [*training.GROUPS, (("bf16",), plan.also)]
    precisions, peers = groups[group]
    chosen = argparse.Namespace(
        precisions=precisions, peers=peers, checkpoint=plan.inputs.checkpoint, slow_rounds=2,
        padded_rows=None, lora_code=lora_code.FOLDER,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        path = training.batches(model, Path(scratch) / "batches.npz", 8, plan.rounds + plan.warmup)
        sides = plan.ready(training.training_sides(model, path, chosen))
        tokens, flops = training.needed(model, path, plan.rounds, plan.warmup)
        alternate(sides, plan.rounds, plan.warmup, plan.seconds)
        entries = [record(side, training.REFERENCE, sides) for side in sides]
        for side, entry in zip(sides, entries):
            # Fewer rounds are other batches; a padded one takes the same for all.
            if entry["each"] and not side.spec.get("length"):
                own, _ = training.needed(model, path, len(side.seconds), plan.warmup)
                entry["each"] *= tokens / own
    return {
        "kind": "training", "model": model, "group": group, "tokens": tokens, "flops": flops,
        "when": now(), "sides": entries,
    }  # fmt: skip


def beam(plan: Plan) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        spec = decoding.tuned_spec(plan.inputs, Path(scratch) / "prompts.json")
        sides = plan.ready(decoding.beam_sides(spec, plan.inputs, plan.ours, plan.theirs))
        alternate(sides, plan.rounds, 1, plan.seconds)
        records = [record(side, decoding.REFERENCE, sides) for side in sides]
        found = {side.name: side.extra["answers"] for side in working(sides)}
        for entry in records:
            entry["score"] = None
        scores = mean_scores(found, spec, Path(scratch) / "texts.json", plan)
        for entry in records:
            entry["score"] = scores.get(entry["name"])
    return {
        "kind": "beam", "beams": decoding.BEAMS, "new_tokens": decoding.NEW_TOKENS, "when": now(),
        "sides": records,
    }  # fmt: skip


def mean_scores(
    found: dict[str, dict[str, list[int]]], spec: dict, path: Path, plan: Plan
) -> dict[str, float]:
    """The mean score, by jlora in float32, of the texts to inputs that all sides have decoded."""
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    prompts = json.loads(Path(spec["prompts"]).read_text())
    texts = {}  # distinct (number, text) -> place in the list
    for answers in found.values():
        for number in common:
            texts.setdefault((number, tuple(answers[number])), len(texts))
    pairs = [
        # A text that did not fill its tokens has ended.
        [prompts[int(number)], [*text, *spec["ends"][: len(text) < spec["new_tokens"]]]]
        for number, text in texts
    ]
    path.write_text(json.dumps(pairs))
    judge = Side("score", "jlora_score", "jlora",
                 {"model": spec["model"], "texts": str(path), "length_penalty": 0.8})  # fmt: skip
    plan.ready([judge])
    alternate([judge], 0, 1)
    if not common or judge.problem is not None:
        return {}
    scores = judge.extra["scores"]
    return {
        name: sum(scores[texts[i, tuple(answers[i])]] for i in common) / len(common)
        for name, answers in found.items()
    }


def streams(plan: Plan) -> list[dict]:
    """One process a side does all tasks; the answers of greedy search are compared."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        spec = decoding.tuned_spec(plan.inputs, Path(scratch) / "prompts.json")
        sides = plan.ready(decoding.stream_sides(spec, plan.inputs))
        start(sides)
        for count, temperature in decoding.STREAMS:
            tokens = plan.tokens if count == 1 else plan.together
            arguments = {"streams": count, "tokens": tokens, "temperature": temperature}
            own = [with_arguments(side, **arguments) for side in sides]
            take_turns(own, plan.rounds, 1, plan.seconds)
            for side, measured in zip(sides, own):  # one that has ended has nothing to say later
                side.problem = measured.problem
            results.append({
                "kind": "streams", "task": decoding.task_name(count, temperature),
                "streams": count, "tokens": tokens, "temperature": temperature, "when": now(),
                "sides": [record(side, decoding.REFERENCE, own) for side in own],
            })  # fmt: skip
        stop(sides)
    return results


def record(side: Side, reference: str, sides: Sequence[Side]) -> dict:
    """What a page says of a side. ``ratio``: its time to that of the reference, in the rounds that
    both have done; ``equal``: the share of its answers that are the reference's."""
    base = next(each for each in sides if each.name == reference)
    done = side.problem is None and bool(side.seconds)
    shared = min(len(side.seconds), len(base.seconds))
    each, compared, base_each = (
        seconds_each(side),
        seconds_each(side, shared),
        seconds_each(base, shared),
    )
    answers = side.extra.get("answers") if done else None
    return {
        "name": side.name, "environment": side.environment, "problem": side.problem,
        "seconds": side.seconds, "each": each, "first": side.first_seconds,
        "peak_mb": side.peak_mb, "inputs": side.spec.get("inputs", 1),
        "ratio": compared / base_each if compared and base_each else None,
        "avx512": side.extra.get("avx512"), "computes in": side.extra.get("computes in"),
        "loss": side.extra.get("loss"), "tokens": side.extra.get("tokens"),
        "equal": decoding.equal_share(
            answers, base.extra.get("answers", {}), side.extra.get("has_ends", True)
        ) if answers else None,
    }  # fmt: skip


def seconds_each(side: Side, rounds: int | None = None) -> float | None:
    """Seconds of an input, or of a step, in the first rounds (None: in all); None: not measured."""
    seconds = side.seconds[:rounds]
    if side.problem is not None or not seconds:
        return None
    return replace(side, seconds=seconds).median / side.spec.get("inputs", 1)


def now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M")
