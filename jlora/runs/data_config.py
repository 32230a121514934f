"""What a recipe says about its data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jlora.data.chat_examples import TOO_LONG, TRAIN_ON, MaskSettings
from jlora.data.conversations import Features
from jlora.data.tasks import get_task
from jlora.system.errors import UserError
from jlora.system.settings import check_choice

#: TRL's names of settings, and ours.
ALIASES = {"assistant_only_loss": "mask_prompt", "completion_only_loss": "mask_prompt"}


@dataclass
class DataConfig:
    """Which dataset, and how its texts become tokens."""

    task: str = "e2e"
    metrics: list[str] | None = None  # scores to compute; None: the task's own
    template: str | None = None  # prompt template of BoolQ, by name or as text; None: its first
    folder: str | None = None  # a folder with the splits; None: the usual places
    train: str | None = None  # a file instead of the folder's training split
    valid: str | None = None
    test: str | None = None
    separator_id: int | None = None  # token after the prompt; None: the end token; -1: no token
    end_id: int | None = None  # token after the completion; None: the tokenizer's end token
    max_prompt: int | None = None  # most tokens of a prompt, in training and decoding; None: all
    train_limit: int | None = None  # only the first so many examples
    valid_stride: int = 1  # every n-th validation example, from the first
    test_limit: int | None = None  # only so many test inputs, evenly spaced
    # Of task chat alone:
    valid_split: float | None = None  # this share of the training file is for validation
    prompt_feature: str = "prompt"  # columns, where the files call them otherwise
    completion_feature: str = "completion"
    chat_feature: str = "messages"
    text_feature: str = "text"
    answer_after: str | None = None  # words of a text behind which its answer stands, for scores
    chat_template: str | None = None  # a file, or one of jlora's; none; null: the model's own
    chat_template_args: dict[str, Any] = field(default_factory=dict)  # as enable_thinking: false
    mask_prompt: bool | None = None  # train answers alone; null: yes, but of whole texts all
    train_on: str = "all"  # answers of a conversation, the last, or each as its own example
    too_long: str = "cut"  # the beginning off, or drop the example
    block_size: int | None = None  # tokens of a block of whole texts; null: train.max_length

    def __post_init__(self):
        """Raises UserError for a value that makes no sense."""
        task = get_task(self.task)
        task.find_template(self.template)
        self._check_chat()
        if self.metrics is not None:
            if task.choices:
                raise UserError(
                    f"task {task.name} is scored by accuracy alone; leave data.metrics out"
                )
            from jlora.metrics import check_names

            check_names(self.metrics)
        if self.valid_stride < 1:
            raise UserError(f"data.valid_stride must be at least 1, not {self.valid_stride}")
        for name in ("train_limit", "test_limit", "max_prompt", "block_size"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise UserError(f"data.{name} must be at least 1, or null for all, not {limit}")

    def _check_chat(self) -> None:
        check_choice("data.train_on", self.train_on, TRAIN_ON)
        check_choice("data.too_long", self.too_long, TOO_LONG)
        if self.valid_split is not None and not 0 < self.valid_split < 1:
            raise UserError(f"data.valid_split must be between 0 and 1, not {self.valid_split}")
        if self.valid_split is not None and self.valid is not None:
            raise UserError("data.valid_split and data.valid both say what is for validation")
        columns = [getattr(self, f"{name}_feature") for name in ("prompt", "completion")]
        columns += [self.chat_feature, self.text_feature]
        if len(set(columns)) < len(columns):
            raise UserError(
                "data.prompt_feature, completion_feature, chat_feature and text_feature name one "
                "column twice; give each a column of its own"
            )
        if self.task == "chat":
            return
        for item in dataclasses.fields(self)[self._first_of_chat() :]:
            if getattr(self, item.name) not in (item.default, {}):
                raise UserError(f"data.{item.name} is for task chat, not {self.task}; leave it out")

    @classmethod
    def _first_of_chat(cls) -> int:
        return [item.name for item in dataclasses.fields(cls)].index("valid_split")

    @property
    def features(self) -> Features:
        """The columns that task chat reads."""
        return Features(
            self.prompt_feature, self.completion_feature, self.chat_feature, self.text_feature,
            self.answer_after,
        )  # fmt: skip

    @property
    def masking(self) -> MaskSettings:
        """Which tokens task chat trains."""
        return MaskSettings(
            self.mask_prompt, self.train_on, self.too_long, self.block_size,
            self.end_id, self.separator_id, self.max_prompt,
        )  # fmt: skip


def rename_settings(values: Any, source: str) -> Any:
    """Settings under their own names, where another trainer's were given.

    Raises:
        UserError: two names of one setting are given.
    """
    data = values.get("data") if isinstance(values, dict) else None
    given = [name for name in ALIASES if isinstance(data, dict) and name in data]
    if not given:
        return values
    data = dict(data)
    for name in given:
        if ALIASES[name] in data:
            raise UserError(f"{source}: data.{name} is data.{ALIASES[name]}; give one of the two")
        data[ALIASES[name]] = data.pop(name)
    return {**values, "data": data}
