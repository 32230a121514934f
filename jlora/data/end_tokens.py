"""What ends an answer: every end token that a model's files name, and what its template writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jlora.system.errors import UserError

MARK = "jloraanswer"  # an answer to look for in a rendered conversation


@dataclass(frozen=True)
class Ends:
    """Where an answer ends.

    Attributes:
        ids: tokens.
        texts: what the template writes after an answer where the tokenizer has no token for it.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


def find_ends(tokenizer: Any, template: Any | None = None) -> Ends:
    """All that ends an answer of a model.

    Args:
        tokenizer: a `jlora.data.tokenizer.Tokenizer`, which knows what generation_config.json,
            config.json and tokenizer_config.json (or a GGUF file) name.
        template: the model's `jlora.data.chat_template.ChatTemplate`; None: no conversation.
    """
    named = [tokenizer.eos_token_id, *tokenizer.end_token_ids]
    ids = [token for token in named if token is not None]
    texts: list[str] = []
    if template is not None:
        token, text = template_end(tokenizer, template)
        ids += [] if token is None else [token]
        texts += [text] if text else []
    return Ends(tuple(dict.fromkeys(ids)), tuple(texts))


def template_end(tokenizer: Any, template: Any) -> tuple[int | None, str]:
    """What a template writes after an answer: a special token, or a text where there is none."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}
    special = tokenizer.backend.get_added_tokens_decoder()
    # Some templates (GLM-4's) end an answer by what begins the next turn.
    for messages in ([question, answer], [question, answer, question]):
        try:
            text = template.render(messages)
        except UserError:
            return None, ""
        behind = text.rpartition(MARK)[2].strip() if MARK in text else ""
        first = tokenizer.encode(behind)[:1]
        if first and first[0] in special and behind.startswith(special[first[0]].content):
            return first[0], ""
        if behind:  # said in ordinary tokens, as by ChatML's template with GPT-2's tokenizer
            return None, behind
    return None, ""
