"""A recipe's data: every file read once and tokenised once, for all that needs them.

Training, the memory check, decoding and the report share one `RunData`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jlora.data.batches import (
    TokenExample,
    check_vocabulary,
    encode_examples,
    encode_prompts,
)
from jlora.data.chat_template import ChatTemplate
from jlora.data.tasks import ReferenceGroup, Task, get_task
from jlora.models.hub import outline, require_tokenizer
from jlora.runs.recipe import Recipe
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.files import sha256_of


def load_data(recipe: Recipe, test: bool = True) -> RunData:
    """The recipe's data as tokens; of its model, tokenizer and sizes are read, but no weights.

    Raises:
        UserError: data or model are missing or broken, or do not fit each other.
    """
    from jlora.runs.chat_data import ChatData

    data = ChatData(recipe, test) if recipe.data.task == "chat" else RunData(recipe, test)
    found = outline(recipe.model)
    data.find_template(found.source, require_tokenizer(found.model))
    return data.encode(found.model)


class RunData:
    """What a recipe trains on and is scored by.

    Reading needs no model; `encode` needs a model's tokenizer and sizes, not its weights. So a
    mistake in a file is known before anything large is loaded.

    Args:
        recipe: says which data.
        test: whether the test split is wanted; `jlora finetune` does without.

    Attributes:
        recipe: as given, or with what the data decide filled in.
        task: the dataset's task.
        groups: distinct test inputs with their references, evenly thinned to ``data.test_limit``.
        hashes: sha256 of each file, by its path.
        train, valid: examples as tokens, after `encode`; valid may be empty.
        prompts: tokens of each test input, after `encode`.
        template: the chat template of the examples; None: they have none.
        tokenizer: the model's, after `encode`.
        notes: what is to be said of the examples of each split, after `encode`.

    Raises:
        UserError: a file is missing or broken (with its line).
    """

    train: list[TokenExample]
    valid: list[TokenExample]
    prompts: list[list[int]]
    notes: dict[str, str]
    template: ChatTemplate | None = None

    def __init__(self, recipe: Recipe, test: bool = True):
        self.recipe = recipe
        self.task: Task = get_task(recipe.data.task)
        self.hashes: dict[str, str] = {}
        self.groups: list[ReferenceGroup] = []
        if test:
            self.groups = self._thinned(self.task.groups(self._read("test")))
        self._examples = {"train": self._read("train")[: recipe.data.train_limit]}
        if self._has_validation():
            self._examples["valid"] = self._read("valid")[:: recipe.data.valid_stride]
        else:
            say("no validation data: a training keeps no best adapter, only the last")

    @property
    def metrics(self) -> Sequence[str]:
        """The scores to compute; of a task with choices it is accuracy alone."""
        return self.recipe.data.metrics or self.task.metrics

    @property
    def references(self) -> dict[str, list[str]]:
        """Test input -> the texts that answer it."""
        return {group.prompt: group.references for group in self.groups}

    def encode(self, model: Any) -> RunData:
        """Make tokens of all texts; the texts of training are let go.

        Args:
            model: a model, or an outline's, with a tokenizer.

        Raises:
            UserError: an example does not fit the model.
        """
        self.tokenizer = tokenizer = model.tokenizer
        context = model.config.max_positions
        # Every answer of a choice is tried behind the prompt, however few tokens may be generated.
        ends = tokenizer.encode_after([" " + choice for choice in self.task.choices])
        new = max([self.recipe.decode.max_new_tokens, *map(len, ends)])
        self.prompts = self._encode_prompts(tokenizer, context - new + 1)
        longest = min(self.recipe.train.max_length, context)
        self.train, self.valid, self.notes = [], [], {}
        for split, examples in self._examples.items():
            encoded, self.notes[split] = self._encode(examples, tokenizer, longest)
            check_vocabulary(encoded, model.config.vocab_size)
            say(f"{len(encoded):,} {split} examples{self.notes[split]}")
            setattr(self, split, encoded)
        self._examples = {}
        return self

    def find_template(self, source: Path | None, tokenizer) -> None:
        """Find the chat template of the model whose weights are in ``source``."""

    def _encode_prompts(self, tokenizer, longest: int) -> list[list[int]]:
        """The test inputs as tokens."""
        data = self.recipe.data
        return encode_prompts(
            [group.prompt for group in self.groups], tokenizer, longest,
            data.separator_id, data.max_prompt, [group.keep for group in self.groups],
        )  # fmt: skip

    def _encode(self, examples: list, tokenizer, longest: int) -> tuple[list[TokenExample], str]:
        """Examples as tokens, and what is to be said about them."""
        data = self.recipe.data
        encoded = encode_examples(
            examples, tokenizer, longest, data.separator_id, data.end_id, data.max_prompt
        )
        cut = sum(example.cut > 0 for example in encoded)
        return encoded, f", {cut:,} prompts cut" if cut else ""

    def _read(self, split: str) -> list[Any]:
        file = self._file(split)
        if file is None:
            return self.task.built_in(split)
        if self.recipe.data.train and not getattr(self.recipe.data, split):
            say(f"{split} data: {file}")  # which nobody named: it lies beside the training file
        examples = self._read_file(file)
        self.hashes[str(file)] = sha256_of(file)
        return examples

    def _read_file(self, file: Path) -> list[Any]:
        return self.task.read(file, self.recipe.data.template)

    def _file(self, split: str) -> Path | None:
        """The split's own file if the recipe names one, else the folder's; None: built in."""
        data = self.recipe.data
        if getattr(data, split):
            return Path(getattr(data, split))
        if data.folder is None and self.task.built_in is not None:
            return None
        return self.task.find_data(data.folder, split)

    def _has_validation(self) -> bool:
        """Whether there is a validation split; training does without."""
        data = self.recipe.data
        if data.valid is not None:
            return True
        if data.folder is None:
            if self.task.built_in is not None:
                return data.train is None
            if data.train is not None:  # what lies in the usual places is of other data
                return False
        try:
            self.task.find_data(data.folder, "valid")
        except UserError:
            return False
        return True

    def _thinned(self, groups: list[ReferenceGroup]) -> list[ReferenceGroup]:
        limit = self.recipe.data.test_limit
        if limit is None or limit >= len(groups):
            return groups
        return [groups[index * len(groups) // limit] for index in range(limit)]
