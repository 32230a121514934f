"""A checkpoint's tensors -> a model's parameters: names, shapes, and all that does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jlora.formats.lazy import LazyArray
from jlora.models.families import Family
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.system.unread import unread

#: Buffers that older checkpoints saved beside the weights; the models compute them themselves.
BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$|\.position_ids$")

Array = TypeVar("Array", bound="np.ndarray | LazyArray")


def hugging_face_names(tensors: dict[str, Array], family: Family) -> dict[str, Array]:
    """The names of the language-model class: prefixes set right, buffers left out."""
    renamed = {}
    for name, array in tensors.items():
        while name.startswith(("module.", "_orig_mod.")):  # DataParallel, torch.compile
            name = name.split(".", 1)[1]
        if not BUFFERS.search(name):
            renamed[family.rename(name)] = array
    if any(name.startswith(family.prefix) for name in renamed):
        return renamed
    # A checkpoint of the bare model class, without the language-model head around it.
    head = f"{family.model.head_name}."
    return {n if n.startswith(head) else family.prefix + n: a for n, a in renamed.items()}


def load_weights(model: Any, tensors: dict[str, Array], source: str = "checkpoint") -> None:
    """Give every parameter of a model its values, as float32.

    ``tensors`` is emptied on the way, so that a large model is not in memory twice. A `LazyArray`
    is read when somebody asks for its values; `engine.prepare` packs them one by one. A head that
    repeats the tied embedding is accepted.

    Raises:
        UserError: keys are missing, unexpected or of another shape: all kinds in one message.
    """
    parameters = check_fit(model, tensors, source)
    for name, parameter in parameters.items():
        array = tensors.pop(name)
        if isinstance(array, LazyArray):
            parameter.assign(unread(array))
        else:
            parameter.assign(jt.array(array.astype(np.float32, copy=False)))


def check_fit(
    model: Any,
    tensors: Mapping[str, np.ndarray | LazyArray],
    source: str,
    config: Mapping[str, Any] = {},
    compare: bool = True,
) -> dict[str, Any]:
    """Check that there is one tensor of the right shape for every parameter.

    A head that repeats the tied embedding is removed from ``tensors``.

    Args:
        config: config.json, which says whether the weights are quantised.
        compare: look whether such a head has the embedding's values, which reads both.

    Returns:
        The model's parameters by name.

    Raises:
        UserError: see `load_weights`.
    """
    parameters = dict(model.named_parameters())
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    drop_tied_head(model, parameters, tensors, source, compare)
    problems = difference(expected, {name: tuple(a.shape) for name, a in tensors.items()})
    problems += embedding_rows(model.family.embedding, expected, tensors)
    whole = [name for name, array in tensors.items() if array.dtype.kind != "f"]
    if whole and not problems:
        problems = [f"{whole[0]} holds {tensors[whole[0]].dtype} numbers"]
    if problems and config.get("quantization_config"):
        raise UserError(
            f"{source}: {problems[0]}, and quantization_config says that the weights are "
            "quantised, which are not read; take the model that this one was made of"
        )
    if problems:
        raise UserError(
            f"{source}: the weights do not fit the model: {'; '.join(problems)}; take the "
            "configuration and the weights of one model, downloaded whole"
        )
    return parameters


def embedding_rows(
    name: str, expected: dict[str, tuple], tensors: dict[str, np.ndarray]
) -> list[str]:
    """What else to say where the embedding has another number of rows than vocab_size."""
    found, wanted = np.shape(tensors.get(name, ())), expected[name]
    if found[1:] == wanted[1:] and found[:1] != wanted[:1]:
        return [f"the embedding has {found[0]:,} rows, and vocab_size is {wanted[0]:,}"]
    return []


def drop_tied_head(
    model: Any, parameters: dict[str, Any], tensors: dict[str, Any], source: str, compare: bool
) -> None:
    """Remove lm_head.weight where the model uses its embedding instead, if they are equal."""
    if "lm_head.weight" not in tensors or "lm_head.weight" in parameters:
        return
    name = model.family.embedding
    embedding = tensors.get(name)
    head = tensors["lm_head.weight"]
    if embedding is not None and head.shape[0] != embedding.shape[0]:
        raise UserError(
            f"{source}: lm_head.weight has {head.shape[0]:,} rows and {name} "
            f"{embedding.shape[0]:,}, although the configuration ties them; take the configuration "
            "and the weights of one model"
        )
    if compare and embedding is not None and not np.array_equal(head, embedding):
        raise UserError(
            f"{source}: lm_head.weight differs from {name} although the configuration ties "
            "them; set tie_word_embeddings to false in config.json (Llama family only)"
        )
    del tensors["lm_head.weight"]


def difference(expected: dict[str, tuple], found: dict[str, tuple]) -> list[str]:
    """Say what is missing, unexpected and misshapen, the first few of each."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [n for n in expected if n in found and expected[n] != found[n]]
    problems = []
    if missing:
        named = [name + nearest(name, unexpected) for name in missing[:3]]
        problems.append(listing("missing", missing, named))
    if unexpected:
        problems.append(listing("unexpected", unexpected, unexpected[:3]))
    if misshapen:
        named = [f"{n} is {found[n]} instead of {expected[n]}" for n in misshapen[:3]]
        problems.append(listing("misshapen", misshapen, named))
    return problems


def nearest(name: str, candidates: list[str]) -> str:
    """The most similar unexpected name, as a hint."""
    close = difflib.get_close_matches(name, candidates, n=1)
    return f" (nearest: {close[0]})" if close else ""


def listing(word: str, names: list[str], shown: list[str]) -> str:
    """``3 missing: a, b, c`` or ``7 missing: a, b, c, ...``."""
    return f"{len(names)} {word}: {', '.join(shown)}" + (", ..." if len(names) > 3 else "")
