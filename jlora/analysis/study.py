"""`jlora analyze`: the measurements of one adapter or two."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from jlora.adapters.base_model import check_base
from jlora.analysis.subspaces import (
    Amplification,
    amplification,
    directions,
    low_rank_svd,
    random_similarity,
    similarity,
)
from jlora.analysis.updates import AdapterUpdates, Update, read_updates
from jlora.layers import Conv1D
from jlora.models.hub import load
from jlora.runs.adapter_file import AdapterFile
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.progress import progress
from jlora.system.runtime import nn


@dataclass
class Layer:
    """The measurements of one layer's change (or of one block's, see `Update`)."""

    kind: str
    depth: int
    rank: int
    singular_values: list[float]  # of dW, the largest first
    amplification: Amplification | None = None


@dataclass
class Study:
    """The measurements.

    Attributes:
        paths: the adapters.
        layers: a dict for each adapter, by `Update.key`.
        matrix: the matrix whose directions were compared, see `subspaces.directions`.
        similarity: phi, an array (r of the first, r of the second), for each layer of both
            adapters.
        random: phi of random directions, by kind of layer.
    """

    paths: list[str]
    layers: list[dict[str, Layer]]
    matrix: str
    similarity: dict[str, np.ndarray] = field(default_factory=dict)
    random: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The shortest names that distinguish the adapters."""
        if len(self.paths) == 2 and Path(self.paths[0]).name == Path(self.paths[1]).name:
            return self.paths
        return [Path(path).name for path in self.paths]

    @property
    def kinds(self) -> list[str]:
        """The kinds of layers, in the order of the model."""
        return list(dict.fromkeys(each.kind for layers in self.layers for each in layers.values()))

    def similarity_of(self, kind: str) -> dict[int, np.ndarray]:
        """phi of the layers of a kind, by their depth."""
        return {
            self.layers[0][key].depth: phi
            for key, phi in self.similarity.items()
            if self.layers[0][key].kind == kind
        }

    def to_json(self) -> str:
        """Everything, phi with four decimals."""

        def rounded(grids: dict[str, np.ndarray]) -> dict[str, list]:
            return {key: np.round(phi, 4).tolist() for key, phi in grids.items()}

        adapters = []
        for path, layers in zip(self.paths, self.layers):
            rows = {key: asdict(layer) for key, layer in layers.items()}
            for key, layer in layers.items():
                measured = layer.amplification
                if measured and math.isfinite(measured.factor):
                    rows[key]["amplification"]["factor"] = measured.factor
            adapters.append({"path": path, "layers": rows})
        content = {
            "matrix": self.matrix,
            "adapters": adapters,
            "similarity": rounded(self.similarity),
            "random": rounded(self.random),
        }
        return json.dumps(content) + "\n"


def analyze(
    files: Sequence[AdapterFile],
    model: str | None = None,
    matrix: str = "A",
    layers: str | None = None,
    seed: int = 0,
) -> Study:
    """Measure one adapter, or two and the similarity of their subspaces.

    Args:
        files: one or two adapters.
        model: the base model; None: that of the first adapter's run, if it is available.
        matrix: the matrix whose directions are compared, see `subspaces.directions`.
        layers: a regular expression; layers are measured if it matches a part of their key.
        seed: of the random directions.

    Raises:
        UserError: an adapter or the base model cannot be read, they do not belong together, no
            layer matches ``layers``, or the adapters have no layer in common.
    """
    adapters, names = [], []
    for file in files:
        file.check()
        adapter = read_updates(file.path, file.folder, file.lora_alpha, file.enable_lora)
        adapters.append(keep_layers(adapter, layers))
        names.append(file.recipe.model if file.recipe else None)
    study = Study(
        paths=[str(file.path) for file in files],
        layers=[
            {each.key: measure(each) for each in progress(a.updates, "singular values", "layer")}
            for a in adapters
        ],
        matrix=matrix,
    )
    if len(adapters) == 2:
        compare(study, *(a.updates for a in adapters), np.random.default_rng(seed))
    base = open_base(model, names[0])
    if base is not None:
        for file, adapter, measured in zip(files, adapters, study.layers):
            if adapter.base_record and not file.force:
                check_base(adapter.base_record, base, str(file.path))
            rng = np.random.default_rng(seed)
            for update in progress(adapter.updates, "amplification", "layer"):
                W = base_weight(base, update, file.path)
                measured[update.key].amplification = amplification(update, W, rng)
    return study


def measure(update: Update) -> Layer:
    values = low_rank_svd(update)[1]
    return Layer(update.kind, update.depth, update.A.shape[0], values.tolist())


def keep_layers(adapter: AdapterUpdates, pattern: str | None) -> AdapterUpdates:
    """The adapter's layers whose key has a match of ``pattern``.

    Raises:
        UserError: it is not a regular expression, or matches no layer.
    """
    if pattern is None:
        return adapter
    try:
        kept = [update for update in adapter.updates if re.search(pattern, update.key)]
    except re.error as error:
        raise UserError(f"--layers {pattern!r} is no regular expression: {error}") from error
    if not kept:
        raise UserError(
            f"--layers {pattern!r} is found in none of the {len(adapter.updates)} layers of "
            f"{adapter.path}, such as {adapter.updates[0].key}"
        )
    return AdapterUpdates(adapter.path, kept, adapter.base_record)


def compare(
    study: Study, first: list[Update], second: list[Update], rng: np.random.Generator
) -> None:
    """Fill in the similarity of the layers that both adapters have.

    Raises:
        UserError: there are no such layers, or a layer's width differs.
    """
    others = {update.key: update for update in second}
    for update in progress(first, "comparing", "layer"):
        other = others.get(update.key)
        if other is None:
            continue
        grids = [directions(each, study.matrix) for each in (update, other)]
        if grids[0].shape[1] != grids[1].shape[1]:
            raise UserError(
                f"{update.key} is {grids[0].shape[1]} wide in {study.paths[0]} and "
                f"{grids[1].shape[1]} in {study.paths[1]}: the adapters are of different models"
            )
        study.similarity[update.key] = similarity(*grids)
        if update.kind not in study.random:
            sizes = (len(grids[0]), len(grids[1]), grids[0].shape[1])
            study.random[update.kind] = random_similarity(*sizes, rng)
    if not study.similarity:
        raise UserError(
            f"{study.paths[0]} and {study.paths[1]} have LoRA on different layers, such as "
            f"{first[0].key} and {second[0].key}; compare adapters of the same layers"
        )
    left = len({update.key for update in first} ^ set(others))
    if left:
        say(f"{left} layers are in one of the two adapters only and were not compared")


def open_base(named: str | None, of_run: str | None) -> nn.Module | None:
    """The base model; None, with a message, if the run's base model is unavailable.

    Raises:
        UserError: ``named`` cannot be loaded.
    """
    if named is None and of_run is None:
        say("no amplification: it needs the base model, give --model")
        return None
    say(f"loading {named or of_run}")
    try:
        return load(named or of_run)
    except UserError as error:
        if named is not None:
            raise
        say(f"no amplification: the run's base model is not there ({error}); give --model")
        return None


def base_weight(base: nn.Module, update: Update, path: Path) -> np.ndarray:
    """The frozen weight (out, in) of what ``update`` changes, float32.

    Raises:
        UserError: the model has no such layer, or its shape differs.
    """
    modules = dict(base.named_modules())
    name, end = update.layer, f".{update.layer}"
    if name not in modules:  # the names in a .pt file may lack a prefix
        name = next((each for each in modules if each.endswith(end)), name)
    weight = getattr(modules.get(name), "weight", None)
    if weight is None or len(weight.shape) != 2:
        raise UserError(
            f"{path}: the model has no layer {update.layer}; give the adapter's own --model"
        )
    W = weight.numpy()
    if isinstance(modules[name], (Conv1D, nn.Embedding)):  # stored as (in, out)
        W = W.T
    if W.shape != (update.outputs, update.A.shape[1]):
        raise UserError(
            f"{path}: {update.layer} is for a weight {(update.outputs, update.A.shape[1])}, but "
            f"the model's is {W.shape}; give the adapter's own --model"
        )
    return W[update.rows]
