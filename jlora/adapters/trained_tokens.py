"""The tokens that stood round the completions in training, carried into a model that is written.

A merged model has no recipe beside it. What ends its texts must stand where other programs look
for it, and what stood between prompt and completion where jlora looks for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.batches import NO_SEPARATOR
from jlora.data.tokenizer import GGUF_SEPARATOR, Tokenizer, read_json_object
from jlora.system.files import write_text

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"


@dataclass(frozen=True)
class TrainedTokens:
    """What training put round a completion; None: not known, the files stay the base's.

    Attributes:
        separator: after the prompt; `NO_SEPARATOR` for none.
        end: after the completion.
    """

    separator: int | None = None
    end: int | None = None

    @classmethod
    def of(
        cls, tokenizer: Tokenizer | None, separator_id: int | None, end_id: int | None
    ) -> TrainedTokens:
        """The tokens that a recipe's settings mean with the base's tokenizer."""
        if tokenizer is not None:
            for own in (tokenizer.separator_id, tokenizer.eos_token_id):
                separator_id = own if separator_id is None else separator_id
            end_id = tokenizer.eos_token_id if end_id is None else end_id
        return cls(separator_id, end_id)

    def write(self, folder: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Change the files of a written model folder; notes of what was changed.

        Args:
            folder: with config.json, and tokenizer_config.json if there is a tokenizer.
        """
        config = read_json_object(folder / CONFIG)
        changed = []
        if self.separator is not None:
            # Also where it is the end token: without this the model would be talked to by its
            # base's chat template.
            config["jlora"] = {"separator_id": self.separator}
        if not self._is_end(config):
            config["eos_token_id"] = self.end
            changed.append(CONFIG)
        write_json(folder / CONFIG, config)
        generation = read_json_object(folder / GENERATION)
        if not self._is_end(generation) if generation else changed:
            write_json(folder / GENERATION, {**generation, "eos_token_id": self.end})
            changed.append(GENERATION)
        notes = []
        if tokenizer is not None and self.end is not None:
            token = special_token(tokenizer, self.end)
            for name in (TOKENIZER, SPECIAL):
                settings = read_json_object(folder / name)
                if not settings or end_of(settings, tokenizer) in (self.end, None):
                    continue
                # As a special token, a word would be cut out of every text.
                settings.pop("eos_token")
                write_json(
                    folder / name, settings if token is None else {**settings, "eos_token": token}
                )
                changed.append(name)
                if token is None:
                    notes.append(f"{name} names no eos_token, since token {self.end} is a word")
        if changed:
            notes.insert(0, f"token {self.end} ends a text, as in training: {', '.join(changed)}")
        return notes + self._separator_note(self._end_of(config))

    def gguf(self, metadata: dict[str, Any]) -> list[str]:
        """Change the metadata of a GGUF file; notes of what was changed."""
        notes, key = [], "tokenizer.ggml.eos_token_id"
        if self.end is not None and metadata.get(key) != self.end:
            metadata[key] = self.end
            notes.append(f"token {self.end} ends a text, as in training: {key}")
        if self.separator is not None:
            metadata[GGUF_SEPARATOR] = self.separator
        return notes + self._separator_note(metadata.get(key))

    def _is_end(self, settings: dict[str, Any]) -> bool:
        """Whether a config.json stops at the end token, which may be one of several."""
        return self.end is None or self.end in as_list(settings.get("eos_token_id"))

    def _end_of(self, config: dict[str, Any]) -> int | None:
        return (
            self.end if self.end is not None else (as_list(config.get("eos_token_id")) or [None])[0]
        )

    def _separator_note(self, end: int | None) -> list[str]:
        if self.separator in (None, end):
            return []
        what = "no token" if self.separator == NO_SEPARATOR else f"token {self.separator}"
        return [
            f"{what} stood after each prompt in training: jlora reads that from the written model, "
            "other programs are to be told"
        ]


#: Of an adapter that was trained elsewhere: the files stay the base's.
UNKNOWN = TrainedTokens()


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def special_token(tokenizer: Tokenizer, index: int) -> str | None:
    """The text of a special token; None: the id is an ordinary word's."""
    token = tokenizer.backend.get_added_tokens_decoder().get(index)
    return token.content if token is not None and token.special else None


def end_of(settings: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    """The id of the eos_token that a file of settings names."""
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
