"""From conversations to tokens, and which of them are trained.

A conversation is rendered by its chat template and becomes tokens as one text, as it will at
inference. What is trained is found by rendering beginnings of it: an answer is what the messages
up to it add to the messages before it with the generation prompt. Its end-of-turn token belongs to
it; an empty thinking block, which some templates put before an answer, belongs to the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jlora.data.batches import Example, TokenExample, encode_examples
from jlora.data.chat_template import THOUGHTS, ChatTemplate, built_in_names
from jlora.data.conversations import Conversation
from jlora.data.readers import shorten
from jlora.system.console import warn
from jlora.system.errors import UserError

NO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
OPEN_THOUGHTS = re.compile(r"<think>\s*\Z")
#: What looks like a special token in a template's text.
MARK = re.compile(r"<[|｜][^<>{}'\"\s]+[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
TRAIN_ON = ("all", "last", "each")
TOO_LONG = ("cut", "drop")

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class MaskSettings:
    """Which tokens of a conversation are trained, and what becomes of one that is too long.

    Attributes:
        mask_prompt: whether only answers are trained; None: yes, but of whole texts all is.
        train_on: ``all`` answers, the ``last``, or ``each`` as an example of its own that ends with
            it: for templates that write earlier answers otherwise than the last.
        too_long: ``cut`` the beginning off, as long as a whole answer remains behind some of what
            came before it, or ``drop`` the example.
        block_size: tokens of a block of whole texts; None: as many as fit.
        end_id, separator_id, max_prompt: of pairs without a template, see `encode_examples`; and
            ``end_id`` of whole texts.
    """

    mask_prompt: bool | None = None
    train_on: str = "all"
    too_long: str = "cut"
    block_size: int | None = None
    end_id: int | None = None
    separator_id: int | None = None
    max_prompt: int | None = None


@dataclass
class Encoded:
    """Examples as tokens, and how many are not as they were.

    Attributes:
        dropped: conversations without an answer that fits.
        joined: examples in which one token holds the end of a prompt and the beginning of an
            answer, or the other way round, so that the prompt alone has other tokens.
    """

    examples: list[TokenExample] = field(default_factory=list)
    dropped: int = 0
    joined: int = 0


def encode_conversations(
    rows: Sequence[Conversation],
    tokenizer,
    template: ChatTemplate | None,
    longest: int,
    settings: MaskSettings | None = None,
) -> Encoded:
    """Rows of every form as token examples.

    Args:
        template: the model's, or the one chosen instead; None: there is none.
        longest: maximum of input tokens, without the last of an example.

    Raises:
        UserError: the template refuses a row or writes it so that no answer can be told apart, a
            row trains no token, or none fits; names the line.
    """
    settings = settings or MaskSettings()
    found = Encoded()
    texts = [row for row in rows if row.text is not None]
    chats = [row for row in rows if row.text is None]
    if texts and settings.mask_prompt:
        raise UserError(
            f"{texts[0].place}: data.mask_prompt is for pairs and messages, and this is a whole "
            "text, which has no prompt; leave it out"
        )
    if chats and template is None:
        _encode_pairs(chats, tokenizer, longest, settings, found)
    elif chats:
        _encode_chats(chats, tokenizer, template, longest, settings, found)
    for row in texts:
        found.examples += text_blocks(row, tokenizer, longest, settings)
    if not found.examples:
        raise UserError(
            f"none of {len(rows):,} examples fits into {longest:,} tokens with an answer in it; "
            "raise train.max_length"
        )
    return found


def text_blocks(
    row: Conversation, tokenizer, longest: int, settings: MaskSettings
) -> list[TokenExample]:
    """A whole text as blocks of `MaskSettings.block_size` tokens, and a rest; all are trained.

    A block ends with the token that the next one begins with, so that every token but the first is
    predicted, once.
    """
    ids = [*tokenizer.begin_ids, *tokenizer.encode(row.text)]
    end = tokenizer.eos_token_id if settings.end_id is None else settings.end_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    size = min(settings.block_size or longest, longest)
    blocks = [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)]
    if not blocks:
        raise UserError(f"{row.place}: the text is one token, which trains nothing; remove it")
    return [TokenExample(block, 1) for block in blocks]


def _encode_pairs(
    rows: Sequence[Conversation], tokenizer, longest: int, settings: MaskSettings, found: Encoded
) -> None:
    """Pairs for a model without a template: prompt, separator, completion, end token."""
    examples = []
    for row in rows:
        roles = [message["role"] for message in row.messages]
        if not row.is_pair or roles != ["user", "assistant"]:
            raise UserError(
                f"{row.place}: a conversation, and the model has no chat template; choose one with "
                f"--chat-template: {', '.join(built_in_names())}, or a file"
            )
        asked, answer = (message["content"] for message in row.messages)
        examples.append(Example(asked, answer.strip()))
    sizes = map(len, tokenizer.encode_after([" " + each.completion for each in examples]))
    fitting = [each for each, size in zip(examples, sizes) if size <= longest - 2]
    found.dropped += len(examples) - len(fitting)
    most = None if settings.too_long == "drop" else longest
    encoded = encode_examples(
        fitting, tokenizer, most, settings.separator_id, settings.end_id, settings.max_prompt
    )
    kept = [example for example in encoded if example.input_length <= longest]
    found.dropped += len(encoded) - len(kept)
    encoded = kept
    if settings.mask_prompt is False:
        encoded = [replace(example, prompt_length=1) for example in encoded]
    found.examples += encoded


# Rendering -------------------------------------------------------------------------------------


def _encode_chats(
    rows: Sequence[Conversation],
    tokenizer,
    template: ChatTemplate,
    longest: int,
    settings: MaskSettings,
    found: Encoded,
) -> None:
    left_out: Counter[str] = Counter()
    places, texts, spans = [], [], []
    for row in rows:
        for text, answers, part in _rendered(row, template, settings):
            for role in _left_out(part, text):
                left_out[role] += 1
            places.append(row.place)
            texts.append(text)
            spans.append(answers)
    _warn(rows, tokenizer, template, left_out)
    for place, ids, trained, joined in zip(places, *encode_spans(tokenizer, texts, spans)):
        if not trained:
            raise UserError(
                f"{place}: trains no token, since {template.name} writes nothing of its answers; "
                "remove the row, or choose another --chat-template"
            )
        if settings.mask_prompt is False and settings.too_long == "cut":
            cut = max(0, len(ids) - 1 - longest)
            example = TokenExample(ids[cut:], 1, cut)  # all of what is left is trained
        else:
            example = fit(ids, trained, longest, settings.too_long, tokenizer.begin_ids)
        if example is None:
            found.dropped += 1
        else:
            found.examples.append(example)
            found.joined += joined


def _rendered(row: Conversation, template: ChatTemplate, settings: MaskSettings):
    """(text, spans that are trained, the conversation) of each example that a row makes."""
    parts = [row]
    if settings.train_on == "last":
        parts = [replace(row, answers=row.answers[-1:])]
    elif settings.train_on == "each":
        parts = [
            replace(row, messages=row.messages[: number + 1], answers=[number])
            for number in row.answers
        ]
    for part in parts:
        if settings.mask_prompt is False:
            text = _render(part, template, len(part.messages))
            yield text, [(0, len(text))], part
        else:
            yield *answer_spans(part, template), part


def answer_spans(row: Conversation, template: ChatTemplate) -> tuple[str, Spans]:
    """The text of a conversation, and where in it the answers stand that are trained.

    Raises:
        UserError: the template writes the beginning of a conversation otherwise than within the
            whole, or has no generation prompt; names the line.
    """
    last = len(row.messages) - 1
    whole = _render(row, template, last + 1)
    spans = []
    for number in row.answers:
        before = _render(row, template, number, prompt=True) if number else _opening(row, template)
        if not whole.startswith(before):
            raise _no_prefix(row, number, whole, before, "the generation prompt before it")
        start, end = len(before), len(whole)
        if number != last:
            until = _render(row, template, number + 1)
            # Some templates write an end token behind every conversation, not every answer.
            for closing in ("", *template.tokens.values()):
                if until.endswith(closing) and whole.startswith(until.removesuffix(closing)):
                    end = len(until) - len(closing)
                    break
            else:
                raise _no_prefix(row, number, whole, until, "it as the last message")
        _check_prompt(row, template, number, before, whole[start:end])
        opened = OPEN_THOUGHTS.search(before)  # a generation prompt may begin the block
        thoughts = NO_THOUGHTS.match(whole, opened.start() if opened else start, end)
        spans.append((thoughts.end() if thoughts else start, end))
    return whole, spans


def _render(row: Conversation, template: ChatTemplate, count: int, prompt: bool = False) -> str:
    try:
        return template.render(row.messages[:count], tools=row.tools, add_generation_prompt=prompt)
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from error


def _opening(row: Conversation, template: ChatTemplate) -> str:
    """The text before an answer that nothing was asked before."""
    try:
        return template.render([], tools=row.tools, add_generation_prompt=True)
    except UserError as error:
        raise UserError(
            f"{row.place}: the conversation begins with the assistant, which this template does "
            "not take; put a message of the user first"
        ) from error


def _no_prefix(row: Conversation, number: int, whole: str, other: str, what: str) -> UserError:
    equal = next((place for place, (a, b) in enumerate(zip(whole, other)) if a != b), len(whole))
    return UserError(
        f"{row.place}: message {number + 1} (assistant): the template writes {what} as "
        f"{_piece(other, equal)}, but in the whole conversation as {_piece(whole, equal)}, so that "
        "its words cannot be told apart; set data.train_on to each (every answer in the "
        "conversation up to it) or last, or choose another --chat-template"
    )


def _piece(text: str, place: int) -> str:
    return shorten(repr(text[max(0, place - 12) : place + 20]), 44)


def _check_prompt(
    row: Conversation, template: ChatTemplate, number: int, before: str, added: str
) -> None:
    """Refuse a template that writes a heading before answers and none to ask for one."""
    message = row.messages[number]
    content = message["content"].strip()
    if not number or not content or any(key in message for key in THOUGHTS):
        return
    heading = added.partition(content)[0].strip() if content in added else ""
    if not heading or "<think>" in heading:
        return
    if _render(row, template, number) == before:
        raise UserError(
            f"{row.place}: {template.name} has no generation prompt: it writes "
            f"{shorten(repr(heading))} before an answer and leaves it out when it asks for one; "
            "add `{% if add_generation_prompt %}` to it, or choose another --chat-template"
        )


def _left_out(row: Conversation, text: str) -> list[str]:
    """The roles of messages whose content the template does not write."""
    return [
        message["role"]
        for message in row.messages
        if message["content"].strip() not in text and "</think>" not in message["content"]
    ]


def _warn(
    rows: Sequence[Conversation], tokenizer, template: ChatTemplate, left_out: Counter[str]
) -> None:
    for role, count in left_out.items():
        warn(
            f"{template.name} leaves out or changes the content of {count:,} messages of role "
            f"{role}"
        )
    if any(row.tools for row in rows) and not template.reads_tools:
        warn(f"{template.name} does not read tools, which some examples have")
    for mark in dict.fromkeys(MARK.findall(template.source)):
        count = len(tokenizer.encode(mark))
        if count > 1:
            warn(
                f"{template.name} writes {mark}, which is no token of this model but {count}; "
                "choose the template that the model was trained with"
            )
            return


# Tokens ----------------------------------------------------------------------------------------


def encode_spans(
    tokenizer, texts: Sequence[str], spans: Sequence[Spans]
) -> tuple[list[list[int]], list[Spans], list[bool]]:
    """Texts as tokens, and spans of their characters as spans of the tokens.

    A text becomes tokens as a whole. A token that holds characters on both sides of a span's
    beginning belongs to the span, one at its end does not.

    Returns:
        The ids of each text; its spans that have a token, as (first, past the last); and whether
        there was a token on both sides of an edge.
    """
    wholes = tokenizer.encode_batch(texts)
    edges = [
        sorted({0, len(text), *(edge for span in each for edge in span)})
        for text, each in zip(texts, spans)
    ]
    pieces = [
        [text[start:end] for start, end in zip(cuts, cuts[1:])] or [""]
        for text, cuts in zip(texts, edges)
    ]
    firsts = tokenizer.encode_batch([each[0] for each in pieces])
    others = iter(tokenizer.encode_after([piece for each in pieces for piece in each[1:]]))
    found, joined = [], []
    for text, whole, cuts, first, count, each in zip(texts, wholes, edges, firsts, pieces, spans):
        parts = [first, *(next(others) for _ in count[1:])]
        place, tokens = 0, {0: 0}
        for cut, part in zip(cuts[1:], parts):
            place += len(part)
            tokens[cut] = place
        apart = [token for part in parts for token in part] == whole
        broken = False
        if not apart:  # look at each edge by itself
            for cut in cuts[1:-1]:
                before = tokenizer.encode(text[:cut])
                tokens[cut] = _common(before, whole)
                broken |= tokens[cut] < len(before)
            tokens[len(text)] = len(whole)
        # The first token of all has nothing before it to be predicted from.
        inner = [(max(1, tokens[start]), tokens[end]) for start, end in each]
        found.append([(start, end) for start, end in inner if start < end])
        joined.append(broken)
    return wholes, found, joined


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    pairs = enumerate(zip(first, second))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def fit(
    ids: list[int],
    spans: Sequence[tuple[int, int]],
    longest: int,
    too_long: str = "cut",
    begin: Sequence[int] = (),
) -> TokenExample | None:
    """An example of at most ``longest`` input tokens; None: no answer fits.

    Of one that is too long the beginning goes, but for ``begin``, the begin token, and never a part
    of an answer: those that are still there whole, behind some of what came before, are trained.
    """
    cut = len(ids) - 1 - longest
    if cut <= 0:
        return _example(ids, spans, 0)
    if too_long == "drop":
        return None
    ids = ids[: spans[-1][1]]  # behind the last answer there is nothing to learn
    begin = list(begin) if ids[: len(begin)] == list(begin) else []
    cut = len(ids) - 1 - longest
    if cut <= 0:
        return _example(ids, spans, 0)
    cut += len(begin)
    kept = [(start, end) for start, end in spans if start > cut]
    if not kept:
        return None
    shift = cut - len(begin)
    return _example([*begin, *ids[cut:]], [(s - shift, e - shift) for s, e in kept], shift)


def _example(ids: list[int], spans: Sequence[tuple[int, int]], cut: int) -> TokenExample:
    whole = len(spans) == 1 and spans[0][1] == len(ids)
    return TokenExample(ids, spans[0][0], cut, () if whole else tuple(spans))
