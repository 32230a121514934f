"""The tokenizer: the same ids from every kind of file, and clear errors for the rest."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlora.data.pretokenizers import byte_level_bpe
from jlora.data.tokenizer import Tokenizer
from jlora.system.errors import UserError


def byte_alphabet():
    """GPT-2's 256 printable stand-ins for bytes, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


#: A vocabulary that merges "the", " the", " a" and the digit pairs "12" and "123".
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("1", "2"), ("12", "3")]
TOKENS = [*byte_alphabet(), *("".join(pair) for pair in MERGES), "<|endoftext|>"]
VOCAB = {token: index for index, token in enumerate(TOKENS)}
END = VOCAB["<|endoftext|>"]
TEXTS = [
    "the a the",
    "123 the",
    " name : The Vaults",
    "é日本\n\n x",
    "don't",
    "",
    "a<|endoftext|>the",
]


def write_pair(folder, vocab_name, merges_name):
    (folder / vocab_name).write_text(json.dumps(VOCAB), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / merges_name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def gguf_metadata(pre="gpt-2", **extra):
    types = [1] * len(TOKENS)
    types[END] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.eos_token_id": END,
        **extra,
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(
        write_pair(tmp_path_factory.mktemp("tok"), "vocab.json", "merges.txt")
    )


def words(tokenizer, text):
    return [TOKENS[i] for i in tokenizer.encode(text)]


def test_ids_by_hand(tokenizer):
    assert words(tokenizer, "the a the") == ["the", "Ġa", "Ġthe"]
    assert words(tokenizer, "123") == ["123"]
    assert words(tokenizer, "é") == ["Ã", "©"]
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_every_kind_of_file_gives_the_same_ids(tmp_path, tokenizer):
    others = {"gguf": Tokenizer.from_gguf(gguf_metadata())}
    (tmp_path / "openai").mkdir()
    write_pair(tmp_path / "openai", "encoder.json", "vocab.bpe")
    others["openai"] = Tokenizer.from_folder(tmp_path / "openai")
    tokenizer.save(tmp_path / "saved")
    others["saved"] = Tokenizer.from_folder(tmp_path / "saved")
    for name, other in others.items():
        assert other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS), name
        assert other.eos_token_id == END, name
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_gpt2_files_begin_and_end_with_their_one_special_token(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == END


def test_special_tokens_in_text_become_their_id_as_in_transformers(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>the")
    assert ids == [VOCAB["a"], END, VOCAB["the"]]
    assert tokenizer.decode(ids) == "athe"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|endoftext|>the"


def test_batch_equals_one_at_a_time(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


@settings(max_examples=100, deadline=None)
@given(text=st.text())
@example(text="  two  spaces ")
@example(text="\r\n\t\x00")
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_half_a_character_decodes_to_the_replacement_mark(tokenizer):
    assert tokenizer.decode([VOCAB["Ã"]]) == "\ufffd"


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", " 123", ["Ġ", "123"]),
        ("smollm", " 123", ["Ġ", "1", "2", "3"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("llama-bpe", "1231", ["123", "1"]),
        # The regular expressions of Llama 3 and Qwen2 ignore the case of 's, 't, ...
        ("llama-bpe", "x'T", ["x", "'", "T"]),
        # Qwen2 composes characters first: e + combining accent.
        ("qwen2", "e\u0301", ["Ã", "©"]),
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_gguf_pre_tokenizers(pre, text, expected):
    assert words(Tokenizer.from_gguf(gguf_metadata(pre)), text) == expected


@pytest.mark.parametrize("pre", [None, "", "default"])
@pytest.mark.parametrize(("architecture", "own"), [("gpt2", "gpt-2"), ("qwen2", "qwen2")])
def test_a_gguf_that_does_not_say_its_splitting_is_taken_as_its_architectures(
    pre, architecture, own, capsys
):
    metadata = {**gguf_metadata(pre), "general.architecture": architecture}
    if pre is None:
        del metadata["tokenizer.ggml.pre"]
    tokenizer = Tokenizer.from_gguf(metadata, "m.gguf")
    known = Tokenizer.from_gguf(gguf_metadata(own))
    texts = ["x'T the", "123 e\u0301", *TEXTS]
    assert tokenizer.encode_batch(texts) == known.encode_batch(texts)
    said = capsys.readouterr().err
    assert "m.gguf does not say how its tokenizer splits texts" in said
    assert f"taken as {own}, since its architecture is {architecture}" in said
    Tokenizer.from_gguf(gguf_metadata("qwen2"))
    assert capsys.readouterr().err == ""


def test_a_llama_gguf_that_does_not_say_its_splitting_is_refused():
    """Llama 3's and SmolLM2's words are split differently."""
    for pre in ("default", ""):
        metadata = {**gguf_metadata(pre), "general.architecture": "llama"}
        with pytest.raises(UserError, match="models of architecture llama differ; put the model's"):
            Tokenizer.from_gguf(metadata)


def test_merges_may_lack_only_where_there_is_nothing_to_merge():
    metadata = gguf_metadata()
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(UserError, match="damaged .it lacks tokenizer.ggml.merges"):
        Tokenizer.from_gguf(metadata)
    count = len(byte_alphabet())
    metadata["tokenizer.ggml.tokens"] = [*TOKENS[:count], "<|endoftext|>"]
    metadata["tokenizer.ggml.token_type"] = [1] * count + [3]
    metadata["tokenizer.ggml.eos_token_id"] = count
    assert words(Tokenizer.from_gguf(metadata), "the") == ["t", "h", "e"]


def test_bytes_that_the_vocabulary_lacks_are_left_out_before_merging():
    """SmolLM2 has no token for 21 bytes; llama.cpp, other than transformers, merges first."""
    tokens = [token for token in byte_alphabet() if token != chr(256 + 4)] + ["!?"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(byte_level_bpe(vocab, [("!", "?")], "smollm", []))
    assert tokenizer.encode("!\x04?") == [vocab["!?"]]
    assert tokenizer.encode("\x04") == []


def test_llama3_finds_words_that_no_merge_reaches():
    vocab = {**VOCAB, "Ġhello": len(VOCAB)}
    backend = byte_level_bpe(vocab, MERGES, "llama3", [])
    assert backend.encode(" hello").ids == [len(VOCAB)]
    assert len(byte_level_bpe(vocab, MERGES, "gpt2", []).encode(" hello").ids) == 6


def test_gguf_ids_are_what_the_file_says():
    extra = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.padding_token_id": 4}
    tokenizer = Tokenizer.from_gguf(gguf_metadata(**extra))
    ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert ids == (END, 3, 4)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"its tokenizer \(none\) is not read; put .* tokenizer\.json"),
        ({"tokenizer.ggml.model": "llama"}, "damaged"),
        ({"tokenizer.ggml.model": "t5"}, r"its tokenizer \(t5\) is not read"),
        (gguf_metadata("chameleon"), "gpt2/chameleon"),
        (gguf_metadata() | {"tokenizer.ggml.merges": ["no such"]}, "damaged"),
        ({"tokenizer.ggml.model": "gpt2"}, "damaged"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_used(metadata, message):
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_gguf(metadata, "m.gguf")
    assert "\n" not in str(error.value)


def test_special_ids_come_from_tokenizer_config_then_config(tmp_path):
    write_pair(tmp_path, "vocab.json", "merges.txt")
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6], "bos_token_id": 7}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (5, 7, 5)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text('{"eos_token": {"content": "the"}, "pad_token": "a"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (VOCAB["the"], VOCAB["a"])


def test_added_tokens_of_older_files(tmp_path):
    write_pair(tmp_path, "vocab.json", "merges.txt")
    first, second = len(TOKENS), len(TOKENS) + 1
    # The ids of special tokens come first here, whatever the order in the file.
    added = {second: {"content": "<mr>", "special": False}, first: {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("a<mr>a<end>")
    assert len(ids) == 4 and tokenizer.decode(ids) == "a<mr>a"
    assert tokenizer.vocab_size == len(TOKENS) + 2
    added = {first + 5: {"content": "<far>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(UserError, match="'<far>' has id .* use the model's tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_json_with_padding_and_truncation_is_used_without_them(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    value["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    assert len(Tokenizer.from_folder(tmp_path).encode("the the the the")) == 4


def test_no_tokenizer_lists_what_would_do(tmp_path):
    with pytest.raises(UserError) as error:
        Tokenizer.from_folder(tmp_path)
    for name in ("tokenizer.json", "vocab.json with merges.txt", "encoder.json with vocab.bpe"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{}"}, "not a tokenizer file"),
        ({"tokenizer.json": ""}, "not a tokenizer file"),
        ({"vocab.json": "[1]", "merges.txt": ""}, "not a JSON object, but a list"),
        ({"vocab.json": "{", "merges.txt": ""}, "not JSON"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "whole number"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version\na b c\n"}, r"merges\.txt:2"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "do not fit together"),
        ({"tokenizer.json": b"\xff\xfe"}, "not UTF-8"),
    ],
)
def test_damaged_files_are_one_line_errors(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
