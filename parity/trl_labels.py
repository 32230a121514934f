"""The labels that TRL's own trainer makes of conversations, and jlora's of the same file.

    python -m parity.trl_labels PYTHON     # of an environment with TRL: pip install trl

`parity.chat` compares masks with those of transformers; here `SFTTrainer` reads the file: with
``assistant_only_loss`` messages, with ``completion_only_loss`` pairs. The templates are those of
`parity.chat` that have ``generation`` tags.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from parity.chat import ANSWER, ASK, FOLDER, TOKENS, UNMASKED, backend_of, say

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = say("system", "Be short.\nVery.")
NEXT = [say("user", " And 3 + 3? \n"), say("assistant", '6 & "7" <b>')]
MESSAGES = {
    "single": [ASK, ANSWER], "system": [SYSTEM, ASK, ANSWER], "turns": [ASK, ANSWER, *NEXT],
}  # fmt: skip
#: kind of rows -> the rows by the name of their conversation
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "messages": {name: {"messages": messages} for name, messages in MESSAGES.items()},
    "pairs": {
        name: {"prompt": messages[:-1], "completion": messages[-1:]}
        for name, messages in MESSAGES.items()
    },
}
#: Their templates write an empty thinking block before an answer, which TRL trains in pairs; here
#: it belongs to the prompt.
THINKS = ("qwen3",)
NOT_TRAINED = -100
TEMPLATE, TOKENIZER, LABELS = "chat_template.jinja", "tokenizer.json", "labels.json"


def main(python: str) -> int:
    """Compare the two; 0 if all labels are equal."""
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = [write_case(path, Path(scratch)) for path in sorted(FOLDER.glob("*.jinja"))]
        folders = [folder for folder in folders if folder is not None]
        command = [python, "-W", "ignore", "-m", "parity.trl_labels", "--trl", *folders]
        subprocess.run(command, cwd=ROOT, check=True)
        for folder in folders:
            theirs = json.loads((folder / LABELS).read_text())
            for kind in rows_of(folder):
                ours = our_labels(folder, kind)
                equal = sum(a == b for a, b in zip(ours, theirs[kind]))
                failed += ours != theirs[kind]
                trained = sum(label != NOT_TRAINED for labels in ours for label in labels)
                print(
                    f"{folder.name}, {kind}: {equal} of {len(theirs[kind])} rows have equal labels "
                    f"({trained} tokens trained)"
                )
    return int(failed > 0)


def write_case(template: Path, scratch: Path) -> Path | None:
    """A folder with a template, its tokenizer and the rows; None: no answer is marked in it."""
    source = template.read_text(encoding="utf-8")
    if "{% generation" not in source and "{%- generation" not in source:
        return None
    folder = scratch / template.stem
    folder.mkdir()
    (folder / TEMPLATE).write_text(source, encoding="utf-8")
    backend_of(source).save(str(folder / TOKENIZER))
    unlike = UNMASKED.get(template.stem, ())  # of which no mask is made, see `parity.chat`
    for kind, rows in ROWS.items():
        rows = [
            row
            for name, row in rows.items()
            if not (name in unlike and (kind == "messages" or "single" in unlike))
            and renders(source, MESSAGES[name])
        ]
        if rows and not (kind == "pairs" and template.stem in THINKS):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    return folder


def renders(source: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a template takes a conversation."""
    from jlora.data.chat_template import ChatTemplate
    from jlora.system.errors import UserError

    try:
        ChatTemplate(source, TOKENS).render(messages)
    except UserError:
        return False
    return True


def rows_of(folder: Path) -> list[str]:
    return [path.stem for path in sorted(folder.glob("*.jsonl"))]


def our_labels(folder: Path, kind: str) -> list[list[int]]:
    from tokenizers import Tokenizer as Backend

    from jlora.data.chat_examples import encode_conversations
    from jlora.data.chat_template import ChatTemplate
    from jlora.data.conversations import read_conversations
    from jlora.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(Backend.from_file(str(folder / TOKENIZER)))
    template = ChatTemplate((folder / TEMPLATE).read_text(encoding="utf-8"), TOKENS)
    rows = read_conversations(folder / f"{kind}.jsonl")
    found = []
    for example in encode_conversations(rows, tokenizer, template, 10_000).examples:
        trained = {place for start, end in example.trained for place in range(start, end)}
        found.append([t if i in trained else NOT_TRAINED for i, t in enumerate(example.ids)])
    return found


def their_labels(folder: Path, kind: str) -> list[list[int]]:
    """By TRL's trainer; runs in its environment."""
    from datasets import Dataset
    from tokenizers import Tokenizer as Backend
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    backend = Backend.from_file(str(folder / TOKENIZER))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="</s>", **TOKENS)
    tokenizer.chat_template = (folder / TEMPLATE).read_text(encoding="utf-8")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    lines = (folder / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    settings = SFTConfig(
        output_dir=str(folder / "run"), assistant_only_loss=kind == "messages", report_to=[],
        max_length=None, use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        LlamaForCausalLM(config), settings, processing_class=tokenizer,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
    )  # fmt: skip
    found = []
    for row in trainer.train_dataset:
        (labels,) = trainer.data_collator([row])["labels"].tolist()  # as the model gets them
        found.append(labels)
    return found


def trl_side(folders: list[str]) -> None:
    for folder in map(Path, folders):
        labels = {kind: their_labels(folder, kind) for kind in rows_of(folder)}
        (folder / LABELS).write_text(json.dumps(labels))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_side(sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
