"""The data of task chat: a template between texts and tokens, and what `jlora finetune` guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.data.batches import NO_SEPARATOR, TokenExample, encode_prompts
from jlora.data.chat_examples import encode_conversations
from jlora.data.chat_template import find_template, tokens_of
from jlora.data.conversations import Conversation, read_conversations
from jlora.data.tasks import data_folders
from jlora.data.tasks.chat import guess_task
from jlora.data.tokenizer import Tokenizer
from jlora.runs.data_config import DataConfig
from jlora.runs.run_data import RunData
from jlora.system.console import say
from jlora.system.errors import UserError

#: What `jlora finetune` without a recipe takes for chat data, where nothing else is said.
DEFAULTS = {
    "lora": {"target_modules": "all-linear"},
    "train": {"max_length": 2048},
    "decode": {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 256},
}
#: As ``data.chat_template``: none at all.
NO_TEMPLATE = "none"


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a command line without a recipe, with the task that its data ask for.

    Args:
        values: a recipe's settings as nested dicts; with ``data.task`` they stay as they are.

    Raises:
        UserError: the data cannot be read.
    """
    data = values.get("data") or {}
    if not isinstance(data, dict):
        return values
    task = data.get("task")
    if task is None and not (data.get("folder") is None and data.get("train") is None):
        task = guess_task(data.get("folder"), data.get("train"))
    if task != "chat":
        return values
    values = {**values, "data": {**data, "task": task}}
    for group, settings in DEFAULTS.items():
        if isinstance(values.get(group) or {}, dict):
            values[group] = {**settings, **(values.get(group) or {})}
    return values


class ChatData(RunData):
    """`RunData` of conversations."""

    _all_rows: Sequence[Conversation] = ()  # of a training file that is divided

    def encode(self, model: Any) -> RunData:
        self._all_rows = ()
        return super().encode(model)

    def find_template(self, source: Path | None, tokenizer: Tokenizer) -> None:
        """Find the template that the recipe chooses, or else the model's.

        Raises:
            UserError: there is no such template, or it is damaged.
        """
        data = self.recipe.data
        rows = [row for rows in self._examples.values() for row in rows]
        texts = [row.text is not None for row in rows]
        asked = any(group.asked.text is not None for group in self.groups)
        self._check_forms(asked or any(texts), all(texts))
        if all(texts):
            # So that nothing is put into a template when the adapter of this run answers.
            data = replace(data, chat_template=NO_TEMPLATE, separator_id=NO_SEPARATOR)
            self.recipe = replace(self.recipe, data=data)
        if data.chat_template == NO_TEMPLATE:
            return
        self.template = find_template(source, data.chat_template, data.chat_template_args)
        if self.template is not None:
            if not self.template.tokens:  # no file of the model's names any
                self.template = replace(self.template, tokens=tokens_of(tokenizer))
            self._check_settings()
            say(f"conversations are written by {self.template.name}")

    def _check_forms(self, any_text: bool, all_texts: bool) -> None:
        """Refuse settings that none of the examples would heed."""
        data = self.recipe.data
        idle = [] if any_text else ["block_size", "answer_after"]
        what = "whole texts, and there are none"
        if all_texts:
            idle, what = ["chat_template_args", "train_on"], "conversations, and these are texts"
            idle += [] if data.chat_template == NO_TEMPLATE else ["chat_template"]
        default = DataConfig()
        for name in idle:
            if getattr(data, name) != getattr(default, name):
                raise UserError(f"data.{name} is for {what}; leave it out")

    def _check_settings(self) -> None:
        for name in ("separator_id", "max_prompt"):
            if getattr(self.recipe.data, name) is not None:
                raise UserError(
                    f"data.{name} is for pairs without a chat template; leave it out, or set "
                    f"data.chat_template to {NO_TEMPLATE}"
                )

    def _read_file(self, file: Path) -> list[Conversation]:
        return read_conversations(file, self.recipe.data.features)

    def _file(self, split: str) -> Path | None:
        data = self.recipe.data
        name = data.folder or ""
        if getattr(data, split) or Path(name).exists() or Path(name).name != name:
            return super()._file(split)
        # A recipe names its data by the folder alone, which lies with the other data.
        places = [folder / name for folder in data_folders() if (folder / name).is_dir()]
        return self.task.find_data(places[0] if name and places else data.folder, split)

    def _read(self, split: str) -> list[Conversation]:
        share = self.recipe.data.valid_split
        if split == "test" and not self._has("test"):
            say("no test data: the validation data are answered instead")
            split = "valid"
        if share is None or split == "test":
            return super()._read(split)
        if not self._all_rows:
            self._all_rows = super()._read("train")
        taken = _drawn(len(self._all_rows), share, self.recipe.train.seed)
        return [
            row for row, is_taken in zip(self._all_rows, taken) if is_taken == (split == "valid")
        ]

    def _has(self, split: str) -> bool:
        try:
            return getattr(self.recipe.data, split) is not None or bool(self._file(split))
        except UserError:
            return False

    def _has_validation(self) -> bool:
        return self.recipe.data.valid_split is not None or self._has("valid")

    def _encode_prompts(self, tokenizer, longest: int) -> list[list[int]]:
        if self.template is None:
            return super()._encode_prompts(tokenizer, longest)
        texts = []
        for group in self.groups:
            asked = group.asked
            if asked.text is not None:
                raise UserError(
                    f"{asked.place}: a whole text among conversations cannot be asked for its "
                    "answer; leave data.answer_after out"
                )
            try:
                texts.append(
                    self.template.render(
                        asked.messages, tools=asked.tools, add_generation_prompt=True
                    )
                )
            except UserError as error:
                raise UserError(f"{asked.place}: {error}") from error
        return encode_prompts(texts, tokenizer, longest, NO_SEPARATOR)

    def _encode(self, examples: list, tokenizer, longest: int) -> tuple[list[TokenExample], str]:
        found = encode_conversations(
            examples, tokenizer, self.template, longest, self.recipe.data.masking
        )
        examples = found.examples
        trained = sum(example.target_count for example in examples)
        note = f", {trained:,} of {sum(len(example.ids) for example in examples):,} tokens trained"
        for count, what in (
            (sum(example.cut > 0 for example in examples), f"cut at the beginning to {longest:,}"),
            (found.dropped, f"left out, whose answers do not fit into {longest:,} tokens"),
            (found.joined, "with a token that is half prompt, half answer"),
        ):
            note += f", {count:,} {what}" if count else ""
        return examples, note


def _drawn(count: int, share: float, seed: int) -> np.ndarray:
    """Which rows are for validation, (count,) bool: a function of count, share and seed."""
    if count < 2:
        raise UserError("data.valid_split needs two examples or more; give more data")
    number = min(count - 1, max(1, round(share * count)))
    taken = np.zeros(count, bool)
    taken[np.random.default_rng(seed).permutation(count)[:number]] = True
    return taken
