"""A model with its adapter merged -> a folder as transformers has them, whole or not at all."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.adapters import MergeReport, TunedModel
from jlora.adapters.merged import merged_pieces
from jlora.adapters.trained_tokens import UNKNOWN, TrainedTokens
from jlora.data.chat_template import ChatTemplate
from jlora.data.tokenizer import find_files, read_json_object
from jlora.formats.gguf_file import main_kind
from jlora.formats.rounding import PrecisionLoss, precision_loss
from jlora.formats.safetensors_file import write_shards
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, check_absent, write_text

#: dtype in transformers' words -> in GGUF's.
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: Fields of a base's config.json that are not true of the written model: its weights are plain
#: numbers and its folder holds no Python files.
OF_THE_BASE = (
    *("quantization_config", "compression_config", "quantization"),
    *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
    *("auto_map", "_name_or_path", "name_or_path", "_commit_hash"),
)
#: The files that transformers reads a tokenizer from.
TOKENIZER_SETTINGS = "tokenizer_config.json"
COPIED = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", TOKENIZER_SETTINGS,
)  # fmt: skip
#: Most bytes of a file, as transformers had it for long.
SHARD = "5GB"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SETTINGS = ("generation_config.json", "special_tokens_map.json", TOKENIZER_SETTINGS)


@dataclass(frozen=True)
class WrittenModel:
    """What writing a merged model did.

    Attributes:
        path: the folder or file.
        report: what merging changed; None where there was no adapter.
        loss: what the narrower type costs the change; None for float32, or where nothing changed.
        notes: what else is worth knowing, one line each.
    """

    path: Path
    report: MergeReport | None
    loss: PrecisionLoss | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.report, self.loss, *self.notes, f"written: {self.path}"]
        return "\n".join(str(line) for line in lines if line is not None)


def write_merged(
    model: Any,
    folder: str | Path,
    dtype: str = "float32",
    trained: TrainedTokens = UNKNOWN,
    template: ChatTemplate | None = None,
    max_shard_size: int | str = SHARD,
) -> WrittenModel:
    """Write a model, its adapter merged in float32, as a folder that transformers loads.

    The folder gets config.json (the base's own where it had one), model.safetensors,
    generation_config.json if the base has it, and the tokenizer. ``model`` stays as it is.
    Tensors are read, merged and written one after the other.

    Args:
        model: a tuned model, or a plain one as `jlora.load` gives it.
        folder: new or empty.
        dtype: of the weights in the file: "float32", "float16" or "bfloat16" (to the nearest).
        trained: the tokens round the completions that the adapter was trained with, where they are
            not the base's own; every file of the folder then names them.
        template: the chat template that the adapter was trained with; None: the base's own, if it
            has one.
        max_shard_size: of a file of weights, in bytes or such as "5GB" or "500MB"; larger models
            become several files and an index.

    Raises:
        UserError: no such dtype or size, ``folder`` is in use or cannot be written, a weight is too
            large for float16, or the adapter cannot be merged (see `PeftModel.merge_adapter`).
    """
    folder = Path(folder)
    if dtype not in KINDS:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(KINDS)}")
    most = bytes_of(max_shard_size)
    check_absent(folder)
    base = model.get_base_model() if isinstance(model, TunedModel) else model
    source = source_folder(base)
    if source:
        for name in SETTINGS:  # what is wrong there is found at once
            read_json_object(source / name)
    weights, kind, loss = merged_pieces(model), KINDS[dtype], None
    with atomic_path(folder, directory=True) as temporary:
        files, errors = write_shards(temporary, weights.tensors, kind, {"format": "pt"}, most)
        if kind != "F32":
            loss = precision_loss(dtype, errors, weights.changes)
        config = json.dumps(config_of(base, dtype), indent=2) + "\n"
        write_text(temporary / "config.json", config)
        notes = [*write_tokenizer(base, temporary), *size_note(base, files, dtype)]
        copy(source_folder(base), temporary, ("generation_config.json",))
        notes += trained.write(temporary, getattr(base, "tokenizer", None))
        if template is not None:
            template.save(temporary)
    return WrittenModel(folder, weights.report, loss, tuple(notes))


def bytes_of(size: int | str) -> int:
    """A number of bytes, as transformers writes them: 5GB is 5e9, 5GiB 5 * 2**30.

    Raises:
        UserError: not such a number, or 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    number = float(found[1]) * UNITS[found[2] or ""] if found else 0
    if not 1 <= number < math.inf:
        raise UserError(f"max_shard_size {size!r} is no size; give one such as 5GB or 500MB")
    return int(number)


def config_of(base: Any, dtype: str) -> dict[str, Any]:
    """The config.json to write: what the model was loaded with, and nothing that is untrue now."""
    computed = base.config.to_dict()
    config = {**(getattr(base, "source_config", None) or computed)}
    config = {key: value for key, value in config.items() if key not in OF_THE_BASE}
    config["architectures"] = computed["architectures"]
    # transformers 5 writes "dtype", every version reads "torch_dtype".
    key = "dtype" if "dtype" in config else "torch_dtype"
    config.pop("torch_dtype", None)
    return {**config, key: dtype}


def source_folder(base: Any) -> Path | None:
    """The folder that a model was loaded from, if it is known."""
    source = getattr(base, "source", None)
    return source.parent if source else None


def write_tokenizer(base: Any, folder: Path) -> list[str]:
    """The tokenizer, in the base's own files where transformers reads those; notes."""
    tokenizer, source = getattr(base, "tokenizer", None), source_folder(base)
    if tokenizer is None:
        return ["the base model has no tokenizer, so the folder has none"]
    found = find_files(source) if source and (source / TOKENIZER_SETTINGS).is_file() else None
    if found and found[0].name in COPIED:  # OpenAI's own file names are not for transformers
        copy(source, folder, COPIED)
    else:
        tokenizer.save(folder)
    return []


def copy(source: Path | None, folder: Path, names: tuple[str, ...]) -> None:
    """Copy the files that are there."""
    for name in names:
        if source and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def size_note(base: Any, files: list[Path], dtype: str) -> list[str]:
    """What became of a GGUF file's small weights."""
    source = getattr(base, "source", None)
    if source is None or source.suffix != ".gguf" or not source.is_file():
        return []
    kind, old = main_kind(source), source.stat().st_size
    new = sum(file.stat().st_size for file in files)
    if kind == KINDS[dtype]:
        return []
    return [
        f"the base {source.name} holds {kind} weights, which jlora widens to float32; merged and "
        f"stored as {dtype} they take {new / 1e6:,.0f} MB, {new / old:.1f} times the file "
        "(`jlora export` writes quantised ones)"
    ]
