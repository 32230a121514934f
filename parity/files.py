"""The files that the two sides exchange: arrays as safetensors, one folder for each case."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import load_file, save_file

from parity.case import Case

TOPICS = (
    "layers", "models", "families", "adapters", "combining", "merging", "tokenizers", "chat",
    "training", "decoding",
)  # fmt: skip
INPUTS = "inputs.safetensors"


def topic_module(topic: str) -> ModuleType:
    return importlib.import_module(f"parity.{topic}")


def generator(case: Case, seed: int) -> np.random.Generator:
    """The random generator of a case, which depends on the seed and the case's name alone."""
    return np.random.default_rng([seed, zlib.crc32(case.name.encode())])


def write_inputs(topic: ModuleType, case: Case, seed: int, folder: Path) -> None:
    """Create a case's folder with the input arrays of both sides."""
    folder.mkdir(parents=True)
    save(folder / INPUTS, topic.inputs(case, generator(case, seed)))


def run_stage(topic: ModuleType, stage: int, case: Case, folder: Path) -> None:
    """Compute a case on one side and store the results."""
    _, function = topic.STAGES[stage]
    result = function(case, load_file(folder / INPUTS), folder)
    save(folder / stage_file(topic, stage), result)


def stage_file(topic: ModuleType, stage: int) -> str:
    return f"{stage}-{topic.STAGES[stage][0]}.safetensors"


def results(topic: ModuleType, folder: Path, side: str) -> dict[str, np.ndarray]:
    """All results of the stages of one side."""
    found: dict[str, np.ndarray] = {}
    for stage, (stage_side, _) in enumerate(topic.STAGES):
        if stage_side == side:
            found.update(load_file(folder / stage_file(topic, stage)))
    return found


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    save_file({n: np.asarray(a, order="C") for n, a in arrays.items()}, path)


def errors(topic: ModuleType, folder: Path) -> Iterator[str]:
    """The tracebacks of stages that failed."""
    for stage in range(len(topic.STAGES)):
        path = (folder / stage_file(topic, stage)).with_suffix(".error")
        if path.is_file():
            yield path.read_text()
