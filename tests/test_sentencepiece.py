"""Tokenizers of SentencePiece's kind: a completion has the ids that the whole text has there."""

from __future__ import annotations

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from spm import TOKENS, backend
from test_tokenizer import TEXTS, gguf_metadata
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jlora.data.batches import NO_SEPARATOR, Example, encode_example, encode_prompts
from jlora.data.tokenizer import Tokenizer

FORMS = {"legacy": Tokenizer(backend(True), 2, 1), "metaspace": Tokenizer(backend(False), 2, 1)}
# transformers 5.23 (LlamaTokenizer and PreTrainedTokenizerFast, both forms) for the whole texts.
WHOLE = {
    ("the mat", "cat"): "▁the ▁ m at ▁cat",
    ("the mat", " cat"): "▁the ▁ m at ▁▁ cat",
    ("the mat:\nsat", "cat"): "▁the ▁ m at : <0x0A> s at ▁cat",
}


def words(ids: list[int]) -> list[str]:
    return [TOKENS[index] for index in ids]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("texts", "expected"), WHOLE.items())
def test_prompt_and_completion_have_the_ids_of_the_whole_text(form, texts, expected):
    tokenizer = FORMS[form]
    whole = encode_example(Example(*texts), tokenizer, separator_id=NO_SEPARATOR)
    assert words(whole.ids) == [*expected.split(" "), "</s>"]
    assert whole.ids[:-1] == tokenizer.encode(" ".join(texts))
    # As transformers has "the mat</s> cat" in the newer form, and "the mat</s>cat" in the older.
    parted = encode_example(Example(*texts), tokenizer)
    start = whole.prompt_length
    assert parted.ids == [*whole.ids[:start], 2, *whole.ids[start:]]
    assert encode_prompts([texts[0]], tokenizer) == [parted.ids[: parted.prompt_length]]


@pytest.mark.parametrize("form", FORMS)
def test_what_must_stay_of_a_prompt_gets_no_space_of_its_own(form):
    example = Example("the cat sat the mat:\nsat", "cat", keep=len(":\nsat"))
    cut = encode_example(example, FORMS[form], max_prompt=6, separator_id=NO_SEPARATOR)
    assert words(cut.ids) == "▁the ▁cat : <0x0A> s at ▁cat </s>".split(" ")


@given(st.sampled_from(sorted(FORMS)), st.lists(st.sampled_from("cat sat the mat:\n|é".split(" "))))
def test_the_parts_make_the_whole(form, parts):
    tokenizer, prompt = FORMS[form], "the " + " ".join(parts)
    for completion in ("cat", "mat é", "", " cat"):
        (after,) = tokenizer.encode_after([" " + completion])
        if prompt.strip() == prompt:  # else the two spaces between them are one token
            assert tokenizer.encode(prompt) + after == tokenizer.encode(prompt + " " + completion)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama3", "qwen2"])
def test_byte_level_tokenizers_encode_a_completion_as_ever(pre):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre))
    texts = [*TEXTS, *(" " + text for text in TEXTS)]
    assert tokenizer.encode_after(texts) == tokenizer.encode_batch(texts)
    trained = Tokenizer(tiny.train_tokenizer(), 0)
    assert trained.encode_after(texts) == trained.encode_batch(texts)


def test_a_tokenizer_that_refuses_unknown_words_encodes_what_it_knows():
    tokenizer = Tokenizer(Backend(models.WordLevel({"cat": 0}, unk_token=None)))
    assert tokenizer.encode_after(["cat"]) == [[0]]
