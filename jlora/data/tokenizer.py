"""Text <-> token ids: a `tokenizers.Tokenizer` (byte-level BPE or any other) with its special ids.

Special tokens in the text (``<|endoftext|>``) are encoded as their id, as in transformers; no
special tokens are added.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.data.gguf_tokenizer import backend_metadata, read_backend
from jlora.data.pretokenizers import byte_level_bpe
from jlora.formats.safetensors_file import one_line
from jlora.system.errors import UserError
from jlora.system.files import atomic_path, read_text
from jlora.system.json_files import read_object

#: Sets of files that define a tokenizer, in the order in which they are searched.
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
)
#: Texts behind which another one is encoded, see `Tokenizer.encode_after`.
ANCHORS = ("\n", "a", ".")
#: jlora's own key in GGUF for `Tokenizer.separator_id`.
GGUF_SEPARATOR = "jlora.separator_id"
#: Ollama's key in GGUF for all tokens that end an answer.
GGUF_ENDS = "tokenizer.ggml.eos_token_ids"


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of the end, begin and padding tokens.

    Attributes:
        vocab_size: number of ids, including special tokens.
        eos_token_id, bos_token_id: from the model's files, or None.
        pad_token_id: from the files, else the end token, else 0 (padding is always masked).
        end_token_ids: further tokens that end a text, as a model's files name them.
        separator_id: the token between prompt and completion with which jlora trained the model, if
            it is not the end token; -1 for none (`batches.NO_SEPARATOR`); None: unknown.
        chat_template: kept for other programs; see `jlora.data.chat_template`, which reads it.
    """

    def __init__(
        self,
        backend: Any,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        if pad_token_id is None:
            pad_token_id = eos_token_id if eos_token_id is not None else 0
        self.pad_token_id: int = pad_token_id
        self.chat_template = chat_template
        self.separator_id: int | None = None
        self.end_token_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no begin or end token is added.

        A byte that is not in the vocabulary (U+0004 in SmolLM2's) is omitted, as in transformers.
        """
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        return [
            e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_after(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` for texts that continue another one: the ids are those in the whole text.

        A SentencePiece tokenizer (Llama 2, TinyLlama) adds a space before every text that it
        encodes, which is right for the first text only: " cat" would begin with two spaces.
        Therefore such a text is encoded after a short anchor text, whose ids are then removed.
        Byte-level BPE adds no space.
        """
        alone = self.encode_batch(texts)
        if not self._adds_space:
            return alone
        after: list[list[int] | None] = [None] * len(alone)
        for anchor in ANCHORS:
            front = self.encode(anchor)
            waiting = [index for index, ids in enumerate(after) if ids is None]
            for index, ids in zip(waiting, self.encode_batch([anchor + texts[i] for i in waiting])):
                if ids[: len(front)] == front:
                    after[index] = ids[len(front) :]
        return [ids if behind is None else behind for ids, behind in zip(alone, after)]

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether encoding adds a space at the beginning of a text."""
        probes = (" a", "a")
        try:
            alone = self.encode_batch(probes)
            for anchor in ANCHORS:
                front = self.encode(anchor)
                behind = self.encode_batch([anchor + probe for probe in probes])
                if all(ids[: len(front)] == front for ids in behind):
                    return [ids[len(front) :] for ids in behind] != alone
        except Exception:  # a vocabulary of whole words without a token for unknown ones
            pass
        return False

    @functools.cached_property
    def begin_ids(self) -> list[int]:
        """The begin token, where the model's own files put it before every text; else nothing."""
        return [token for token in self.backend.encode("a").ids[:1] if token == self.bos_token_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; incomplete UTF-8 sequences become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, vocab.json + merges.txt, or GPT-2's encoder.json + vocab.bpe.

        Special ids come from tokenizer_config.json, then config.json.

        Raises:
            UserError: none of these files is there, or one is damaged.
        """
        folder = Path(path)
        found = find_files(folder)
        if found is None:
            accepted = ", or ".join(" with ".join(names) for names in TOKENIZER_FILES)
            raise UserError(f"{folder}: no tokenizer found; put {accepted} there")
        settings = read_json_object(folder / "tokenizer_config.json")
        if len(found) == 1:
            backend = read_tokenizer_json(found[0])
        else:
            backend = read_vocab_and_merges(*found, settings=settings)
        config = read_json_object(folder / "config.json")
        ids = {key: special_id(backend, key, settings, config) for key in ("eos", "bos", "pad")}
        if len(found) == 2 and ids["eos"] is None:
            # OpenAI's files for GPT-2 have no settings: the one special token begins and ends a
            # text.
            ids["eos"] = ids["bos"] = backend.token_to_id("<|endoftext|>")
        tokenizer = cls(
            backend, ids["eos"], ids["bos"], ids["pad"], chat_template(folder, settings)
        )
        generation = read_json_object(folder / "generation_config.json")
        tokenizer.end_token_ids = named_ids(
            [generation, config], ["eos_token_id"], tokenizer.vocab_size
        )
        trained = config.get("jlora")
        if isinstance(trained, dict) and type(trained.get("separator_id")) is int:
            tokenizer.separator_id = trained["separator_id"]
        return tokenizer

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], path: str | Path = "GGUF file") -> Tokenizer:
        """Build the tokenizer that a GGUF file carries (`GGUFFile.metadata`).

        Raises:
            UserError: the file has none, or one of an unknown kind.
        """
        backend = read_backend(metadata, path)
        ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "bos", "padding")]
        special_ids = (None if i is None else int(i) for i in ids)
        tokenizer = cls(backend, *special_ids, metadata.get("tokenizer.chat_template"))
        ends = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
        tokenizer.end_token_ids = named_ids([metadata], [*ends, GGUF_ENDS], tokenizer.vocab_size)
        if type(metadata.get(GGUF_SEPARATOR)) is int:
            tokenizer.separator_id = metadata[GGUF_SEPARATOR]
        return tokenizer

    def to_gguf(self, rows: int, pre: str | None = None) -> dict[str, Any]:
        """The metadata from which `from_gguf`, and llama.cpp, build this tokenizer.

        Args:
            rows: of the model's embedding matrix; ids up to there that have no token get a filler.
            pre: the `tokenizer.ggml.pre` to write where several names mean the same.

        Raises:
            UserError: it is neither a byte-level BPE of a kind that has a name in GGUF nor
                SentencePiece's.
        """
        ids = {"bos": self.bos_token_id, "eos": self.eos_token_id, "padding": self.pad_token_id}
        metadata = {
            **backend_metadata(self.backend, rows, pre),
            **{f"tokenizer.ggml.{key}_token_id": index for key, index in ids.items()},
            "tokenizer.ggml.add_bos_token": bool(self.begin_ids),
            "tokenizer.chat_template": self.chat_template,
            GGUF_SEPARATOR: self.separator_id,
        }
        return {key: value for key, value in metadata.items() if value is not None}

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (the special tokens) into a folder."""
        folder = Path(folder)
        with atomic_path(folder / "tokenizer.json") as temporary:
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for key in ("eos", "bos", "pad"):
            index = getattr(self, f"{key}_token_id")
            if index is not None:
                settings[f"{key}_token"] = self.backend.id_to_token(index)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        with atomic_path(folder / "tokenizer_config.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """A model's chat template, which transformers saves in one of two files."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def find_files(folder: Path) -> list[Path] | None:
    """The first complete set of tokenizer files in a folder."""
    for names in TOKENIZER_FILES:
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if the file does not exist."""
    if not path.is_file():
        return {}
    return read_object(path, "download it again")


def read_tokenizer_json(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from Hugging Face's file."""
    from tokenizers import Tokenizer as Backend

    text = read_text(path)
    try:
        return Backend.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise UserError(
            f"{path}: not a tokenizer file of Hugging Face's kind ({one_line(error)}); download it "
            "again"
        ) from error


def read_vocab_and_merges(vocab_path: Path, merges_path: Path, settings: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` from GPT-2's (or Qwen2's) older pair of files."""
    vocab = read_json_object(vocab_path)
    if not all(isinstance(index, int) for index in vocab.values()):
        raise UserError(f"{vocab_path}: every token must map to a whole number")
    merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise UserError(f"{merges_path}:{number}: two tokens with one space are expected")
        merges.append((parts[0], parts[1]))
    added = added_tokens(settings)
    special = [text for text, _, is_special in added if is_special]
    extra = [text for text, _, is_special in added if not is_special]
    if "<|endoftext|>" in vocab and "<|endoftext|>" not in special:
        special.append("<|endoftext|>")
    kind = "qwen2" if str(settings.get("tokenizer_class", "")).startswith("Qwen2") else "gpt2"
    try:
        backend = byte_level_bpe(vocab, merges, kind, special, extra)
    except Exception as error:
        raise UserError(
            f"{vocab_path} and {merges_path} do not fit together ({one_line(error)}); take both "
            "from one model"
        ) from error
    for text, index, _ in added:
        if backend.token_to_id(text) != index:
            raise UserError(
                f"{vocab_path}: added token {text!r} has id {index} in tokenizer_config.json, "
                "which does not follow the vocabulary; use the model's tokenizer.json"
            )
    return backend


def added_tokens(settings: dict[str, Any]) -> list[tuple[str, int, bool]]:
    """(text, id, special) of tokenizer_config.json's added tokens, in the order of their ids."""
    entries = settings.get("added_tokens_decoder")
    found = []
    for index, entry in (entries if isinstance(entries, dict) else {}).items():
        if index.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found.append((entry["content"], int(index), bool(entry.get("special", True))))
    return sorted(found, key=lambda token: token[1])


def named_ids(
    settings: Sequence[dict[str, Any]], keys: Sequence[str], vocabulary: int
) -> tuple[int, ...]:
    """The ids under some keys of configurations, each a number or a list; those that exist."""
    found: list[int] = []
    for value in (each.get(key) for each in settings for key in keys):
        for index in value if isinstance(value, list) else [value]:
            if type(index) is int and 0 <= index < vocabulary:
                found.append(index)
    return tuple(dict.fromkeys(found))


def special_id(
    backend: Any, key: str, settings: dict[str, Any], config: dict[str, Any]
) -> int | None:
    """The eos, bos or pad id: the token named in tokenizer_config.json, else config.json's id."""
    token = settings.get(f"{key}_token")
    if isinstance(token, dict):  # the long form: {"content": "</s>", "lstrip": false, ...}
        token = token.get("content")
    if isinstance(token, str):
        index = backend.token_to_id(token)
        if index is not None:
            return index
    index = config.get(f"{key}_token_id")
    if isinstance(index, list):  # several end tokens: the first is the model's own
        index = index[0] if index else None
    return index if isinstance(index, int) else None
