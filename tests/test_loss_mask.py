"""Which tokens of a conversation are trained. `tests/test_parity.py` compares masks with TRL's."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jlora.data.batches import TokenExample, collate, stream
from jlora.data.chat_examples import MaskSettings, encode_conversations
from jlora.data.chat_template import ChatTemplate, find_template
from jlora.data.conversations import Conversation
from jlora.data.loss_mask import answer_spans
from jlora.data.spans import encode_spans, fit
from jlora.data.tokenizer import Tokenizer
from jlora.system.errors import UserError

CHATML = find_template(None, "chatml")
WORDS = ["What is 2 + 2? It is 4.", "And 3 + 3? 6, said she.", "### Response:\n", "user assistant"]


def tokenizer_of(**changes) -> Tokenizer:
    """Byte-level BPE with ChatML's marks as tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return Tokenizer(backend, **{"eos_token_id": 1, "bos_token_id": 0, **changes})


def begins() -> Tokenizer:
    """One whose files put the begin token before every text."""
    tokenizer = tokenizer_of()
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


TOKENIZER = tokenizer_of()


def say(*contents: str, system: str | None = None, **more) -> Conversation:
    """A conversation, the user first; every answer is trained."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for number, content in enumerate(contents):
        if number % 2:
            answers.append(len(messages))
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return Conversation("d.jsonl:7", messages, answers, **more)


def trained(example: TokenExample, tokenizer: Tokenizer = TOKENIZER) -> list[str]:
    return [
        tokenizer.decode(example.ids[start:end], skip_special_tokens=False)
        for start, end in example.trained
    ]


def encode(*rows: Conversation, template=CHATML, longest=1000, tokenizer=TOKENIZER, **settings):
    return encode_conversations(rows, tokenizer, template, longest, MaskSettings(**settings))


FOUR = say("What is 2 + 2?", "It is 4.", "And 3 + 3?", "6")


def test_all_answers_with_their_ends():
    (example,) = encode(FOUR).examples
    assert trained(example) == ["It is 4.<|im_end|>\n", "6<|im_end|>\n"]
    text = CHATML.render(FOUR.messages)
    assert example.ids == TOKENIZER.encode(text) and example.prompt_length == example.spans[0][0]
    assert example.target_count == sum(end - start for start, end in example.trained)


def test_prompt_and_answer_are_the_tokens_of_the_whole():
    (example,) = encode(say("What is 2 + 2?", "It is 4.")).examples
    prompt = CHATML.render(FOUR.messages[:1], add_generation_prompt=True)
    assert example.ids[: example.prompt_length] == TOKENIZER.encode(prompt)
    answer = TOKENIZER.encode_after(["It is 4.<|im_end|>\n"])[0]
    assert example.ids[example.prompt_length :] == answer and example.spans == ()


def test_last_and_each():
    (example,) = encode(FOUR, train_on="last").examples
    assert trained(example) == ["6<|im_end|>\n"]
    first, second = encode(FOUR, train_on="each").examples
    assert trained(first) == ["It is 4.<|im_end|>\n"] and trained(second) == ["6<|im_end|>\n"]
    assert second.ids[: len(first.ids)] == first.ids and len(first.ids) < len(second.ids)


def test_every_token():
    (example,) = encode(FOUR, mask_prompt=False).examples
    assert example.target_count == example.input_length and example.prompt_length == 1


def test_messages_that_are_not_to_be_learned():
    (example,) = encode(replace(FOUR, answers=[3])).examples
    assert trained(example) == ["6<|im_end|>\n"]
    (example,) = encode(say("What?", "4", "a question without an answer")).examples
    assert trained(example) == ["4<|im_end|>\n"]


def test_batches_have_the_mask():
    (example,) = encode(FOUR).examples
    wanted = [0.0] * example.input_length
    for start, end in example.spans:
        wanted[start - 1 : end - 1] = [1.0] * (end - start)
    assert example.mask().tolist() == wanted
    shorter = TokenExample([1, 2, 3, 4], 2)
    assert stream([example, shorter]).mask[0].tolist() == [*wanted, 0, 1, 1]
    padded = collate([example, shorter], 0).mask
    assert padded[0].tolist() == wanted and padded[1].tolist()[:4] == [0, 1, 1, 0]


# Templates that need care ------------------------------------------------------------------------

#: As Qwen3's: an empty block before the last answer only; as asked for in the prompt.
THINKS = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
def test_an_empty_thinking_block_belongs_to_the_prompt(arguments):
    template = replace(THINKS, arguments=arguments)
    (example,) = encode(say("What?", "4"), template=template).examples
    assert trained(example) == ["4<|im_end|>\n"]
    prompt = template.render(FOUR.messages[:1], add_generation_prompt=True)
    assert ("<think>" in prompt) == bool(arguments)


def test_a_block_that_the_generation_prompt_begins():
    (example,) = encode(say("What?", "4"), template=find_template(None, "deepseek-r1")).examples
    assert trained(example) == ["4"]


def test_thoughts_are_trained():
    row = say("What?", "4")
    row = replace(row, messages=[row.messages[0], {**row.messages[1], "reasoning_content": "so"}])
    (example,) = encode(row, template=THINKS).examples
    assert trained(example) == ["<think>\nso\n</think>\n\n4<|im_end|>\n"]


def test_earlier_answers_that_are_written_otherwise():
    message = "d.jsonl:7: message 2 .assistant.: the template writes it as the last message as .*; "
    with pytest.raises(UserError, match=message + "set data.train_on to each .* or last, or"):
        encode(FOUR, template=THINKS)
    assert trained(encode(FOUR, template=THINKS, train_on="last").examples[0]) == ["6<|im_end|>\n"]
    each = encode(FOUR, template=THINKS, train_on="each").examples
    assert [trained(example) for example in each] == [["It is 4.<|im_end|>\n"], ["6<|im_end|>\n"]]


def test_a_generation_prompt_that_the_answer_lacks():
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    template = ChatTemplate(source + "{% if add_generation_prompt %}[assistant]<think>{% endif %}")
    with pytest.raises(UserError, match="d.jsonl:7: message 2 .*the generation prompt before it"):
        encode(say("a", "b"), template=template)


def test_no_generation_prompt():
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template = ChatTemplate(f"{{% for m in messages %}}{turn}{{% endfor %}}", name="mine")
    message = (
        "d.jsonl:7: mine has no generation prompt: it writes .*im_start.*assistant' before an "
        "answer .* `{% if add_generation_prom"
    )
    with pytest.raises(UserError, match=message):
        encode(say("a", "b"), template=template)
    # Mistral's needs none.
    template = replace(find_template(None, "mistral"), tokens={"eos_token": "</s>"})
    (example,) = encode(say("a", "b"), template=template).examples
    assert trained(example) == [" b</s>"]


def test_an_end_token_behind_the_conversation():
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    (example,) = encode(FOUR, template=ChatTemplate(source, {"eos_token": "</s>"})).examples
    assert trained(example) == ["It is 4.;", "6;</s>"]


def test_the_assistant_first():
    row = Conversation(
        "d.jsonl:7", [{"role": "assistant", "content": "Hello"}, *FOUR.messages[:2]], [0, 2]
    )
    (example,) = encode(row).examples
    assert trained(example)[0] == "Hello<|im_end|>\n"
    strict = ChatTemplate("{{ messages[0]['role'] + '' }}")
    with pytest.raises(UserError, match="d.jsonl:7: the conversation begins with the assistant"):
        encode(row, template=strict)


def test_what_a_template_refuses_names_the_line():
    row = Conversation("d.jsonl:7", [{"role": "tool", "content": "x"}, *FOUR.messages[:2]], [2])
    with pytest.raises(UserError, match="^d.jsonl:7: chat template alpaca refuses this: alpaca"):
        encode(row, template=find_template(None, "alpaca"))


def test_an_answer_that_the_template_leaves_out():
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for source in (users, ""):
        with pytest.raises(UserError, match="d.jsonl:7: trains no token"):
            encode(say("a", "b"), template=ChatTemplate(source))


def test_what_is_said_once(capsys):
    template = ChatTemplate(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}<|x|>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant<|x|>{% endif %}",
        name="mine",
    )
    encode(*[say("a", "b", system="S", tools=[{"name": "f"}])] * 2, template=template)
    said = capsys.readouterr().err
    assert said.count("mine leaves out or changes the content of 2 messages of role system") == 1
    assert said.count("mine does not read tools, which some examples have") == 1
    assert said.count("writes <|x|>, which is no token of this model but") == 1
    encode(FOUR)
    assert capsys.readouterr().err == ""


def test_no_template():
    with pytest.raises(UserError, match="d.jsonl:7: a conversation, and the model has no chat templ"
                       "ate; choose one with --chat-template: alpaca, chatml"):  # fmt: skip
        encode(FOUR, template=None)
    (example,) = encode(say("a", " b ", is_pair=True), template=None).examples
    assert trained(example) == [" b</s>"] and example.ids[:2] == [*TOKENIZER.encode("a"), 1]
    (example,) = encode(say("a", "b", is_pair=True), template=None, mask_prompt=False).examples
    assert example.target_count == example.input_length


# Tokens ------------------------------------------------------------------------------------------


def test_a_token_on_both_sides_of_an_edge_is_counted():
    """`` is`` is one token, and the prompt alone ends with a space."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = encode(say("What?", "is 4"), say("a", "\u00e9"), template=template)
    first, second = found.examples
    assert trained(second) == ["\u00e9\n"]
    assert trained(first) == [" is 4\n"] and found.joined == 1
    assert first.ids == TOKENIZER.encode(template.render(say("What?", "is 4").messages))
    assert encode(FOUR).joined == 0


def test_spans_of_many_texts():
    texts, spans = ["ab cd", "", "is é is"], [[(0, 5)], [], [(3, 4)]]
    ids, found, joined = encode_spans(TOKENIZER, texts, spans)
    assert ids == TOKENIZER.encode_batch(texts)
    assert found[0] == [(1, len(ids[0]))] and found[1] == []
    (start, end) = found[2][0]
    assert TOKENIZER.decode(ids[2][start:end]).strip() == "é"
    assert joined == [False] * 3


# Too long ----------------------------------------------------------------------------------------


def test_the_beginning_is_cut_and_answers_stay_whole():
    whole = encode(FOUR).examples[0]
    (first, second), size = whole.spans, whole.input_length
    assert fit(whole.ids, whole.spans, size).cut == 0
    room = size - first[0] + 1  # the first answer and a token before it
    cut = fit(whole.ids, whole.spans, room)
    assert trained(cut) == trained(whole) and cut.cut == size - room and cut.input_length == room
    cut = fit(whole.ids, whole.spans, room - 1)
    assert trained(cut) == trained(whole)[1:] and cut.input_length == room - 1
    assert trained(fit(whole.ids, whole.spans, second[1] - second[0])) == trained(whole)[1:]
    assert fit(whole.ids, whole.spans, second[1] - second[0] - 1) is None
    assert fit(whole.ids, whole.spans, size - 1, "drop") is None


def test_the_begin_token_stays():
    cut = fit([0, *range(5, 15)], [(8, 11)], 6, begin=[0])
    assert cut == TokenExample([0, 9, 10, 11, 12, 13, 14], 4, 4)
    assert fit([0, *range(5, 15)], [(2, 4)], 6, begin=[0]) == TokenExample([0, 5, 6, 7], 2, 0)


def test_what_follows_the_last_answer_goes_first():
    cut = fit(list(range(20)), [(3, 6)], 8)
    assert cut == TokenExample([0, 1, 2, 3, 4, 5], 3)


def test_what_does_not_fit_is_counted_or_refused():
    long = say("a", "It is 4. " * 30)
    found = encode(long, say("a", "b"), longest=40)
    assert (len(found.examples), found.dropped) == (1, 1)
    with pytest.raises(UserError, match="none of 1 examples fits into 40 tokens .* train.max_leng"):
        encode(long, longest=40)
    found = encode(
        replace(long, is_pair=True), say("a", "b", is_pair=True), template=None, longest=40
    )
    assert ([trained(example) for example in found.examples], found.dropped) == ([[" b</s>"]], 1)


def test_long_pairs_without_a_template_are_dropped_where_that_is_asked_for():
    long, short = say("a " * 60, "b", is_pair=True), say("a", "b", is_pair=True)
    cut = encode(long, short, template=None, longest=20)
    assert (sum(each.cut > 0 for each in cut.examples), cut.dropped) == (1, 0)
    found = encode(long, short, template=None, longest=20, too_long="drop")
    assert ([each.cut for each in found.examples], found.dropped) == ([0], 1)


def test_where_everything_is_trained_the_end_stays():
    (whole,) = encode(FOUR, mask_prompt=False).examples
    (cut,) = encode(FOUR, mask_prompt=False, longest=20).examples
    assert cut == TokenExample(whole.ids[-21:], 1, len(whole.ids) - 21)
    with pytest.raises(UserError, match="none of 1 examples fits"):
        encode(FOUR, mask_prompt=False, longest=20, too_long="drop")


def test_the_begin_token_stays_where_everything_is_trained():
    template = replace(CHATML, source="<s>" + CHATML.source)
    settings = {"template": template, "tokenizer": begins(), "mask_prompt": False}
    (whole,) = encode(FOUR, **settings).examples
    (cut,) = encode(FOUR, longest=20, **settings).examples
    assert whole.ids[0] == 0 and whole.cut == 0
    assert cut == TokenExample([0, *whole.ids[-20:]], 1, len(whole.ids) - 21)


# Whole texts -------------------------------------------------------------------------------------


def text_of(text: str, place: str = "d.jsonl:1") -> Conversation:
    return Conversation(place, text=text)


def test_blocks_predict_every_token_once():
    text = "What is 2 + 2? It is 4. " * 9
    ids = [*TOKENIZER.encode(text), 1]
    blocks = encode(text_of(text), block_size=16).examples
    assert [block.input_length for block in blocks[:-1]] == [16] * (len(blocks) - 1)
    targets = [token for block in blocks for token in block.ids[1:]]
    assert targets == ids[1:] and all(block.target_count == block.input_length for block in blocks)
    assert encode(text_of(text), longest=16).examples == blocks
    two = encode(text_of("a"), text_of("b"), block_size=16).examples
    assert [block.ids for block in two] == [[*TOKENIZER.encode(each), 1] for each in "ab"]


def test_ends_and_beginnings_of_texts():
    (block,) = encode(text_of("a</s>")).examples
    assert block.ids == TOKENIZER.encode("a</s>")
    (block,) = encode(text_of("a"), end_id=3).examples
    assert block.ids[-1] == 3
    (block,) = encode(text_of("a"), tokenizer=begins()).examples
    assert block.ids == [0, *begins().encode("a"), 1]


def test_texts_have_no_prompt():
    with pytest.raises(UserError, match="d.jsonl:1: data.mask_prompt is for pairs and messages"):
        encode(text_of("a"), mask_prompt=True)
    with pytest.raises(UserError, match="d.jsonl:1: the text is one token, which trains nothing"):
        encode(text_of("</s>"))


def test_answer_spans_are_of_characters():
    text, spans = answer_spans(FOUR, CHATML)
    assert [text[start:end] for start, end in spans] == ["It is 4.<|im_end|>\n", "6<|im_end|>\n"]
