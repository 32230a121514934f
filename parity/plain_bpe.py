"""Byte-level BPE in plain Python, after GPT-2's publication and llama.cpp's regular expressions.

transformers and jlora both use the Rust package `tokenizers`. This module shares no code with it,
so that agreement of the three is more than one library agreeing with itself.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

#: Words, numbers, signs and spaces, as OpenAI's GPT-2 splits a text.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: llama.cpp's two expressions for `smollm`: numbers one by one, then GPT-2's on what is between.
SMOLLM = (r"\p{N}", GPT2)
#: Llama 3's expression, and Qwen2's, which takes numbers one by one.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


class PlainBPE:
    """Text to ids.

    Args:
        vocab: token, written in GPT-2's byte alphabet, to id.
        merges: pairs of tokens, in order of their rank.
        splits: regular expressions, applied one after another.
        special: tokens that are never split.
        form: the Unicode normal form into which a text is converted first.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        splits: Sequence[str],
        special: Sequence[str],
        form: str | None = None,
    ):
        import regex

        self.vocab = vocab
        self.form = form
        self.rank = {pair: rank for rank, pair in enumerate(merges)}
        self.splits = [regex.compile(split) for split in splits]
        longest_first = sorted(special, key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
        self.names = set(special)
        self.alphabet = byte_alphabet()
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(self.normal(text)):
            if part in self.names:
                ids.append(self.vocab[part])
                continue
            pieces = [part]
            for split in self.splits:
                pieces = [p for piece in pieces for p in isolate(split, piece)]
            for piece in pieces:
                if piece not in self.known:
                    self.known[piece] = self.merge(piece)
                ids += self.known[piece]
        return ids

    def normal(self, text: str) -> str:
        return unicodedata.normalize(self.form, text) if self.form else text

    def best_text(self, text: str) -> str:
        """The text that decoding its ids can give.

        It is in normal form, without bytes that are not in the vocabulary (an incomplete character
        becomes U+FFFD).
        """
        kept = bytes(
            byte for byte in self.normal(text).encode() if self.alphabet[byte] in self.vocab
        )
        return kept.decode(errors="replace")

    def merge(self, piece: str) -> list[int]:
        """Join the pair of the lowest rank, everywhere, until no pair is known.

        Bytes that are not in the vocabulary (such as control-D in SmolLM2's) are removed before
        joining, as when the model was trained; llama.cpp removes them afterwards, so that a space
        before one and a byte after it do not become one token.
        """
        tokens = [self.alphabet[byte] for byte in piece.encode()]
        tokens = [token for token in tokens if token in self.vocab]
        while True:
            pairs = set(zip(tokens, tokens[1:])) & self.rank.keys()
            if not pairs:
                return [self.vocab[token] for token in tokens]
            best = min(pairs, key=self.rank.__getitem__)
            joined = []
            for token in tokens:
                if joined and (joined[-1], token) == best:
                    # Not joined[-1] of a pair just made: "aaa" with (a, a) is "aa", "a".
                    joined[-1] = best
                else:
                    joined.append(token)
            tokens = ["".join(token) for token in joined]


def isolate(split, text: str) -> list[str]:
    """Cut a text before and after every match."""
    pieces, end = [], 0
    for match in split.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


def byte_alphabet() -> list[str]:
    """The visible character that stands for each byte: itself, or the next free one from 256."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    found, spare = [], 256
    for byte in range(256):
        found.append(chr(byte if byte in visible else spare))
        spare += byte not in visible
    return found
