"""SentencePiece's BPE (Llama 2, Mistral, Gemma, Phi-3, InternLM) <-> GGUF's tokens and scores.

SentencePiece merges the two neighbours whose union has the highest score; a `tokenizers.Tokenizer`
merges by the rank of the pair. One is made from the other: the higher the score of a token, the
earlier the pairs that make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MARK = "\u2581"  # stands for a space
#: Phi-3's special tokens that leave the spaces behind them.
KEEP = ("<unk>", "<s>", "<|endoftext|>")
NORMAL, UNKNOWN, USER_DEFINED, CONTROL, BYTE = 1, 2, 4, 3, 6  # GGUF's token types


def backend(metadata: dict[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Any:
    """The `tokenizers.Tokenizer` of a file's metadata; KeyError or ValueError: they are damaged."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types) if kind == UNKNOWN]
    made = Backend(
        models.BPE(
            vocab=vocab,
            merges=merges(tokens, types, metadata["tokenizer.ggml.scores"]),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    replace, prefix = normalizers.Replace(" ", MARK), normalizers.Prepend(MARK)
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        made.normalizer = normalizers.Sequence([prefix, replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = replace
    made.decoder = decoders.Sequence(steps)
    takes = takes_spaces(metadata)
    ways = (((CONTROL, UNKNOWN), made.add_special_tokens), ((USER_DEFINED,), made.add_tokens))
    for kinds, add in ways:
        named = [token for token, kind in zip(tokens, types) if kind in kinds]
        add([AddedToken(t, normalized=False, rstrip=takes and t not in KEEP) for t in named])
    return made


def takes_spaces(metadata: dict[str, Any]) -> bool:
    """Whether special tokens take the spaces behind them.

    Phi-3's do; GGUF cannot say so, and llama.cpp goes by the model's name.
    """
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the highest score first."""
    pieces = {
        token: float(score)
        for token, kind, score in zip(tokens, types, scores)
        if kind in (NORMAL, USER_DEFINED)
    }
    if len(scores) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(scores)} scores")
    found = []
    for token, score in pieces.items():
        for cut in range(1, len(token)):
            if token[:cut] in pieces and token[cut:] in pieces:
                found.append((-score, len(found), token[:cut], token[cut:]))
    return [(left, right) for _, _, left, right in sorted(found)]


def prefix_of(settings: dict[str, Any]) -> str | None:
    """Before which texts a tokenizer.json puts a space; None: it is no SentencePiece BPE.

    Returns:
        "always": before every text, also behind special tokens; "first": before the first, where
        there is none; or "never".
    """
    model, normalizer, before = (settings[key] for key in ("model", "normalizer", "pre_tokenizer"))
    if model["type"] != "BPE":
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepend = {"type": "Prepend", "prepend": MARK}
    # Gemma's splits at spaces, of which there are none after its normalizer.
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    if before is None or {**before, "invert": False} == {**idle, "invert": False}:
        if normalizer == replace:
            return "never"
        together = {"type": "Sequence", "normalizers": [prepend, replace]}
        return "always" if normalizer == together else None
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first"}
    first = normalizer is None and before == {**metaspace, "split": False}
    return "first" if first else None


def metadata(
    settings: dict[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """What llama.cpp, and `backend`, build the tokenizer of a tokenizer.json from.

    tokenizer.json has ranks and no scores; a token's score here is the rank of its first pair,
    negative.
    """
    model, types = settings["model"], list(types)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    for index, token in enumerate(tokens):
        if token == model["unk_token"]:
            types[index] = UNKNOWN
        elif model["byte_fallback"] and len(token) == 6 and token.startswith("<0x"):
            types[index] = BYTE
    unknown = [index for index, kind in enumerate(types) if kind == UNKNOWN]
    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(pairs))) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": unknown[0] if unknown else None,
        "tokenizer.ggml.add_space_prefix": prefix_of(settings) != "never",
    }
    return {key: value for key, value in found.items() if value is not None}
