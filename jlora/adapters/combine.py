"""Several adapters of one base as one: PEFT's ``add_weighted_adapter`` on settings and arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jlora.adapters import storage
from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import pattern_value
from jlora.system.errors import UserError

KINDS = ("svd", "linear", "cat")


@dataclass(frozen=True)
class Part:
    """An adapter to combine.

    Attributes:
        name: what errors call it.
        config: its settings as PEFT's files have them.
        tensors: by PEFT's keys.
    """

    name: str
    config: LoraConfig
    tensors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Factors:
    """A (r, in) and B (out, r) of a layer, float64, and the factor of B A."""

    A: np.ndarray
    B: np.ndarray
    scale: float


def combine(
    parts: Sequence[Part], weights: Sequence[float], kind: str = "svd", rank: int | None = None
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter whose change is the weighted sum of the changes of several.

    A layer that only some of them have gets the sum of those.

    Args:
        weights: one for each; they may be negative and need not have the sum 1.
        kind: "cat" is exact and has the sum of the ranks. "svd" is the nearest sum of rank ``rank``
            (for each layer in the Frobenius norm). "linear" adds A and B each by itself, with the
            roots of the weights, so that products of one adapter's A and another's B come with it;
            the ranks must be equal, and stay.
        rank: of the result for "svd"; None: the largest of theirs.

    Returns:
        Settings and float32 tensors by PEFT's keys; ``alpha / r`` is 1 in every layer.

    Raises:
        UserError: no such kind, weights that do not fit, or adapters that cannot be combined: see
            `_factors`.
    """
    _check(parts, weights, kind, rank)
    found = [_factors(part) for part in parts]
    largest = max(len(f.A) for layers in found for f in layers.values())
    tensors, ranks = {}, {}
    for key in dict.fromkeys(key for layers in found for key in layers):
        there = [(layers[key], w) for layers, w in zip(found, weights) if key in layers]
        shapes = {(f.A.shape[1], len(f.B)) for f, _ in there}
        if len(shapes) > 1:
            raise UserError(
                f"{_layer(key)} has other sizes in {parts[0].name} than in the others; combine "
                "adapters of one base model"
            )
        if kind == "linear":
            A, B = _linear(key, there)
        else:
            # B A of these is the sum, with A already scaled.
            A = np.concatenate([f.A * (weight * f.scale) for f, weight in there])
            B = np.concatenate([f.B for f, _ in there], axis=1)
            if kind == "svd":
                A, B = nearest(A, B, rank or largest)
        for letter, array in (("A", A), ("B", B)):
            tensors[key.replace("*", letter)] = np.ascontiguousarray(array, dtype=np.float32)
        ranks[_layer(key)] = (len(A), len(A))
    first = parts[0].config
    config = replace(
        first,
        r=1,
        lora_alpha=1,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        variant=None,
        init_lora_weights=True,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        target_modules=sorted(ranks),
    )
    names = [part.config.target_modules for part in parts]
    everywhere = not any(
        part.config.exclude_modules or part.config.layers_to_transform is not None for part in parts
    )
    if everywhere and all(isinstance(each, list) for each in names):
        config = replace(config, target_modules=sorted(set().union(*names)))
    return storage.with_patterns(config, ranks), tensors


def _check(parts: Sequence[Part], weights: Sequence[float], kind: str, rank: int | None) -> None:
    if kind not in KINDS:
        raise UserError(
            f"combination_type {kind!r} is none that is built here; use {', '.join(KINDS)} "
            "(PEFT has the others)"
        )
    if not parts or len(parts) != len(weights):
        raise UserError(f"{len(parts)} adapters and {len(weights)} weights; give one for each")
    for weight in weights:
        if isinstance(weight, bool) or not math.isfinite(weight):
            raise UserError(f"a weight must be a number, not {weight!r}")
    if rank is not None and kind != "svd":
        raise UserError(f"a rank is for svd; with {kind} it follows from the adapters'")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UserError(f"the rank must be a whole number above 0, not {rank!r}")


def _factors(part: Part) -> dict[str, _Factors]:
    """The factors of each layer, by PEFT's key of A with ``*`` for its letter.

    Raises:
        UserError: the adapter is more than A and B: another variant, biases, copies of modules, a
            vocabulary; or one of the two is missing.
    """
    config = part.config
    more = None
    if not config.lora_variant.is_plain:
        more = f"is of the variant {config.variant_name!r}, whose change is no sum of B A"
    elif config.bias != "none":
        more = f"trains biases (bias {config.bias!r})"
    elif config.modules_to_save:
        more = f"has whole modules (modules_to_save {config.modules_to_save})"
    for key in part.tensors:
        if storage.factor_of(key) is None:
            more = more or f"has {key} beside its A and B"
    if more:
        raise UserError(
            f"{part.name} {more}, which cannot be combined; `jlora merge` it into the base, or "
            "leave it out"
        )
    found = {}
    for key in dict.fromkeys(storage.factor_of(key)[0] for key in part.tensors):
        A, B = (part.tensors.get(key.replace("*", letter)) for letter in "AB")
        name = _layer(key)
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or B.shape[1] != len(A):
            raise UserError(f"{part.name}: A and B of {name} do not fit; get the file anew")
        r = pattern_value(name, config.rank_pattern, config.r)
        alpha = pattern_value(name, config.alpha_pattern, config.lora_alpha)
        found[key] = _Factors(A.astype("d"), B.astype("d"), config.scaling(r, alpha))
    if not found:
        raise UserError(f"{part.name} holds no LoRA matrices")
    return found


def _layer(key: str) -> str:
    return storage.from_peft_key(key.replace("*", "A")).rpartition(".")[0]


def _linear(key: str, there: Sequence[tuple[_Factors, float]]) -> tuple[np.ndarray, np.ndarray]:
    ranks = sorted({len(f.A) for f, _ in there})
    if len(ranks) > 1:
        raise UserError(
            f"linear needs equal ranks, and {_layer(key)} has {ranks[0]} and {ranks[-1]}; use svd "
            "or cat"
        )
    A = B = 0.0
    for factors, weight in there:
        share = weight * factors.scale
        root = math.sqrt(abs(share))
        A = A + math.copysign(root, share) * factors.A  # the sign once, or it would be lost
        B = B + root * factors.B
    return A, B


def nearest(A: np.ndarray, B: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the matrix of a rank that is nearest to B A, without computing B A itself.

    Args:
        A, B: (R, in) and (out, R).

    Returns:
        (r, in) with orthonormal rows, and (out, r) with the singular values in it; r at most
        ``rank`` and what the sizes allow.
    """
    QB, RB = np.linalg.qr(B)  # (out, k), (k, R)
    QA, RA = np.linalg.qr(A.T)  # (in, m), (m, R)
    U, S, V = np.linalg.svd(RB @ RA.T)  # B A = QB (RB RA^T) QA^T
    r = min(rank, len(S))
    return V[:r] @ QA.T, (QB @ U[:, :r]) * S[:r]
