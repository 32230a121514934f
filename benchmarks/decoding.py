"""The decoding part of `make bench`: E2E's test inputs by a tuned model, on all sides."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import work
from benchmarks.environments import missing
from benchmarks.inputs import Inputs, or_reason
from benchmarks.sides import ROOT, Side
from jlora.system.machine import processors

BEAMS, NEW_TOKENS = 10, 64
REFERENCE = "jlora bf16"
CONTEXT = 256  # tokens that a stream may have in all
TEMPERATURE = 0.8
#: (streams, temperature)
STREAMS = ((1, 0.0), (16, 0.0), (1, TEMPERATURE), (16, TEMPERATURE))


def make_spec(options: argparse.Namespace, path: Path) -> dict:
    """The settings of all sides; the prompts are E2E's distinct test inputs in a random order.

    Random GPT-2 weights are used with SmolLM2's tokenizer, which splits E2E's texts much like
    GPT-2's.

    Args:
        options: model (a name that `jlora pull` knows, a folder, or one of `work.MODELS`), adapter,
            beams, new_tokens, rank_up_to.
    """
    from jlora.data.pull_models import pull
    from jlora.data.tasks import get_task
    from jlora.data.tokenizer import Tokenizer

    config = work.MODELS.get(options.model) if options.model.startswith("gpt2") else None
    local = Path(options.model).is_dir()
    folder = options.model if local else pull("smollm2-135m" if config else options.model)
    tokenizer = Tokenizer.from_folder(folder)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    task = get_task("e2e")
    groups = task.groups(task.read(data / "e2e" / "test.txt"))
    order = np.random.default_rng(0).permutation(len(groups))
    end = tokenizer.encode("<|endoftext|>")[0]  # as in the recipes of E2E
    prompts = [[*tokenizer.encode(groups[i].prompt), end] for i in order]
    path.write_text(json.dumps(prompts))
    return {
        "model": None if config else str(folder), "config": config, "adapter": options.adapter,
        "prompts": str(path), "pad": end, "ends": [] if config else [end], "beams": options.beams,
        "new_tokens": options.new_tokens, "rank_up_to": options.rank_up_to, "no_repeat_ngram": 4,
    }  # fmt: skip


def tuned_spec(inputs: Inputs, path: Path) -> dict:
    """`make_spec` of the tuned model. No n-gram is forbidden, since the sides' rules for that
    differ: jlora counts those of the text alone, as microsoft/LoRA, others the prompt's too."""
    options = argparse.Namespace(
        model=str(inputs.tuned), adapter=None, beams=BEAMS, new_tokens=NEW_TOKENS, rank_up_to=0.8
    )
    return {**make_spec(options, path), "no_repeat_ngram": 0, "threads": processors()}


def beam_sides(spec: dict, inputs: Inputs, ours: int, theirs: int) -> list[Side]:
    """jlora decodes ``ours`` inputs in a round, 32 at a time, the others ``theirs``."""
    peer = {**spec, "inputs": theirs, "batch_size": 16}
    return [
        *(jlora_side(p, {**spec, "inputs": ours, "batch_size": 32}) for p in ("bf16", "int8",
                                                                              "fp32")),
        *(
            converted(
                f"CTranslate2 {kind}", "ct2_decode", "ctranslate2",
                {**peer, "compute_type": kind, "at_once": 1},
                lambda kind=kind: inputs.ctranslate2(kind),
            )
            for kind in ("int8", "float32")
        ),
        *openvino_sides(peer, inputs),
        *(
            torch_side(f"transformers {p}{', early stopping' if early else ''}",
                       {**peer, "precision": p, "early_stopping": early})
            for p, early in (("bf16", True), ("bf16", False), ("fp32", False))
        ),
    ]  # fmt: skip


def stream_sides(spec: dict, inputs: Inputs) -> list[Side]:
    llama = {**spec, "most": max(s for s, _ in STREAMS), "context": CONTEXT}

    def llamacpp(kind: str, wheel: bool) -> Side:
        return converted(
            f"llama.cpp {kind}" + ", AVX2 wheel" * wheel,
            "llamacpp_decode" if wheel else "llamacpp_node.mjs",
            "llamacpp" if wheel else "llamacpp-native",
            llama, lambda: inputs.gguf(kind),
        )  # fmt: skip

    return [
        *(jlora_side(p, {**spec, "batch_size": llama["most"]}) for p in ("bf16", "int8", "int4")),
        *(llamacpp(kind, False) for kind in ("bf16", "q8_0", "q4_1")),
        *(llamacpp(kind, True) for kind in ("bf16", "q8_0")),
        *openvino_sides(spec, inputs),
        torch_side("transformers bf16", {**spec, "precision": "bf16"}),
    ]


def jlora_side(precision: str, spec: dict) -> Side:
    return Side(f"jlora {precision}", "jlora_decode", "jlora", {**spec, "precision": precision})


def torch_side(name: str, spec: dict) -> Side:
    return Side(name, "torch_decode", "peft", spec, problem=missing("peft"))


def openvino_sides(spec: dict, inputs: Inputs) -> list[Side]:
    return [
        converted(
            f"OpenVINO GenAI {name}", "openvino_decode", "openvino",
            {**spec, "properties": properties}, lambda kind=kind: inputs.openvino(kind),
        )
        for name, kind, properties in (
            ("int8", "int8", {}),
            ("bf16", "fp16", {"INFERENCE_PRECISION_HINT": "bf16"}),
        )
    ]  # fmt: skip


def converted(
    name: str, module: str, environment: str, spec: dict, make: Callable[[], Path]
) -> Side:
    """A side that reads a file of its own, which is made if it is not there."""
    side = Side(name, module, environment, dict(spec), problem=missing(environment))
    if side.problem is None:
        side.spec["model"], side.problem = or_reason(make)
    return side


def task_name(streams: int, temperature: float) -> str:
    kind = "drawn" if temperature else "greedy"
    return f"{kind}, {streams} stream{'s' if streams > 1 else ''}"


def equal_share(
    answers: dict[str, list[int]], reference: dict[str, list[int]], has_ends: bool = True
) -> float | None:
    """The share of equal answers among the inputs that both have decoded; None: there are none.

    Without ends of their own answers are compared up to the reference's.
    """
    both = answers.keys() & reference.keys()
    ends = {i: None if has_ends else len(reference[i]) for i in both}
    return sum(answers[i][: ends[i]] == reference[i] for i in both) / len(both) if both else None
