from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import MERGES, VOCAB

from jlora.data.batches import (
    NO_SEPARATOR,
    BatchOrder,
    Example,
    TokenExample,
    check_vocabulary,
    collate,
    encode_example,
    encode_examples,
    encode_prompts,
    epoch_batches,
)
from jlora.data.readers import csv_rows, json_document, json_lines, string_field, text_lines
from jlora.data.tasks.boolq import TEMPLATES, split_template
from jlora.data.tokenizer import Tokenizer, byte_level_bpe
from jlora.system.errors import UserError

END = 999


class ToyTokenizer:
    """One token a character: its code point."""

    eos_token_id = END
    vocab_size = 1000

    def encode_batch(self, texts):
        return [[ord(character) for character in text] for text in texts]


TOKENIZER = ToyTokenizer()


def codes(text):
    return [ord(character) for character in text]


# Layout ----------------------------------------------------------------------------------------


def test_layout_of_one_example():
    example = encode_example(Example("ab", "xy"), TOKENIZER)
    assert example.ids == [*codes("ab"), END, *codes(" xy"), END]
    assert example.prompt_length == 3
    assert example.input_length == 6
    batch = collate([example], pad_id=0)
    assert batch.input_ids.tolist() == [[*codes("ab"), END, *codes(" xy")]]
    assert batch.targets.tolist() == [[codes("b")[0], END, *codes(" xy"), END]]
    #                                    b    sep  " "  x    y    end
    assert batch.mask.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]
    assert batch.lengths.tolist() == [6]


def test_separator_and_end_can_be_set():
    example = encode_example(Example("ab", "x"), TOKENIZER, separator_id=7, end_id=8)
    assert example.ids == [*codes("ab"), 7, *codes(" x"), 8]
    # 0 is an id like any other, not "unset".
    assert encode_example(Example("a", "x"), TOKENIZER, separator_id=0, end_id=0).ids[-1] == 0


def test_no_separator():
    example = encode_example(Example("ab", "x"), TOKENIZER, separator_id=NO_SEPARATOR)
    assert example.ids == [*codes("ab x"), END] and example.prompt_length == 2
    assert collate([example], pad_id=0).mask.tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert encode_prompts(["ab"], TOKENIZER, separator_id=NO_SEPARATOR) == [codes("ab")]
    with pytest.raises(UserError, match="no prompt and no separator"):
        encode_example(Example("", "x"), TOKENIZER, separator_id=NO_SEPARATOR)


def reference_row(context, completion, max_length):
    """microsoft/LoRA's FT_Dataset for clm; context and completion include their end tokens."""
    ids = context + completion
    mask = [0.0] * (len(context) - 1) + [1.0] * (len(ids) - len(context))
    padded_ids = ids + [0] * (max_length - len(ids))
    padded_targets = ids[1:] + [0] * (max_length - len(ids) + 1)
    return padded_ids, padded_targets, mask + [0.0] * (max_length - len(mask))


def test_collated_rows_equal_the_reference_code_up_to_padding():
    texts = [Example("name : A", "A is a pub ."), Example("n", "b"), Example("longer " * 4, "c d")]
    encoded = encode_examples(texts, TOKENIZER)
    batch = collate(encoded, pad_id=0)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.lengths.dtype == np.int32
    assert batch.mask.dtype == np.float32
    assert batch.input_ids.shape[1] == max(each.input_length for each in encoded)
    for row, text in enumerate(texts):
        context = [*codes(text.prompt), END]
        completion = [*codes(" " + text.completion), END]
        ids, targets, mask = reference_row(context, completion, 64)
        length = batch.lengths[row]
        assert batch.input_ids[row, :length].tolist() == ids[:length]
        counted = np.flatnonzero(batch.mask[row])
        assert counted.tolist() == np.flatnonzero(mask).tolist()
        assert batch.targets[row, counted].tolist() == [targets[t] for t in counted]
        assert batch.mask[row].sum() == len(completion)
        assert not batch.input_ids[row, length:].any()


def test_the_reference_runs_own_examples(shared_data):
    lines = (shared_data / "reference/microsoft_lora/train.jsonl").read_text().splitlines()
    for line in lines[:20]:
        row = json.loads(line)
        example = TokenExample(row["context"] + row["completion"], len(row["context"]))
        batch = collate([example], pad_id=0)
        _, targets, mask = reference_row(row["context"], row["completion"], batch.mask.shape[1])
        assert batch.mask[0].tolist() == mask[: batch.mask.shape[1]]
        assert batch.targets[0].tolist() == targets[: batch.mask.shape[1]]


def test_a_long_example_loses_the_end_of_its_prompt_only():
    example = encode_example(Example("abcdef", "xy"), TOKENIZER, max_length=7)
    assert example.ids == [*codes("abc"), END, *codes(" xy"), END]
    assert (example.prompt_length, example.cut, example.input_length) == (4, 3, 7)
    assert encode_example(Example("abcdef", "xy"), TOKENIZER, max_length=10).cut == 0
    assert encode_example(Example("abcdef", "xy"), TOKENIZER, max_length=9).cut == 1


def test_a_completion_that_leaves_no_room_is_an_error():
    examples = [Example("ab", "x"), Example("abcdef", "a long answer")]
    with pytest.raises(UserError, match=r"example 2 \('a long answer'\).*max_length 15"):
        encode_examples(examples, TOKENIZER, max_length=15)
    assert encode_examples(examples, TOKENIZER, max_length=16)[1].ids[:2] == [ord("a"), END]
    # With no prompt there is nothing to make room for.
    assert encode_example(Example("", "xy"), TOKENIZER, max_length=4).cut == 0


# A prompt's kept end ---------------------------------------------------------------------------


def test_a_kept_end_outlives_cutting():
    example = Example("passage question?", "yes", keep=10)
    whole = encode_example(example, TOKENIZER, max_length=22)
    assert (whole.ids[: whole.prompt_length], whole.cut) == ([*codes(example.prompt), END], 0)
    for length, front in ((21, "passag"), (20, "passa"), (16, "p"), (15, "")):
        cut = encode_example(example, TOKENIZER, max_length=length)
        kept = [*codes(front + " question?"), END]
        assert cut.ids == [*kept, *codes(" yes"), END]
        assert (cut.input_length, cut.cut) == (length, 7 - len(front))
    with pytest.raises(
        UserError, match=r"prompt 1: its end \('question\?'\).*10 tokens, and 9 fit"
    ):
        encode_example(example, TOKENIZER, max_length=14)
    # All of it must stay.
    with pytest.raises(UserError, match="17 tokens, and 16 fit"):
        encode_example(Example("passage question?", "yes", keep=17), TOKENIZER, max_length=21)


def test_max_prompt_cuts_in_training_as_in_generation():
    examples = [Example("passage q?", "yes", keep=3), Example("short q?", "no", keep=3)]
    trained = encode_examples(examples, TOKENIZER, max_prompt=8)
    assert [each.ids[: each.prompt_length] for each in trained] == [
        [*codes("passa q?"), END], [*codes("short q?"), END]
    ]  # fmt: skip
    assert [each.cut for each in trained] == [2, 0]
    prompts, keeps = [each.prompt for each in examples], [each.keep for each in examples]
    answered = encode_prompts(prompts, TOKENIZER, max_prompt=8, keeps=keeps)
    assert answered == [each.ids[: each.prompt_length] for each in trained]
    # The smaller of the two limits counts.
    assert encode_prompts(prompts, TOKENIZER, 8, max_prompt=9, keeps=keeps)[0] == [
        *codes("pass q?"), END
    ]  # fmt: skip
    assert encode_prompts(prompts, TOKENIZER, 99, max_prompt=8, keeps=keeps) == answered
    assert encode_example(examples[0], TOKENIZER, 10, max_prompt=8).ids[:6] == [
        *codes("pa q?"),
        END,
    ]
    # Without a kept end: training cuts the prompt's end, generation refuses.
    assert encode_example(Example("abcdef", "x"), TOKENIZER, max_prompt=4).ids[:5] == [
        *codes("abcd"), END
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"prompt 1 .* 5 fit .*raise data\.max_prompt"):
        encode_prompts(["abcdef"], TOKENIZER, max_prompt=4)
    with pytest.raises(UserError, match=r"prompt 2 .*'passage q\?'.* has 11 tokens.* 9 fit"):
        encode_prompts(["short q?", "passage q?"], TOKENIZER, 9, max_prompt=9, keeps=[3, 0])
    with pytest.raises(UserError, match="prompt 1: its end .*3 tokens, and 2 fit"):
        encode_prompts(["passage q?"], TOKENIZER, max_prompt=2, keeps=[3])
    for call in (encode_examples, encode_prompts):
        with pytest.raises(UserError, match="max_prompt must be at least 1"):
            call([], TOKENIZER, max_prompt=0)


passages = st.text(alphabet=st.sampled_from("the a12.,'s!?()-éß日\t\n"), min_size=1, max_size=30)


@pytest.mark.parametrize("kind", ["gpt2", "smollm"])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
@settings(max_examples=100, deadline=None)
@given(passage=passages, question=passages)
def test_a_kept_end_has_the_tokens_that_it_has_in_the_whole(kind, template, passage, question):
    """From its question on, a cut prompt has the same tokens as the whole one."""
    tokenizer = Tokenizer(byte_level_bpe(VOCAB, MERGES, kind, ["<|endoftext|>"]), VOCAB["!"])
    front, end = split_template(TEMPLATES[template])
    front, end = front.format(passage=passage), end.format(question=question.strip() or "is it")
    apart = [*tokenizer.encode(front), *tokenizer.encode(end)]
    assert tokenizer.encode(front + end) == apart
    room = len(apart) - 1
    kept = len(tokenizer.encode(end))
    if room >= kept:
        (cut,) = encode_prompts([front + end], tokenizer, max_prompt=room, keeps=[len(end)])
        assert cut == [*apart[: room - kept], *apart[len(apart) - kept :], VOCAB["!"]]


def test_a_tokenizer_without_end_token():
    class Endless(ToyTokenizer):
        eos_token_id = None

    with pytest.raises(UserError, match="set separator_id"):
        encode_example(Example("a", "b"), Endless())
    with pytest.raises(UserError, match="set end_id"):
        encode_example(Example("a", "b"), Endless(), separator_id=1)
    assert encode_example(Example("a", "b"), Endless(), separator_id=1, end_id=2).ids[-1] == 2


def test_prompts_for_generation_are_the_training_prompts():
    examples = [Example("ab", "x"), Example("abc", "y")]
    trained = encode_examples(examples, TOKENIZER)
    prompts = encode_prompts([each.prompt for each in examples], TOKENIZER)
    assert prompts == [each.ids[: each.prompt_length] for each in trained]
    with pytest.raises(UserError, match=r"prompt 2 \('abc'\) has 4 tokens.* 3 fit"):
        encode_prompts(["ab", "abc"], TOKENIZER, max_length=3)


def test_ids_outside_the_models_vocabulary():
    examples = encode_examples([Example("ab", "x")], TOKENIZER)
    check_vocabulary(examples, 1000)
    with pytest.raises(UserError, match="example 1 has token id 999, .*vocabulary has 999"):
        check_vocabulary(examples, 999)
    with pytest.raises(UserError, match="token id -1"):
        check_vocabulary([TokenExample([1, -1], 1)], 999)


# Order -----------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(
    lengths=sizes,
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
    grouped=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_example_stands_in_one_batch(lengths, batch_size, seed, epoch, grouped, shuffle):
    batches = epoch_batches(lengths, batch_size, seed, epoch, grouped, shuffle)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    # All but one batch are full, and the short one has what remains.
    short = [len(batch) for batch in batches if len(batch) != batch_size]
    assert short == [len(lengths) % batch_size] * bool(len(lengths) % batch_size)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch, grouped, shuffle)


def test_order_depends_on_seed_and_epoch():
    lengths = list(np.random.default_rng(0).integers(5, 80, 500))
    first = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert first != epoch_batches(lengths, 8, seed=2, epoch=0)
    assert first != epoch_batches(lengths, 8, seed=1, epoch=1)
    # (1, 0) and (0, 1) are different streams.
    assert epoch_batches(lengths, 8, seed=0, epoch=1) != first


def test_grouping_saves_padding_and_stays_shuffled():
    lengths = np.random.default_rng(0).integers(5, 80, 2000)

    def padded(batches):
        return sum(len(batch) * max(lengths[batch]) for batch in batches) / lengths.sum()

    grouped = epoch_batches(lengths, 16, seed=0, epoch=0)
    assert padded(grouped) < 1.06
    assert padded(epoch_batches(lengths, 16, 0, 0, group_by_length=False)) > 1.5
    means = [lengths[batch].mean() for batch in grouped]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_unshuffled_order_is_the_files():
    assert epoch_batches([9, 1, 5, 2, 7], 2, 0, 3, shuffle=False) == [[0, 1], [2, 3], [4]]


def test_a_resumed_order_continues_as_if_never_stopped():
    lengths = list(range(1, 38))
    whole = BatchOrder(lengths, 4, seed=5)
    assert whole.per_epoch == 10
    batches = [whole.batch(step) for step in range(35)]
    for start in (0, 9, 10, 23):
        resumed = BatchOrder(lengths, 4, seed=5)
        assert [resumed.batch(step) for step in range(start, 35)] == batches[start:]
    for epoch in range(3):
        rows = [row for batch in batches[10 * epoch : 10 * epoch + 10] for row in batch]
        assert sorted(rows) == list(range(37))
    assert batches[:10] != batches[10:20]
    assert whole.batch(0) == batches[0]


@pytest.mark.parametrize(
    ("lengths", "batch_size", "seed", "message"),
    [([], 2, 0, "no examples"), ([1], 0, 0, "batch size 0"), ([1], 1, -1, "seed -1")],
)
def test_bad_order_settings(lengths, batch_size, seed, message):
    with pytest.raises(UserError, match=message):
        BatchOrder(lengths, batch_size, seed)


# Readers ---------------------------------------------------------------------------------------


def write(tmp_path, content, name="data.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_lines_end_at_newlines_only_and_keep_their_numbers(tmp_path):
    path = write(tmp_path, "\ufeffone\r\n\n \ntwo\u2028three\x0bfour\n")
    assert list(text_lines(path)) == [(1, "one"), (4, "two\u2028three\x0bfour")]


@pytest.mark.parametrize(
    "content", [b"", b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\n\xef\xbb\xbf"]
)
def test_empty_files(tmp_path, content):
    with pytest.raises(UserError, match=r"data.txt: the file is empty"):
        list(text_lines(write(tmp_path, content)))
    with pytest.raises(UserError, match=r"data.txt: the file is empty"):
        list(csv_rows(tmp_path / "data.txt", ("mr",)))


def test_broken_utf8_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"data.txt:2: not UTF-8"):
        list(text_lines(write(tmp_path, b"fine\nCaf\xe9\n")))


def test_a_folder_or_nothing_instead_of_a_file(tmp_path):
    with pytest.raises(UserError, match="give a file, not a folder"):
        list(text_lines(tmp_path))
    with pytest.raises(UserError, match="check the path"):
        list(text_lines(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', r":2: not JSON \(Expecting"),
        ("[1, 2]", r":2: a JSON list, not an object"),
        ("null", r":2: a JSON null"),
        ("[" * 100_000, r":2: not JSON"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        list(json_lines(write(tmp_path, '{"a": 0}\n' + line + "\n")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.txt: the file is empty"),
        ('{"a":\n 1,}', "data.txt:2: not JSON"),
        ("1\n2", "data.txt:2: not JSON"),
        ("[" * 100_000, "data.txt: not JSON"),
    ],
)
def test_bad_json_documents(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        json_document(write(tmp_path, content))
    assert json_document(write(tmp_path, '\ufeff {"a":\n [1]}\n')) == {"a": [1]}


def test_string_field():
    assert string_field({"a": "é"}, "a", "f", 3) == "é"
    with pytest.raises(UserError, match=r"f:3: no key 'a' \(found: b, c\)"):
        string_field({"b": 1, "c": 2}, "a", "f", 3)
    with pytest.raises(UserError, match="f:3: 'a' is a number, not a string"):
        string_field({"a": 1}, "a", "f", 3)
    with pytest.raises(UserError, match="f:3: 'a' holds half of a surrogate pair"):
        string_field(json.loads('{"a": "x\\ud800"}'), "a", "f", 3)


def test_csv_rows_count_lines_through_quoted_line_ends(tmp_path):
    path = write(tmp_path, '\ufeffid, mr,ref\r\n\r\n1,"a, ""b""","two\r\nlines"\r\n2,c,d\r\n')
    assert list(csv_rows(path, ("mr", "ref"))) == [(3, ['a, "b"', "two\r\nlines"]), (5, ["c", "d"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r":1: no column mr or ref in the header \(a, b\)"),
        ("mr,b\n1,2\n", r":1: no column ref in"),
        ('"a\nb",c\n1,2\n', r"in the header \(a b, c\)"),
        ("mr,ref\n1,2\n1,2,3\n", r":3: 3 fields, and the header has 2"),
        ("mr,ref\n1\n", r":2: 1 fields"),
        ('mr,ref\n1,2\n1,"never closed\n\n', r":3: broken CSV"),
        ('mr,ref\n1,"a"b\n', r":2: broken CSV"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        list(csv_rows(write(tmp_path, content), ("mr", "ref")))
