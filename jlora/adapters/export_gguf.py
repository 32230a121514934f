"""A model with its adapter merged -> a GGUF file, as llama.cpp has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlora.adapters import TunedModel, merged_weights
from jlora.adapters.export_folder import WrittenModel
from jlora.adapters.trained_tokens import UNKNOWN, TrainedTokens
from jlora.formats.gguf_kinds import check_written
from jlora.formats.gguf_write import write_gguf
from jlora.formats.rounding import precision_loss
from jlora.system.errors import UserError
from jlora.system.files import check_absent


def export_gguf(
    model: Any,
    path: str | Path,
    kind: str = "F32",
    tokenizer: bool = True,
    trained: TrainedTokens = UNKNOWN,
) -> WrittenModel:
    """Write a model, its adapter merged in float32, as a GGUF file with its tokenizer.

    Args:
        model: a tuned model, or a plain one as `jlora.load` gives it; it stays as it is.
        path: of a new file.
        kind: of the matrices, one of `formats.gguf_kinds.WRITTEN` in either case, such as q8_0 or
            q4_k_m.
        tokenizer: put the model's tokenizer into the file; llama.cpp needs it there.
        trained: the tokens round the completions that the adapter was trained with, where they are
            not the base's own.

    Raises:
        UserError: no such kind, ``path`` is in use or cannot be written, the model has no
            tokenizer or one that GGUF has no name for, a weight is too large for ``kind``, or the
            adapter cannot be merged (see `PeftModel.merge_adapter`).
    """
    path, kind = Path(path), kind.upper()
    check_written(kind)
    check_absent(path)
    base = model.get_base_model() if isinstance(model, TunedModel) else model
    architecture = getattr(getattr(base, "family", None), "gguf", None)
    if architecture is None:
        raise UserError(
            f"models of type {base.config.model_type} have no form in GGUF that is known here; "
            "`jlora merge` writes a folder"
        )
    metadata = tokenizer_metadata(base) if tokenizer else special_ids(base)
    notes = trained.gguf(metadata)
    weights = merged_weights(model)
    name = getattr(base, "name_or_path", None)
    errors = write_gguf(
        path,
        architecture,
        base.config.to_dict(),
        weights.tensors,
        kind,
        metadata,
        name and Path(name).name.removesuffix(".gguf"),
    )
    loss = None if kind == "F32" else precision_loss(kind.lower(), errors, weights.changes)
    return WrittenModel(path, weights.report, loss, tuple(notes))


def tokenizer_metadata(base: Any) -> dict[str, Any]:
    """The tokenizer as GGUF's metadata, or an error with the way out."""
    try:
        if getattr(base, "tokenizer", None) is None:
            raise UserError("the model has no tokenizer")
        return base.tokenizer.to_gguf(base.config.vocab_size)
    except UserError as error:
        raise UserError(
            f"{error}; --no-tokenizer (tokenizer=False) writes the weights alone, which jlora "
            "reads with a tokenizer.json beside them"
        ) from None


def special_ids(base: Any) -> dict[str, Any]:
    """What ends and begins a text, for a file without a tokenizer."""
    tokens = getattr(base, "tokenizer", None) or base.config
    ids = {key: getattr(tokens, f"{key}_token_id", None) for key in ("eos", "bos")}
    return {f"tokenizer.ggml.{k}_token_id": i for k, i in ids.items() if isinstance(i, int)}
