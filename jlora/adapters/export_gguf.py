"""A model with its adapter merged -> a GGUF file, as llama.cpp has them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jlora.adapters import TunedModel
from jlora.adapters.export_folder import WrittenModel
from jlora.adapters.merged import merged_pieces
from jlora.adapters.modelfile import modelfile, modelfile_path
from jlora.adapters.trained_tokens import UNKNOWN, TrainedTokens, special_token
from jlora.data.chat_template import ChatTemplate, find_template
from jlora.data.end_tokens import find_ends
from jlora.data.tokenizer import GGUF_ENDS
from jlora.formats.gguf_architecture import Architecture
from jlora.formats.gguf_kinds import check_written
from jlora.formats.gguf_write import write_gguf
from jlora.formats.rounding import precision_loss
from jlora.system.errors import UserError
from jlora.system.files import check_absent, write_text

#: The model's own chat template.
OWN = "own"
EOS = "tokenizer.ggml.eos_token_id"


def export_gguf(
    model: Any,
    path: str | Path,
    kind: str = "F32",
    tokenizer: bool = True,
    trained: TrainedTokens = UNKNOWN,
    template: ChatTemplate | str | None = OWN,
) -> WrittenModel:
    """Write a model, its adapter merged in float32, as a GGUF file with its tokenizer.

    A Modelfile for Ollama goes beside it, unless the tokenizer is left out.

    Args:
        model: a tuned model, or a plain one as `jlora.load` gives it; it stays as it is.
        path: of a new file.
        kind: of the matrices, one of `formats.gguf_kinds.WRITTEN` in either case, such as q8_0 or
            q4_k_m.
        tokenizer: put the model's tokenizer into the file; llama.cpp needs it there.
        trained: the tokens round the completions that the adapter was trained with, where they are
            not the base's own.
        template: of the conversations that it was trained with; `OWN`: the model's, if it has one;
            None: it continues prompts as they stand.

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
    config = base.config.to_dict()
    reason = architecture.check and architecture.check(config)
    if reason:
        raise UserError(
            f"{reason}: llama.cpp would compute something else; `jlora merge` writes a folder"
        )
    beside = modelfile_path(path) if tokenizer else None
    metadata = tokenizer_metadata(base, architecture.pre) if tokenizer else special_ids(base)
    notes, text = trained.gguf(metadata), ""
    if tokenizer:
        chosen = own_template(base) if isinstance(template, str) else template
        text, said = conversation_metadata(metadata, path.name, base.tokenizer, chosen, trained)
        notes += said
    weights = merged_pieces(model)
    notes += llama_cpp_notes(base.config, architecture, weights.tensors)
    name = getattr(base, "name_or_path", None)
    errors = write_gguf(
        path,
        architecture,
        config,
        weights.tensors,
        kind,
        metadata,
        name and Path(name).name.removesuffix(".gguf"),
    )
    if beside is not None:
        write_text(beside, text)
        notes.append(f"for Ollama: ollama create NAME -f {beside}")
    loss = None if kind == "F32" else precision_loss(kind.lower(), errors, weights.changes)
    return WrittenModel(path, weights.report, loss, tuple(notes))


def llama_cpp_notes(config: Any, architecture: Architecture, names: Iterable[str]) -> list[str]:
    """What llama.cpp leaves out, or why it does not load a file that jlora reads."""
    notes, own = [], f"models of architecture {architecture.name}"
    windows = [window for window in getattr(config, "windows", []) if window]
    if not architecture.windows[1] and windows and min(windows) < config.max_positions:
        notes.append(
            f"llama.cpp does not compute the window of {min(windows)} tokens in {own}: longer "
            "texts differ there"
        )
    behind = [architecture.names.get(key) for key in ("attn_output", "ffn_up", "ffn_down")]
    ends = tuple(f".{module}.bias" for module in behind if module)
    biased = next((name for name in names if name.endswith(ends)), None)
    if biased and not architecture.biases:
        notes.append(f"llama.cpp does not load {own} with {biased}; jlora does")
    head = architecture.names.get("output", "none") + ".weight"
    if architecture.own_head and head not in names:
        notes.append(f"llama.cpp does not load {own} without a head of their own; jlora does")
    return notes


def own_template(base: Any) -> ChatTemplate | None:
    """The chat template of a model's own files."""
    source = getattr(base, "source", None)
    if source is not None:
        return find_template(source)
    text = base.tokenizer.chat_template
    return None if text is None else ChatTemplate(text)


def conversation_metadata(
    metadata: dict[str, Any],
    name: str,
    tokenizer: Any,
    template: ChatTemplate | None,
    trained: TrainedTokens,
) -> tuple[str, list[str]]:
    """Put template and end tokens into a file's metadata; the text of a Modelfile, and notes.

    llama.cpp stops at the tokens under eos, eot and eom; Ollama reads the whole list as well.
    """
    notes, ends = [], find_ends(tokenizer, template)
    eos = metadata.get(EOS)
    ids = list(dict.fromkeys([*([] if eos is None else [eos]), *ends.ids]))
    for key, index in zip(("eot", "eom"), ids[1:]):
        metadata[f"tokenizer.ggml.{key}_token_id"] = index
    if len(ids) > 1:
        metadata[GGUF_ENDS] = ids
    if template is not None:
        metadata["tokenizer.chat_template"] = template.source
        if template.with_tools is not None:
            metadata["tokenizer.chat_template.tool_use"] = template.with_tools
            metadata["tokenizer.chat_templates"] = ["tool_use"]
        if template.arguments:
            arguments = json.dumps(dict(template.arguments))
            notes.append(f"llama.cpp is to be told: --chat-template-kwargs '{arguments}'")
    begins = metadata["tokenizer.ggml.add_bos_token"] and tokenizer.bos_token_id is not None
    begin = tokenizer.backend.id_to_token(tokenizer.bos_token_id) if begins else ""
    separator = trained.separator
    between = special_token(tokenizer, separator) if separator is not None else None
    stops = [tokenizer.decode([index], skip_special_tokens=False) for index in ids]
    stops = [text for text in dict.fromkeys([*stops, *ends.texts]) if text]
    return modelfile(name, template, stops, begin, between or ""), notes


def tokenizer_metadata(base: Any, pre: str | None) -> dict[str, Any]:
    """The tokenizer as GGUF's metadata, or an error with the way out."""
    try:
        if getattr(base, "tokenizer", None) is None:
            raise UserError("the model has no tokenizer")
        return base.tokenizer.to_gguf(base.config.vocab_size, pre)
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
