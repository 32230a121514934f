"""Talking: streamed text, a conversation's keys, what ends an answer, and the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from tiny_models import tiny_gpt2, tiny_llama
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jlora import engine
from jlora.data.chat_template import ChatTemplate
from jlora.data.end_tokens import find_ends
from jlora.data.tokenizer import Tokenizer
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.decoding.session import Session
from jlora.decoding.text_stream import TextStream, pieces, up_to_stop
from jlora.kernels import packed_linear

# Text as it comes --------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_whole_characters_and_together_the_text(seed):
    random = np.random.default_rng(seed)
    letters = ["a", "ä", "€", "🙂", "👩‍👩‍👧", "\ufffd", "\n"]
    text = "".join(random.choice(letters, 30))
    ids = list(text.encode())
    if seed % 2:  # and broken ones
        ids = [int(b) for b in random.permutation(ids)]
    found = list(pieces(ids, Bytes()))
    assert "".join(found) == Bytes().decode(ids)
    assert "" not in found
    if not seed % 2:
        assert all(set(piece) <= set(text) for piece in found)


def test_a_sentencepiece_tokenizer_keeps_its_spaces():
    """Its decoder drops the space before a text's first word, and no other."""
    from tokenizers import decoders, models

    backend = Backend(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<0xC3>": 3, "<0xA4>": 4}))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    found = list(pieces([0, 1, 2, 3, 4, 0, 0], Tokenizer(backend)))
    assert found == ["a", " b", "c", "ä", " a", " a"]


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        ((), "one two three"),
        (("two",), "one "),
        (("three!", "e two t"), "on"),
        (("three!",), "one two three"),  # its beginning was held back, and came to nothing
        (("o", "one"), ""),
    ],
)
def test_stop_texts(stops, shown):
    found = list(pieces(b"one two three", Bytes(), stops=stops))
    assert "".join(found) == shown
    stream = TextStream(Bytes(), stops)
    assert "".join([*map(stream.add, b"one two three"), stream.finish()]) == shown
    assert stream.stopped == (shown != "one two three")
    assert stream.add(97) == stream.finish() == "" if stream.stopped else True


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (("ab", "bc"), "abc", ""),
        (("abcd", "bc"), "abcd", "a"),  # the one that is complete first counts
        (("abcd", "bc"), "abce", "a"),
        (("bc", "abc"), "abc", ""),  # of two that end together the longer one
        (("aab",), "aaab", "a"),
        (("ab", "xyz"), "xyab", "xy"),
    ],
)
def test_stop_texts_that_overlap(stops, text, shown):
    assert up_to_stop(text, stops) == shown
    assert "".join(pieces(text.encode(), Bytes(), stops=stops)) == shown


class Chunks:
    """A tokenizer whose tokens are pieces of a text."""

    def __init__(self, text, places):
        self.parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]

    def decode(self, ids):
        return "".join(self.parts[index] for index in ids)


@pytest.mark.parametrize("seed", range(30))
def test_the_same_stop_text_counts_however_the_text_comes(seed):
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("abc"), 40))
    stops = ["".join(random.choice(list("abc"), random.integers(2, 6))) for _ in range(3)]
    cuts = Chunks(text, sorted(random.choice(40, 9, replace=False)))
    stream = TextStream(cuts, stops)
    shown = "".join(stream.pieces(range(len(cuts.parts))))
    assert shown == up_to_stop(text, stops)
    assert stream.ended == (shown != text)


# Keys and values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_session_answers_as_if_every_prompt_were_new(make, native, monkeypatch):
    model = make()
    if native:
        if not packed_linear.available("bf16"):
            pytest.skip("no bf16 products here")
        engine.prepare(model, "fp32")
    config = GenerateConfig((), 5)
    session, run = Session(model), []
    prompt = [3, 1, 4]
    for number, leave in enumerate((None, 2, None, 1, None)):
        (expected,) = generate(model, [prompt], config)
        found = []
        answer = session.tokens(prompt, config)
        if session._decoder is not None:
            decoder = session._decoder
            monkeypatch.setattr(decoder, "resume", _noting(decoder, run), raising=False)
        for token in answer:
            found.append(token)
            if len(found) == leave:  # as Ctrl-C or a stop text does
                break
        answer.close()
        assert found == expected.ids[:leave]
        # The next turn: all of this, or, as templates may, only the beginning of it.
        prompt = [*prompt, *found, 7, number] if number != 2 else [*prompt[:4], 9, 9]
    # Of each later prompt only what is new was run: the answer's last token and the question, ...
    assert run == [(7, 3), (11, 3), (4, 2), (6, 3)]


def _noting(decoder, run):
    resume = type(decoder).resume

    def note(kept, tokens):
        run.append((kept, len(tokens)))
        resume(decoder, kept, tokens)

    return note


def test_the_last_token_is_not_read():
    """The context may end with it: GPT-2 has no position for another."""
    model = tiny_gpt2()
    context = model.config.max_positions
    config = GenerateConfig((), context - 2)
    session = Session(model)
    assert len(list(session.tokens([1, 2, 3], config))) == context - 2
    assert session._decoder.cache.length == context


# What ends an answer -----------------------------------------------------------------------------

#: As GLM-4's: nothing stands behind an answer but the next turn.
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer(*special: str) -> Tokenizer:
    backend = tiny.train_tokenizer()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return Tokenizer(backend, eos_token_id=0)


@pytest.mark.parametrize(
    ("source", "special", "ids", "texts"),
    [
        (tiny.CHATML, ["<|im_start|>", "<|im_end|>"], (0, 401), ()),
        (tiny.CHATML, ["<|im_start|>"], (0,), ("<|im_end|>",)),
        (OPEN, ["<|user|>", "<|assistant|>"], (0, 400), ()),
        (OPEN.replace("}}{%", "}} </s>{%"), ["</s>", "<|user|>"], (0, 400), ()),
        (tiny.CHATML.replace("m.content", "m.content | upper"), ["<|im_end|>"], (0,), ()),
        ("{{ raise_exception('no') }}", [], (0,), ()),
    ],
    ids=["token", "text", "next turn", "behind a space", "answer not found", "refuses"],
)
def test_the_template_says_what_ends_an_answer(source, special, ids, texts):
    ends = find_ends(tokenizer(*special), ChatTemplate(source))
    assert (ends.ids, ends.texts) == (ids, texts)


def test_every_file_s_end_tokens_count(tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    config = {**tiny.config(400), "eos_token_id": [0, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5, 400, true, null]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    found = Tokenizer.from_folder(folder)
    assert found.eos_token_id == found.encode("!")[0]
    assert find_ends(found).ids == (found.eos_token_id, 7, 5, 0)
    metadata = found.to_gguf(400) | {"tokenizer.ggml.eot_token_id": 9}
    assert find_ends(Tokenizer.from_gguf(metadata)).ids == (found.eos_token_id, 9)
