"""What a model makes of held-out examples: perplexity, and answers that match to the letter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jlora import engine
from jlora.data.batches import TokenExample, check_vocabulary, encode_examples
from jlora.data.chat_examples import encode_conversations
from jlora.data.tasks import get_task
from jlora.data.tasks.chat import guess_task
from jlora.decoding.sampling import GenerateConfig
from jlora.metrics.exact import exact_match
from jlora.models.hub import outline, require_tokenizer
from jlora.runs.adapter_file import AdapterFile, base_name, open_model
from jlora.runs.answer import answer
from jlora.runs.data_config import DataConfig
from jlora.runs.form import Form, find_form
from jlora.runs.recipe import changes_of
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.training.loop import validation_loss

#: Settings of the data that say how examples are read.
READING = (
    "template", "separator_id", "end_id", "max_prompt", "prompt_feature", "completion_feature",
    "chat_feature", "text_feature", "answer_after", "mask_prompt", "train_on", "too_long",
    "block_size",
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """A model, its adapter, and examples to judge them by.

    Attributes:
        name, adapter: as for `jlora.runs.adapter_file.open_model`.
        file: of examples, or a folder with ``split``.
        split: of a folder; None: test, or where that is missing valid.
        task: how the file is read; None: as in the adapter's run, else by its keys.
        choice, arguments: as for `jlora.runs.chat.find_chat_template`.
        changes: settings of the data, ``KEY=VALUE``, other than those of the adapter's run.
        longest: tokens of an example at most; None: as in the adapter's run, else 2,048, and the
            model's context at most.
        precision: see `jlora.engine.prepare`.
        batch_size: examples run together.
    """

    name: str | None
    adapter: AdapterFile | None
    file: Path
    split: str | None = None
    task: str | None = None
    choice: str | None = None
    arguments: Mapping[str, Any] | None = None
    changes: Sequence[str] = ()
    longest: int | None = None
    precision: str = "auto"
    batch_size: int = 8

    def perplexity(self) -> dict[str, float | int]:
        """exp of the mean loss of the tokens that a training on these examples would train.

        Of examples that are too long ``cut`` lost their beginning, and ``left_out`` are not among
        ``examples``, since no answer of theirs fits.

        Raises:
            UserError: model, adapter or data are missing or broken, or do not fit each other.
        """
        name, (data, rows) = base_name(self.name, self.adapter), self._read()
        recipe = self.adapter and self.adapter.recipe
        seen = outline(name).model
        tokenizer = require_tokenizer(seen)
        longest = self.longest or (recipe.train.max_length if recipe else 2048)
        longest = min(longest, seen.config.max_positions)
        examples, dropped = self._encode(data, rows, tokenizer, longest)
        check_vocabulary(examples, seen.config.vocab_size)
        del seen  # see Outline
        model = open_model(name, self.adapter)
        engine.prepare(model, self.precision, keep_weights=False)
        loss = validation_loss(model, examples, self.batch_size)
        return {
            "perplexity": math.exp(min(loss, 700.0)),  # of more than that there is no exp
            "loss": loss,
            "tokens": sum(example.target_count for example in examples),
            "examples": len(examples),
            "cut": sum(example.cut > 0 for example in examples),
            "left_out": dropped,
        }

    def exact_match(
        self, config: GenerateConfig, out: Path | None = None
    ) -> dict[str, float | int]:
        """How many answers are a reference word for word, white space aside.

        Args:
            config: how to choose tokens.
            out: predictions.jsonl to write; None: none.

        Raises:
            UserError: as `perplexity`, or no example has an answer to compare with.
        """
        name, (data, rows) = base_name(self.name, self.adapter), self._read()
        groups = get_task(data.task).groups(rows)
        if not groups:
            raise UserError(
                f"{self.file}: exact match compares answers, and no example ends with one; "
                "give pairs or conversations, or take perplexity"
            )
        asked = [group.asked for group in groups] if data.task == "chat" else None
        form = self._form(name, data, asked or [])
        found = answer(
            [group.prompt for group in groups], name, self.adapter, config, form, self.precision,
            out, [group.keep for group in groups], asked,
        )  # fmt: skip
        texts = [prediction.prediction for prediction in found]
        share = exact_match(texts, [group.references for group in groups])
        return {
            "exact_match": share,
            "matches": round(share * len(groups)),
            "examples": len(groups),
        }

    def _read(self) -> tuple[DataConfig, list[Any]]:
        """How the data are read, as in the adapter's run if nothing else is said, and the rows."""
        recipe = self.adapter and self.adapter.recipe
        data = recipe.data if recipe else DataConfig()
        task = self.task or (recipe and recipe.data.task)
        file = self._find(get_task(task or "chat"))
        task = task or guess_task(None, file)
        if task is None:
            raise UserError(f"{file}: its keys do not say how it is read; give --task, such as e2e")
        if task != data.task:
            data = DataConfig(task=task)
        data = replace(data, **changes_of(self.changes, READING, task))
        if task == "chat":
            return data, get_task(task).read_file(file, data.features)
        return data, get_task(task).read(file, data.template)

    def _find(self, task: Any) -> Path:
        if not self.file.is_dir():
            if self.split is not None:
                raise UserError(f"--split is for a folder, and {self.file} is none; leave it out")
            return self.file
        if self.split is not None:
            return task.find_data(self.file, self.split)
        try:
            return task.find_data(self.file, "test")
        except UserError:
            file = task.find_data(self.file, "valid")
            say(f"{self.file} has no test data, so {file.name} is taken")
            return file

    def _form(self, name: str, data: DataConfig, rows: Sequence[Any]) -> Form:
        if data.task != "chat" and (self.choice is not None or self.arguments is not None):
            raise UserError(
                f"--chat-template is for chat data, and these are read as {data.task}; leave it "
                "out, or say --task chat"
            )
        texts = data.task == "chat" and all(row.text is not None for row in rows)
        return find_form(
            name, self.adapter, data=data, texts=texts, choice=self.choice,
            arguments=self.arguments, shorten=data.task == "chat",
        )  # fmt: skip

    def _encode(
        self, data: DataConfig, rows: list[Any], tokenizer: Any, longest: int
    ) -> tuple[list[TokenExample], int]:
        """The examples as tokens, and how many are left out."""
        form = self._form(base_name(self.name, self.adapter), data, rows)
        if data.task != "chat":
            examples = encode_examples(
                rows, tokenizer, longest, data.separator_id, data.end_id, data.max_prompt
            )
            return examples, 0
        template = form.chat and form.chat.template
        found = encode_conversations(rows, tokenizer, template, longest, data.masking)
        return found.examples, found.dropped
