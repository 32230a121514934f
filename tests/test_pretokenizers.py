"""Tokenizers in GGUF files: each name splits texts as the model's own tokenizer.json does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spm import backend as spm_backend
from test_tokenizer import gguf_metadata
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jlora.data.gguf_tokenizer import WHOLE
from jlora.data.pretokenizers import GGUF_PRE, KINDS, kind_of
from jlora.data.sentencepiece import MARK, merges
from jlora.data.tokenizer import Tokenizer
from jlora.system.errors import UserError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BEFORE = r"[^\r\n\p{L}\p{N}]?"


def split(pattern, behavior="Isolated", invert=False):
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert,
    }  # fmt: skip


def byte_level(use_regex):
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
        "use_regex": use_regex,
    }  # fmt: skip


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level(False)]}


#: ``normalizer``, ``pre_tokenizer`` and ``ignore_merges`` as tokenizer.json of the models has them.
FILES = {
    "gpt-2": (None, byte_level(True), False),
    "smollm": (
        None,
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(True)],
        },
        False,
    ),
    "llama-bpe": (
        None,
        sequence(split(rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}{REST}")),
        True,
    ),
    "qwen2": (
        {"type": "NFC"},
        sequence(split(rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}{REST}")),
        False,
    ),
    "olmo": ({"type": "NFC"}, byte_level(True), False),
    "dbrx": (
        None,
        sequence(split(rf"{CONTRACTIONS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}{REST}", "Removed", True)),
        False,
    ),
    "gpt-4o": (
        None,
        sequence(
            split(
                rf"{BEFORE}{UPPER}*{LOWER}+{CONTRACTIONS}?|{BEFORE}{UPPER}+{LOWER}*{CONTRACTIONS}?"
                rf"|\p{{N}}{{1,3}}{CASED_REST}"
            )
        ),
        False,
    ),
    "tekken": (
        None,
        sequence(
            split(
                rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}{CASED_REST}",
            )
        ),
        True,
    ),
    "deepseek-coder": (
        None,
        sequence(
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"),
            {"type": "Digits", "individual_digits": True},
        ),
        False,
    ),
}
HARD = [
    "camelCase HTTPServer's don'T I'LL we've  x",
    "12345 1,234.5 ½ Ⅻ ²³ ٣٤٥٦ १२३",
    "\r\n\n\t  tabs\u00a0and\u2003spaces \u3000 \n  end  ",
    "e\u0301 \u00e9 \u1e9b\u0323 Å \u212b ﬁ",
    "日本語テキスト 中文,标点。 한국어 a漢字b",
    "ǅungla Ωμέγα ЖИЗНЬ жизнь ნანა ᲜᲐᲜᲐ עברית العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦 🇩🇪 ☃️ __init__(self, *args)/path//to\\file\n///\n",
    "<|im_start|>user\nHi<|im_end|>\x00\x1b[0m\ufeff\u2028\u2029\u200d",
    "",
]


def tokenizer_json(normalizer, pre_tokenizer, ignore_merges):
    """A tokenizer.json with words that only some ways of splitting leave whole."""
    metadata = gguf_metadata()
    made = Backend(
        models.BPE(
            {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]],
            ignore_merges=ignore_merges,
        )
    )
    made.add_special_tokens(["<|endoftext|>"])
    return Backend.from_str(
        json.dumps(
            {**json.loads(made.to_str()), "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
        )
    )


@pytest.mark.parametrize("pre", FILES)
def test_a_name_splits_as_the_models_own_file(pre):
    """Ids, and the words before the merges, which a small vocabulary would hide."""
    theirs = tokenizer_json(*FILES[pre])
    written = Tokenizer(theirs, eos_token_id=3).to_gguf(300)
    assert written["tokenizer.ggml.pre"] == pre
    ours = Tokenizer.from_gguf(written, "m.gguf").backend
    for text in HARD:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        normal = theirs.normalizer.normalize_str(text) if theirs.normalizer else text
        words = [word for word, _ in ours.pre_tokenizer.pre_tokenize_str(normal)]
        assert words == [w for w, _ in theirs.pre_tokenizer.pre_tokenize_str(normal)], text
    normalizers_ = [b.normalizer and b.normalizer.normalize_str("e\u0301") for b in (ours, theirs)]
    assert normalizers_[0] == normalizers_[1]


WORDS = {
    # Digits by three or alone, contractions of either case, letters by case, signs with slashes.
    "llama-bpe": ("Abc'S 1234//\nx", ["Abc", "'S", "Ġ", "123", "4", "//Ċ", "x"]),
    "qwen2": ("Abc'S 1234//\nx", ["Abc", "'S", "Ġ", "1", "2", "3", "4", "//Ċ", "x"]),
    "gpt-2": ("Abc'S 1234//\nx", ["Abc", "'", "S", "Ġ1234", "//", "Ċ", "x"]),
    "smollm": ("Abc'S 1234//\nx", ["Abc", "'", "S", "Ġ", "1", "2", "3", "4", "//", "Ċ", "x"]),
    "gpt-4o": ("camelCase's 1234//\nx", ["camel", "Case's", "Ġ", "123", "4", "//Ċ", "x"]),
    "tekken": ("camelCase's 12//\nx", ["camel", "Case", "'s", "Ġ", "1", "2", "//Ċ", "x"]),
    # DeepSeek's signs are a list of characters, its coder's the punctuation of Unicode.
    "deepseek-llm": ("ab漢12=! \n", ["ab", "æ¼¢", "1", "2", "=!", "Ġ", "Ċ"]),
    "deepseek-coder": ("ab漢12=! \n", ["ab", "æ¼¢", "1", "2", "=", "!", "Ġ", "Ċ"]),
    "olmo": ("Abc 12", ["Abc", "Ġ12"]),
    "glm4": ("Abc'S 1234", ["Abc", "'S", "Ġ", "123", "4"]),
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_by_hand(pre):
    text, expected = WORDS[pre]
    backend = Tokenizer.from_gguf(gguf_metadata(pre)).backend
    assert [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_every_name_is_read_and_every_kind_written():
    for pre, kind in GGUF_PRE.items():
        tokenizer = Tokenizer.from_gguf(gguf_metadata(pre))
        assert kind_of(json.loads(tokenizer.backend.to_str())) == kind
        # A family's own name for its kind is kept.
        assert tokenizer.to_gguf(300, pre)["tokenizer.ggml.pre"] == pre
    assert set(GGUF_PRE.values()) == set(KINDS)


def test_an_unknown_name_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"m.gguf: .*\(gpt2/kimi-k2\) is not read: .*gpt-2, "):
        Tokenizer.from_gguf(gguf_metadata("kimi-k2"), "m.gguf")


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("said", [True, False, None])
def test_the_begin_token_is_put_where_the_file_says(pre, said):
    extra = {"tokenizer.ggml.bos_token_id": 3}
    if said is not None:
        extra["tokenizer.ggml.add_bos_token"] = said
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre, **extra))
    begins = (pre == "llama-bpe") if said is None else said  # llama.cpp's own default
    assert tokenizer.backend.encode("a").ids[:-1] == ([3] if begins else [])
    assert tokenizer.encode("a") == tokenizer.backend.encode("a").ids[-1:]
    assert tokenizer.to_gguf(300)["tokenizer.ggml.add_bos_token"] is begins


# SentencePiece -----------------------------------------------------------------------------------


def spm(form: str) -> Backend:
    """Tokenizers of `spm` in each of the forms that models have."""
    made = spm_backend(form in ("always", "never"))
    if form == "never":  # Gemma's
        made.normalizer = normalizers.Replace(" ", MARK)
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence(steps)
    made.add_tokens([AddedToken("<turn>", normalized=False)])
    return made


SPM_TEXTS = ["the cat sat", " the  mat:\nsat é", "<s>the<turn> cat</s>", "\n", "  ", "", "the\x00"]


@pytest.mark.parametrize("by", ["tokenizer.json", "scores"])
@pytest.mark.parametrize("form", ["always", "first", "never"])
def test_a_sentencepiece_tokenizer_comes_back(form, by):
    theirs = Tokenizer(spm(form), eos_token_id=2, bos_token_id=1)
    written = theirs.to_gguf(theirs.vocab_size + 2)
    assert written["tokenizer.ggml.model"] == "llama"
    assert written["tokenizer.ggml.add_space_prefix"] is (form != "never")
    assert written["tokenizer.ggml.unknown_token_id"] == 0
    types = written["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[-3:] == [4, 5, 5]
    if by == "scores":  # as in other programs' files
        written.pop(WHOLE, None)
    ours = Tokenizer.from_gguf(written, "m.gguf")
    for text in SPM_TEXTS:
        if form == "first" and by == "scores" and text.startswith((" ", "<s>")):
            continue  # GGUF's keys have no such form
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)


def test_what_gguf_s_keys_cannot_say_stands_in_a_tokenizer_json():
    """Phi-3's turns take the spaces behind them; most tokenizers need nothing of the kind."""
    plain = Tokenizer.from_gguf(gguf_metadata("qwen2"))
    assert WHOLE not in plain.to_gguf(300)
    plain.backend.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False)])
    written = plain.to_gguf(300)
    ours, text = Tokenizer.from_gguf(written), "a<|user|>  the"
    assert ours.encode(text) == plain.encode(text) == ours.encode("a<|user|>the")
    del written[WHOLE]
    assert Tokenizer.from_gguf(written).encode(text) != plain.encode(text)
    with pytest.raises(UserError, match="m.gguf: its tokenizer is damaged"):
        Tokenizer.from_gguf({**written, WHOLE: "{}"}, "m.gguf")


def test_phi_3_s_special_tokens_take_the_spaces_behind_them():
    """GGUF cannot say so; llama.cpp, and jlora, go by the model's name."""
    written = Tokenizer(spm("always"), eos_token_id=2, bos_token_id=1).to_gguf(300)
    written.pop(WHOLE, None)
    other = Tokenizer.from_gguf(written)
    phi3 = Tokenizer.from_gguf({**written, "general.name": "Phi-3-mini"})
    for text, same in (("<turn>\n the", "<turn>the"), ("</s>  the", "</s>the")):
        assert phi3.encode(text) == phi3.encode(same) == other.encode(same) != other.encode(text)
    assert phi3.encode("<s>\nthe") == other.encode("<s>\nthe")


def test_merges_are_those_of_sentencepiece():
    """The pair of the highest score first, however it is made."""
    pieces = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -3.0, "bc": -1.0, "abc": -2.0, "</s>": 0.0}
    types = [1] * 6 + [3]
    assert merges(list(pieces), types, list(pieces.values())) == [
        ("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="7 tokens, 6 scores"):
        merges(list(pieces), types, [0.0] * 6)


def greedy(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by its definition: join the best neighbours, the leftmost of equals."""
    parts = list(text)
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        known = [(score, place) for score, place in pairs if score is not None]
        if not known:
            return parts
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ids_by_scores_are_sentencepiece_s_own(data):
    """Every token of several letters is the union of two others, as the training makes it."""
    letters = list("abcd")
    pieces = list(letters)
    for _ in range(data.draw(st.integers(1, 12))):
        piece = data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces))
        if piece not in pieces and len(piece) < 9:
            pieces.append(piece)
    scores = [-1000.0] * 4 + [-float(rank) for rank in range(len(pieces) - 4)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * len(pieces),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    text = data.draw(st.text("abcd", max_size=30))
    found = [pieces[index] for index in tokenizer.encode(text)]
    assert found == greedy(text, dict(zip(pieces[4:], scores[4:])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "300 tokens, 1 scores"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "2 tokens, 300 scores"),
    ],
)
def test_a_damaged_sentencepiece_tokenizer_is_one_line(change, message):
    written = Tokenizer(spm("always"), eos_token_id=2, bos_token_id=1).to_gguf(300)
    written.pop(WHOLE, None)
    with pytest.raises(UserError, match=f"m.gguf: its tokenizer is damaged.*{message}"):
        Tokenizer.from_gguf({**written, **change}, "m.gguf")


def test_a_form_that_gguf_cannot_say_is_refused():
    """Metaspace that adds a space to every text, but not where there is one."""
    made = spm("always")
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(MARK, prepend_scheme="always", split=False)
    with pytest.raises(UserError, match="no SentencePiece BPE"):
        Tokenizer(made).to_gguf(300)
