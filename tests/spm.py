"""Small tokenizers of SentencePiece's kind, in the forms that Llama-2 and TinyLlama have."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

MARK = "▁"  # stands for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MERGES = [
    (MARK, MARK), ("c", "a"), ("ca", "t"), (MARK, "cat"), ("t", "h"), ("th", "e"), (MARK, "the"),
    (MARK, "s"), ("a", "t"), (MARK + "s", "at"),
]  # fmt: skip
LETTERS = [MARK, *"abcdehmnost:|."]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *LETTERS, *("".join(pair) for pair in MERGES)]
VOCAB = {token: index for index, token in enumerate(TOKENS)}


def backend(legacy: bool) -> Tokenizer:
    """``legacy``: the space comes from the normalizer, before each text; else from Metaspace."""
    made = Tokenizer(
        models.BPE(VOCAB, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken(t, normalized=False) for t in TOKENS[:3]])
    return made
