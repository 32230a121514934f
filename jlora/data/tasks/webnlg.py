"""WebNLG challenge 2017 (Gardent et al. 2017): texts for RDF triples.

The JSON has microsoft/LoRA's form (one object for each entry) and is prepared as by its
`format_converting_webnlg.py`: one example for each text whose comment is "good"; the prompt is the
entry's modified triples, unchanged, with underscores and quotes::

    Aarhus : leaderName : Jacob_Bundsgaard | Aarhus_Airport : cityServed : Aarhus

Prompt/completion JSON Lines are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.data.batches import Example
from jlora.data.readers import json_document
from jlora.data.tasks import Task
from jlora.data.tasks.jsonl import holds_pairs, read_pairs
from jlora.system.errors import UserError, kind_of

FORMS = "give the JSON of the WebNLG challenge 2017, or prompt/completion JSON Lines named .jsonl"

#: Categories of the training set; the entries of the test set's five other ones are "unseen".
SEEN = (
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument",
    "SportsTeam", "University", "WrittenWork",
)  # fmt: skip

#: The first three are the paper's columns. All but sacreBLEU use an input's first six references.
METRICS = ("multi-BLEU", "METEOR-WebNLG", "TER", "chrF++", "sacreBLEU")


def triples_to_prompt(triples: list[tuple[str, str, str]]) -> str:
    """``[(subject, property, object), ...]`` -> ``subject : property : object | ...``."""
    return " | ".join(" : ".join(map(check_text, triple)) for triple in triples)


def entry_prompt(entry: dict[str, Any]) -> str:
    """The prompt of one entry, ``{"7": {"modifiedtripleset": [...], ...}}``.

    Raises:
        KeyError, TypeError, ValueError: the entry has an unexpected shape.
    """
    (content,) = entry.values()
    return triples_to_prompt(
        [(t["subject"], t["property"], t["object"]) for t in content["modifiedtripleset"]]
    )


def entry_examples(entry: dict[str, Any]) -> Iterator[Example]:
    """The examples of one entry; none if none of its texts is marked "good".

    Raises:
        KeyError, TypeError, ValueError: the entry has an unexpected shape.
    """
    (content,) = entry.values()
    prompt = entry_prompt(entry)
    part = "seen" if content["category"] in SEEN else "unseen"
    for text in content["lexicalisations"]:
        if text["comment"] == "good":
            yield Example(prompt, check_text(text["lex"]), part)


def check_text(text: Any) -> str:
    """The text itself, not even stripped, as in the reference.

    Raises:
        TypeError, ValueError: it is no string, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"a text is {kind_of(text)}")
    text.encode("utf-8")
    return text


def read(path: str | Path) -> list[Example]:
    """Read the challenge's JSON, or prompt/completion JSON Lines.

    Raises:
        UserError: it is neither, or an entry has an unexpected shape (with its number, from 1).
    """
    if holds_pairs(path):
        return read_pairs(path)
    document = json_document(path, FORMS)
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise UserError(f'{path}: no {{"entries": [...]}} but {kind_of(document)}; {FORMS}')
    return read_entries(path, document["entries"], entry_examples)


def read_entries(path: str | Path, entries: list[Any], examples_of: Any) -> list[Example]:
    """The examples of all entries of a JSON file.

    Args:
        examples_of: makes the examples of one entry; a KeyError, TypeError, ValueError or
            AttributeError means that the entry has an unexpected shape.

    Raises:
        UserError: an entry has an unexpected shape (with its number, from 1), or there are no
            examples.
    """
    examples: list[Example] = []
    for number, entry in enumerate(entries, start=1):
        try:
            examples += examples_of(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}: entry {number} has not the shape of this dataset ({reason}); fix or "
                "remove it"
            ) from error
    if not examples:
        raise UserError(f"{path}: no examples in it; give a file with some")
    return examples


TASK = Task(
    name="webnlg",
    read_file=read,
    metrics=METRICS,
    splits={
        "train": ("train.json", "train.jsonl"),
        "valid": ("valid.json", "dev.json", "valid.jsonl"),
        "test": ("test.json", "test.jsonl"),
    },
)
