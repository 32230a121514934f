"""Tokenizers <-> the metadata of GGUF files: byte-level BPE, and SentencePiece's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.data import sentencepiece
from jlora.data.pretokenizers import GGUF_PRE, byte_level_bpe, kind_of, split_settings
from jlora.formats.gguf_architectures import ARCHITECTURES
from jlora.formats.safetensors_file import one_line
from jlora.system.console import say
from jlora.system.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's token types
#: GGUF's key for a whole tokenizer.json, for programs that read one.
WHOLE = "tokenizer.huggingface.json"


def read_backend(metadata: dict[str, Any], path: str | Path) -> Any:
    """The `tokenizers.Tokenizer` that a GGUF file's metadata describe.

    Raises:
        UserError: the file has none, one of an unknown kind, or a damaged one.
    """
    from tokenizers import Tokenizer as Backend

    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    way = "put the model's tokenizer.json into the same folder"
    if model not in ("gpt2", "llama"):
        raise UserError(f"{path}: its tokenizer ({model or 'none'}) is not read; {way}")
    if model == "gpt2" and pre not in GGUF_PRE and pre not in (None, "", "default"):
        raise UserError(
            f"{path}: its tokenizer ({model}/{pre}) is not read: of the ways to split texts "
            f"(tokenizer.ggml.pre), {', '.join(GGUF_PRE)} are known; {way}"
        )
    try:
        if isinstance(metadata.get(WHOLE), str):
            return Backend.from_str(metadata[WHOLE])
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if model == "llama":
            backend = sentencepiece.backend(metadata, tokens, types)
            return begin(backend, metadata, tokens, default=True)
        if "tokenizer.ggml.merges" not in metadata and needs_merges(tokens, types):
            raise ValueError("it lacks tokenizer.ggml.merges")
        merges = [tuple(pair.split(" ")) for pair in metadata.get("tokenizer.ggml.merges", [])]
        vocab = {token: index for index, token in enumerate(tokens)}
        special = [t for t, kind in zip(tokens, types) if kind == CONTROL]
        extra = [t for t, kind in zip(tokens, types) if kind == USER_DEFINED]
        kind = GGUF_PRE[pre if pre in GGUF_PRE else assumed_pre(metadata, path)]
        backend = byte_level_bpe(vocab, merges, kind, special, extra)
        return begin(backend, metadata, tokens, default=kind in ("llama3", "tekken"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: its tokenizer is damaged ({one_line(error)}); download it again"
        ) from error


def begin(backend: Any, metadata: dict[str, Any], tokens: Sequence[str], default: bool) -> Any:
    """Let a tokenizer put the begin token before texts that ask for it, where the file says so.

    Args:
        default: what llama.cpp does where the file says nothing.
    """
    from tokenizers.processors import TemplateProcessing

    index = metadata.get("tokenizer.ggml.bos_token_id")
    if index is not None and metadata.get("tokenizer.ggml.add_bos_token", default):
        token = {"id": "bos", "ids": [int(index)], "tokens": [tokens[int(index)]]}
        backend.post_processor = TemplateProcessing(single="bos $A", special_tokens=[token])
    return backend


def backend_metadata(backend: Any, rows: int, pre: str | None = None) -> dict[str, Any]:
    """The metadata from which `read_backend`, and llama.cpp, build a tokenizer.

    What GGUF's own keys cannot say (a token that takes the spaces behind it, a space before the
    first text alone) is in a tokenizer.json beside them, which jlora reads.

    Args:
        rows: of the model's embedding matrix; ids up to there that have no token get a filler.
        pre: the `tokenizer.ggml.pre` to write where several names mean the same.

    Raises:
        UserError: GGUF has no form for this tokenizer.
    """
    settings = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    named = {index: token for token, index in vocab.items()}
    tokens = [named.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [NORMAL if index in named else UNUSED for index in range(rows)]
    for index, token in backend.get_added_tokens_decoder().items():
        if index < rows:
            types[index] = CONTROL if token.special else USER_DEFINED
    if sentencepiece.prefix_of(settings) is not None:
        found = sentencepiece.metadata(settings, tokens, types)
    else:
        found = byte_level_metadata(settings, tokens, types, pre)
    if same_tokenizer(settings, json.loads(read_backend(found, "the file").to_str())):
        return found
    return {**found, WHOLE: backend.to_str()}


def byte_level_metadata(
    settings: dict[str, Any], tokens: list[str], types: list[int], pre: str | None
) -> dict[str, Any]:
    """`backend_metadata` of the tokenizer.json of a byte-level BPE."""
    kind = kind_of(settings)
    if kind is None:
        raise UserError(
            "the tokenizer is no byte-level BPE of a kind that GGUF has a name for "
            f"({', '.join(GGUF_PRE)}) and no SentencePiece BPE, so it cannot go into the file"
        )
    if GGUF_PRE.get(pre) != kind:
        pre = next(name for name, of in GGUF_PRE.items() if of == kind)
    if not settings["model"]["merges"] and needs_merges(tokens, types):
        raise UserError("the tokenizer has words and no merges, which GGUF cannot represent")
    merges = [m if isinstance(m, str) else " ".join(m) for m in settings["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def same_tokenizer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tokenizer.json give the same ids, as far as their settings show."""

    def parts(settings: dict[str, Any]) -> list[Any]:
        model = settings["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        fields = [model[key] for key in ("unk_token", "byte_fallback", "fuse_unk")]
        return [split_settings(settings), merges, fields, settings["added_tokens"]]

    return parts(one) == parts(other)


def needs_merges(tokens: Sequence[str], types: Sequence[int]) -> bool:
    """Whether there are tokens of several characters, which need merges.

    GGUF has no empty lists, so the file of a vocabulary of single bytes has no merges.
    """
    return any(len(token) > 1 and kind == NORMAL for token, kind in zip(tokens, types))


def assumed_pre(metadata: dict[str, Any], path: str | Path) -> str:
    """The `tokenizer.ggml.pre` to use for a file without it; prints a warning.

    (llama.cpp also warns, and splits texts in a default way that no model has.)

    Raises:
        UserError: models of this architecture differ.
    """
    architecture = metadata.get("general.architecture")
    given = metadata.get("tokenizer.ggml.pre")
    state = "does not say how its tokenizer splits texts (tokenizer.ggml.pre is "
    state += "missing)" if given is None else f"{given!r})"
    known = ARCHITECTURES.get(architecture)
    if known is None or known.pre is None:
        raise UserError(
            f"{path}: it {state}, and models of architecture {architecture} differ; put the "
            "model's tokenizer.json into the same folder, or convert the model again with a "
            "current llama.cpp"
        )
    say(f"warning: {path} {state}; taken as {known.pre}, since its architecture is {architecture}")
    return known.pre
