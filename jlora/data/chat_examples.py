"""From conversations, pairs and whole texts to examples of tokens.

A conversation is rendered by its chat template and becomes tokens as one text, as it will at
inference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from jlora.data.batches import Example, TokenExample, encode_examples
from jlora.data.chat_template import ChatTemplate, built_in_names
from jlora.data.conversations import Conversation
from jlora.data.loss_mask import answer_spans, render
from jlora.data.spans import Spans, encode_spans, fit, fit_all
from jlora.system.console import warn
from jlora.system.errors import UserError

#: What looks like a special token in a template's text.
MARK = re.compile(r"<[|｜][^<>{}'\"\s]+[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
TRAIN_ON = ("all", "last", "each")
TOO_LONG = ("cut", "drop")


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
            example = fit_all(ids, longest, tokenizer.begin_ids)
        else:
            example = fit(ids, trained, longest, settings.too_long, tokenizer.begin_ids)
        if example is None:
            found.dropped += 1
        else:
            found.examples.append(example)
            found.joined += joined


def _rendered(
    row: Conversation, template: ChatTemplate, settings: MaskSettings
) -> Iterator[tuple[str, Spans, Conversation]]:
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
            text = render(part, template, len(part.messages))
            yield text, [(0, len(text))], part
        else:
            yield *answer_spans(part, template), part


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
