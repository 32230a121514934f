"""Chat templates compared with transformers: texts of conversations, and masks of their answers.

The templates in ``chat_templates`` are written for this comparison, each in the style of a family.
$JLORA_TEMPLATES adds a folder of real ones, such as ``trl/chat_templates`` of TRL's wheel. The mask
is transformers' ``return_assistant_tokens_mask``, which TRL's ``assistant_only_loss`` trains on; it
needs templates with ``generation`` tags.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from parity.case import Case

FOLDER = Path(__file__).with_name("chat_templates")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MARK = re.compile(r"<[|｜][^<>{}'\"\s]+[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</?think>|</?s>")
#: Stands where a template refuses a conversation.
REFUSED = np.array([-1], np.int32)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather <at> a place & 'more'",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]


def say(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, ANSWER = say("user", "What is 2 + 2?"), say("assistant", "It is 4.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
#: name -> (messages, further arguments)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "single": ([ASK, ANSWER], {}),
    "system": ([say("system", "Be short.\nVery."), ASK, ANSWER], {}),
    "turns": (
        [ASK, ANSWER, say("user", " And 3 + 3? \n"), say("assistant", "6 &\u2028\"7\" <b>")], {}
    ),
    "asked": ([say("system", "Be short."), ASK], {"add_generation_prompt": True}),
    "no thoughts": ([ASK], {"add_generation_prompt": True, "enable_thinking": False}),
    "quiet": ([ASK, ANSWER], {"enable_thinking": False}),
    "thoughts": (
        [ASK, say("assistant", "4", reasoning_content="2 and\n2")], {"enable_thinking": True}
    ),
    "older name": ([ASK, say("assistant", "4", reasoning="easy", name=None)], {}),
    "inline": ([ASK, say("assistant", "<think>\nso\n</think>\n\n4"), ASK, ANSWER], {}),
    "tools": ([ASK], {"tools": TOOLS, "add_generation_prompt": True}),
    "called": (
        [ASK, say("assistant", "", tool_calls=[CALL]), say("tool", '{"t": 21}'), ANSWER],
        {"tools": TOOLS},
    ),
    "null": ([ASK, say("assistant", None, tool_calls=[CALL])], {"tools": TOOLS}),
    "roles": ([ASK, ASK, say("system", "late"), ANSWER], {}),
    "empty": ([say("system", ""), say("user", ""), ANSWER], {}),
}  # fmt: skip
MASKED = ("single", "system", "turns", "thoughts", "called")
#: Where a template writes earlier answers otherwise than the last, no mask is made of prefixes.
UNMASKED = {"qwen3": ("turns", "called"), "deepseek-r1": MASKED}
#: Of TRL's templates, those whose tags take in an empty thinking block, or what stands between the
#: generation prompt and the answer; and those that write earlier answers otherwise than the last.
OTHER_MASKS = re.compile(
    "(deepseek|diffusion|glm4moe|gptoss|muse|nemotron|qwen2_5_t|qwen3_t|qwen3_[568]).*"
)


def cases(seed: int) -> list[Case]:
    found = [
        Case(f"In {path.stem}'s style", path.stem, {"file": str(path.name)}, relative_to="exact",
             golden=True)
        for path in sorted(FOLDER.glob("*.jinja"))
    ]  # fmt: skip
    if os.environ.get("JLORA_TEMPLATES"):
        found += [
            Case(
                "Templates of models", f"real-{path.stem}", {"file": str(path)}, relative_to="exact"
            )
            for path in sorted(Path(os.environ["JLORA_TEMPLATES"]).glob("*.jinja"))
        ]
    return found


def inputs(case: Case, generator: np.random.Generator) -> dict[str, np.ndarray]:
    return {"nothing": np.zeros(1, np.int32)}


def source_of(case: Case) -> str:
    return (FOLDER / case.settings["file"]).read_text(encoding="utf-8")


def backend_of(source: str) -> Any:
    """A tokenizer of bytes in which a template's marks are tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted({*TOKENS.values(), *MARK.findall(source)}))
    return backend


def masked(case: Case, source: str) -> list[str]:
    """The conversations whose masks are compared."""
    name = case.name.removeprefix("real-")
    if "{%- generation" not in source and "{% generation" not in source:
        return []
    if case.name != name and OTHER_MASKS.fullmatch(name):
        return []
    return [each for each in MASKED if each not in UNMASKED.get(name, ())]


def codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.int32)


def transformers_side(case: Case, arrays: Any, folder: Path) -> dict[str, np.ndarray]:
    from transformers import PreTrainedTokenizerFast

    source = source_of(case)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend_of(source), **TOKENS)
    tokenizer.chat_template = source
    found = {}
    for name, (messages, more) in CONVERSATIONS.items():
        more = {"date_string": "01 Jan 2026", **more}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception:  # jinja2's, and what Python raises in a template
            found[f"text {name}"] = REFUSED
            continue
        found[f"text {name}"] = codes(text)
        if name in masked(case, source):
            encoded = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **more
            )
            found[f"mask {name}"] = np.array(encoded["assistant_masks"], np.int32)
    return found


def jlora_side(case: Case, arrays: Any, folder: Path) -> dict[str, np.ndarray]:
    from jlora.data.chat_template import ChatTemplate
    from jlora.data.conversations import Conversation
    from jlora.data.loss_mask import answer_spans
    from jlora.data.spans import encode_spans
    from jlora.data.tokenizer import Tokenizer
    from jlora.system.errors import UserError

    source = source_of(case)
    tokenizer = Tokenizer(backend_of(source))
    template = ChatTemplate(source, TOKENS, {"date_string": "01 Jan 2026"})
    found = {}
    for name, (messages, more) in CONVERSATIONS.items():
        try:
            found[f"text {name}"] = codes(template.render(messages, **more))
        except UserError:
            found[f"text {name}"] = REFUSED
            continue
        if name in masked(case, source):
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            text, spans = answer_spans(
                Conversation(case.name, messages, answers, more.get("tools")), template
            )
            (ids,), (spans,), _ = encode_spans(tokenizer, [text], [spans])
            mask = np.zeros(len(ids), np.int32)
            for start, end in spans:
                mask[start:end] = 1
            found[f"mask {name}"] = mask
    return found


STAGES = (("reference", transformers_side), ("jlora", jlora_side))
