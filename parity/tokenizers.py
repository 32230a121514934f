"""Tokenizers compared with transformers and with a BPE in plain Python.

Each kind of file is read by the three, and their ids must be equal on every line. Decoding the ids
must give the text again, and any other ids, including halves of characters, must decode to the same
text as in transformers.

transformers 5.23 reads SmolLM2's GGUF file with GPT-2's splitting, because its table of
pre-tokenizers does not have ``smollm``. llama.cpp (which has this name), SmolLM2's tokenizer.json
and jlora split off every number character first ("  1" is two spaces and a digit, not space, space,
digit). Therefore transformers' vocabulary, merges and special tokens are compared with this
splitting set, as well as with the plain BPE, which has llama.cpp's expressions. transformers'
unchanged result is compared on the lines without numbers, where both agree.
"""

from __future__ import annotations

import json
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np

from parity.case import Case
from parity.downloads import downloaded, smollm2_gguf
from parity.plain_bpe import GPT2, LLAMA3, QWEN2, SMOLLM, PlainBPE
from parity.texts import (
    data_folder,
    data_lines,
    made_lines,
    pack,
    pack_numbers,
    unassigned_lines,
    unpack,
    unpack_numbers,
)

#: kind of file -> row of the table
FILES = {
    "vocab": "GPT-2: vocab.json, merges.txt",
    "encoder": "GPT-2: encoder.json, vocab.bpe",
    "json": "GPT-2: tokenizer.json of transformers",
    "gguf": "SmolLM2: in the GGUF file",
    "saved": "SmolLM2: tokenizer.json of jlora",
    "qwen2": "Qwen2's splitting of GPT-2's words",
    "llama3": "Llama 3's splitting of GPT-2's words",
}
SMOLLM2 = ("gguf", "saved")  # the others have GPT-2's vocabulary
HUGGING_FACE = ("vocab.json", "merges.txt")
END = "<|endoftext|>"
LINES = {"made": 7000, "e2e": 2500, "boolq": 1000, "unassigned": 200}


def cases(seed: int) -> list[Case]:
    kinds = list(LINES)
    if data_folder() is None:
        print("tokenizers: no E2E and BoolQ lines: set JLORA_DATA or put them in ../shared/data")
        kinds = ["made", "unassigned"]
    return [
        Case(row, f"{files}-{kind}", {"files": files, "lines": kind}, relative_to="exact")
        for files, row in FILES.items()
        for kind in kinds
    ]


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    kind = case.settings["lines"]
    count = LINES[kind] if data_folder() else LINES[kind] * 3 // 2
    if kind == "made":
        lines = made_lines(rng, count)
    elif kind == "unassigned":
        lines = unassigned_lines(rng, count)
    else:
        lines = data_lines(rng, kind, count)
    if case.settings["files"] == "qwen2":
        lines = [line for line in lines if _one_normal_form(line)]
    vocabulary = 49152 if case.settings["files"] in SMOLLM2 else 50257
    random = [rng.integers(0, vocabulary, n).tolist() for n in rng.integers(0, 20, 500)]
    return {**pack("lines", lines), **pack_numbers("random", random)}


def _one_normal_form(line: str) -> bool:
    """Whether NFC is the same by Python's tables and by those of `tokenizers`.

    Both sides use this package, whose tables are of Unicode 9 and do not reorder about a hundred
    later combining marks.
    """
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str(line) == unicodedata.normalize("NFC", line)


def fetch(case: Case, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Put the files into the case's folder, under the names that jlora reads."""
    files = case.settings["files"]
    (folder / "files").mkdir()
    if files == "gguf":
        (folder / "files" / "model.gguf").symlink_to(smollm2_gguf())
    elif files == "saved":
        _jlora(str(smollm2_gguf())).save(folder / "files")
        # transformers needs the kind of model.
        (folder / "files" / "config.json").write_text('{"model_type": "llama"}')
    elif files == "llama3":
        (folder / "files" / "gguf.json").write_text(json.dumps(_llama3_metadata()))
    else:
        names = ("encoder.json", "vocab.bpe") if files == "encoder" else HUGGING_FACE
        for name, source in zip(names, _gpt2_files()):
            (folder / "files" / name).symlink_to(source)
        settings = {"tokenizer_class": "Qwen2Tokenizer" if files == "qwen2" else "GPT2Tokenizer"}
        (folder / "files" / "tokenizer_config.json").write_text(json.dumps(settings))
    return {}


def _gpt2_files() -> tuple[Path, Path]:
    data = downloaded("gpt2-vocabulary") / "data"
    return data / "encoder.json", data / "vocab.bpe"


def _gpt2() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    vocab, merges = (path.read_text(encoding="utf-8") for path in _gpt2_files())
    return json.loads(vocab), [tuple(pair.split(" ")) for pair in merges.split("\n")[1:] if pair]


def _llama3_metadata() -> dict:
    """GPT-2's vocabulary in the form of a GGUF file of Llama 3, whose own is in no package."""
    vocab, merges = _gpt2()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": list(vocab),
        "tokenizer.ggml.token_type": [3 if token == END else 1 for token in vocab],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": vocab[END],
    }


def reference(case: Case, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    files, lines = case.settings["files"], unpack("lines", inputs)
    tokenizer, plain = _transformers(files, folder), _plain(files)
    found = {
        # The lines, except for Qwen2's normal form and bytes that SmolLM2 does not have.
        **pack("lossless", [plain.best_text(line) for line in lines]),
        **_decoded(lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip), inputs),
        **pack_numbers("special", [[len(tokenizer), tokenizer.eos_token_id]]),
    }
    if files == "gguf":
        found.update(pack_numbers("without_numbers", _ids(tokenizer, _numberless(lines))))
        _split_numbers_off(tokenizer)
    ids = _ids(tokenizer, lines)
    found.update(pack_numbers("ids", ids))
    if case.settings["lines"] != "unassigned":  # see `blocks`
        found.update(pack_numbers("plain_ids", [plain.encode(line) for line in lines]))
    return found


def _transformers(files: str, folder: Path):
    import transformers
    from transformers.integrations import gguf

    if files == "gguf":
        return transformers.AutoTokenizer.from_pretrained(folder / "files", gguf_file="model.gguf")
    if files == "llama3":
        metadata = json.loads((folder / "files" / "gguf.json").read_text())
        names = gguf.GGUF_TOKENIZER_MAPPING["tokenizer"]
        described = {names[key[len("tokenizer.") :]]: value for key, value in metadata.items()}
        backend, _ = gguf.convert_gguf_tokenizer("llama", described)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    if files == "encoder":  # transformers knows these files by their later names only
        for name, source in zip(HUGGING_FACE, _gpt2_files()):
            (folder / name).symlink_to(source)
        return transformers.GPT2TokenizerFast.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "files")
    if files == "json":
        tokenizer.save_pretrained(folder / "files")
    return tokenizer


def _ids(tokenizer, lines: list[str]) -> list[list[int]]:
    return tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []


def _split_numbers_off(tokenizer) -> None:
    """Make the backend of a transformers tokenizer split as SmolLM2's tokenizer.json does."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@lru_cache(maxsize=1)
def _plain(files: str) -> PlainBPE:
    if files not in SMOLLM2:
        splits = {"qwen2": QWEN2, "llama3": LLAMA3}.get(files, GPT2)
        return PlainBPE(*_gpt2(), (splits,), [END], "NFC" if files == "qwen2" else None)
    from gguf import GGUFReader

    fields = GGUFReader(smollm2_gguf()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    special = [token for token, kind in zip(tokens, types) if kind == 3]
    return PlainBPE({token: i for i, token in enumerate(tokens)}, merges, SMOLLM, special)


def ours(case: Case, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    files, lines = case.settings["files"], unpack("lines", inputs)
    tokenizer = _jlora(str(folder / "files"))
    ids = tokenizer.encode_batch(lines)
    found = {
        **pack("lossless", [tokenizer.decode(each, skip_special_tokens=False) for each in ids]),
        **_decoded(tokenizer.decode, inputs),
        **pack_numbers("special", [[tokenizer.vocab_size, tokenizer.eos_token_id]]),
        **pack_numbers("ids", ids),
    }
    if case.settings["lines"] != "unassigned":
        found.update(pack_numbers("plain_ids", [tokenizer.encode(line) for line in lines]))
    if files == "gguf":
        one_by_one = [tokenizer.encode(line) for line in _numberless(lines)]
        found.update(pack_numbers("without_numbers", one_by_one))
    return found


@lru_cache(maxsize=1)
def _jlora(path: str):
    from jlora.data.tokenizer import Tokenizer
    from jlora.formats.gguf_file import read_gguf

    file = Path(path)
    if (file / "gguf.json").is_file():
        return Tokenizer.from_gguf(json.loads((file / "gguf.json").read_text()))
    if (file / "model.gguf").is_file():
        file = file / "model.gguf"
    if file.is_file():
        return Tokenizer.from_gguf(read_gguf(file).metadata, file)
    return Tokenizer.from_folder(file)


def _decoded(decode, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Texts of random ids, with and without the special tokens."""
    random = unpack_numbers("random", inputs)
    return {
        **pack("decoded", [decode(ids, False) for ids in random]),
        **pack("decoded_without_special", [decode(ids, True) for ids in random]),
    }


def _numberless(lines: list[str]) -> list[str]:
    """The lines without a character of Unicode's kind N (by one Python's tables on both sides)."""
    return [t for t in lines if not any(unicodedata.category(c)[0] == "N" for c in t)]


STAGES = [("jlora", fetch), ("reference", reference), ("jlora", ours)]
