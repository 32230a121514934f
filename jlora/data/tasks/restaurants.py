"""The built-in corpus: restaurant descriptions from a small grammar, with E2E's slots and format.

The demo and the tests use it where E2E itself is not available. Names, words and sentences were
made up for this project. Every input has `REFERENCES` different texts, no input is in two splits,
and the corpus is the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from jlora.data.batches import Example
from jlora.data.tasks import Task, e2e
from jlora.system.errors import UserError
from jlora.system.files import write_text

# Inputs of each split; test and valid are drawn first: they stay the same if train grows.
INPUTS = {"test": 100, "valid": 60, "train": 600}
REFERENCES = 5

VALUES = {
    "name": (
        "Copper Kettle", "The Blind Heron", "Saffron Yard", "The Quiet Otter", "Bramble & Rye",
        "Lantern House", "The Tin Whistle", "Marigold", "The Salt Barrel", "Juniper Room",
        "The Paper Boat", "Old Foundry", "Pepper Lane", "The Grey Mare", "Nettle and Thyme",
        "The Ninth Wave", "Plum Street", "The Weavers", "Harvest Moon", "The Lost Anchor",
    ),
    "Type": ("restaurant", "pub", "coffee shop", "bistro"),
    "food": ("Thai", "Greek", "Indian", "Spanish", "Turkish", "English", "Korean", "Italian"),
    "price": (
        "cheap", "moderate", "high", "less than £ 15", "£ 15 - 25", "more than £ 25",
    ),
    "customer rating": ("low", "average", "high", "2 out of 5", "3 out of 5", "5 out of 5"),
    "area": ("riverside", "city centre", "old town", "harbour"),
    "family friendly": ("yes", "no"),
    "near": (
        "Mill Bridge", "Corner Bookshop", "Swan Theatre", "North Station", "Chapel Green",
        "Garden Museum", "Fisher's Wharf", "Linden Park", "Market Cross", "Rope Walk",
    ),
}  # fmt: skip

# The number of slots of an input besides its name is drawn from this list.
_SLOT_COUNTS = (2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 7)


class _Dice:
    """Random draws, from ``random()`` alone: no other method is the same in all Python versions."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def below(self, count: int) -> int:
        return int(self._random.random() * count)

    def choice(self, options: Sequence):
        return options[self.below(len(options))]

    def shuffled(self, items: Sequence) -> list:
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(len(pool))]


def corpus(split: str, seed: int = 0) -> list[Example]:
    """The examples of one split, with the references of an input next to each other.

    Raises:
        UserError: there is no such split.
    """
    if split not in INPUTS:
        raise UserError(f"the built-in corpus has no split {split!r}; it has {', '.join(INPUTS)}")
    dice = _Dice(seed)
    seen: set[str] = set()
    for name, count in INPUTS.items():
        examples = []
        for _ in range(count):
            slots = _draw_input(dice)
            while prompt_of(slots) in seen:
                slots = _draw_input(dice)
            seen.add(prompt_of(slots))
            texts: list[str] = []
            while len(texts) < REFERENCES:
                text = describe(slots, dice)
                if text not in texts:
                    texts.append(text)
            examples += [Example(prompt_of(slots), text) for text in texts]
        if name == split:
            break
    return examples


def write_corpus(folder: str | Path, seed: int = 0) -> None:
    """Write train.txt, valid.txt and test.txt as the task e2e reads them.

    Raises:
        UserError: the folder cannot be written.
    """
    for split in INPUTS:
        lines = [f"{each.prompt}||{each.completion}\n" for each in corpus(split, seed)]
        write_text(Path(folder) / f"{split}.txt", "".join(lines))


def prompt_of(slots: dict[str, str]) -> str:
    """``name : Marigold | Type : pub``."""
    return " | ".join(f"{slot} : {value}" for slot, value in slots.items())


def _draw_input(dice: _Dice) -> dict[str, str]:
    others = [slot for slot in VALUES if slot != "name"]
    taken = dice.shuffled(others)[: dice.choice(_SLOT_COUNTS)]
    return {slot: dice.choice(VALUES[slot]) for slot in VALUES if slot == "name" or slot in taken}


# The grammar -----------------------------------------------------------------------------------


def describe(slots: dict[str, str], dice: _Dice) -> str:
    """One text with all slots: an opening sentence, then sentences for the slots not in it."""
    left = {slot: value for slot, value in slots.items() if slot not in ("name", "Type")}
    noun = _noun_phrase(slots, left, dice)
    place = _place_phrase(left, dice)
    sentences = [_opening(slots["name"], noun, place, dice)]
    rest = dice.shuffled([_predicate(slot, value, dice) for slot, value in left.items()])
    while rest:
        count = 1 + dice.below(3)
        group, rest = rest[:count], rest[count:]
        subject = dice.choice(("It", "It", "The place", slots["name"]))
        sentences.append(f"{subject} {_joined(group)} .")
    return " ".join(sentences)


def _opening(name: str, noun: str, place: str, dice: _Dice) -> str:
    if not place:
        return dice.choice(
            (
                f"{name} is {noun} .",
                f"There is {noun} called {name} .",
                f"If you look for {noun} , try {name} .",
            )
        )
    return dice.choice(
        (
            f"{name} is {noun} {place} .",
            f"{name} , {place} , is {noun} .",
            f"There is {noun} {place} called {name} .",
            f"{place[0].upper()}{place[1:]} you will find {name} , {noun} .",
        )
    )


def _noun_phrase(slots: dict[str, str], left: dict[str, str], dice: _Dice) -> str:
    """``an expensive Thai pub``; removes its slots from ``left``."""
    words = []
    if left.get("family friendly") == "yes" and dice.below(3) == 0:
        del left["family friendly"]
        words.append(dice.choice(("family friendly", "child friendly")))
    adjectives = {
        "cheap": ("cheap", "low - priced"),
        "moderate": ("moderately priced", "mid - priced"),
        "high": ("expensive", "high - priced"),
    }
    if left.get("price") in adjectives and dice.below(2):
        words.append(dice.choice(adjectives[left.pop("price")]))
    if "food" in left and dice.below(2):
        words.append(left.pop("food"))
    words.append(slots.get("Type") or dice.choice(("place to eat", "venue", "eatery")))
    article = "an" if words[0][0] in "aeiouAEIOU" else "a"
    return f"{article} {' '.join(words)}"


def _place_phrase(left: dict[str, str], dice: _Dice) -> str:
    """``in the old town near Rope Walk``, or nothing; removes its slots from ``left``."""
    parts = []
    if "area" in left and dice.below(3):
        parts.append(_area(left.pop("area"), dice))
    if "near" in left and dice.below(3):
        parts.append(f"{dice.choice(('near', 'close to', 'next to'))} {left.pop('near')}")
    return " ".join(parts)


def _area(area: str, dice: _Dice) -> str:
    phrases = {
        "riverside": ("by the river", "on the riverside"),
        "harbour": ("at the harbour", "in the harbour area"),
    }
    return dice.choice(phrases.get(area, (f"in the {area}", f"in the {area} area")))


def _predicate(slot: str, value: str, dice: _Dice) -> str:
    if slot == "food":
        return dice.choice((f"serves {value} food", f"offers {value} dishes"))
    if slot == "area":
        return f"{dice.choice(('is', 'lies'))} {_area(value, dice)}"
    if slot == "near":
        return dice.choice((f"is not far from {value}", f"is close to {value}"))
    if slot == "family friendly":
        if value == "yes":
            return dice.choice(("is family friendly", "welcomes children", "is good for families"))
        return dice.choice(("is not family friendly", "is for adults only"))
    if slot == "customer rating":
        if value[0].isdigit():
            return dice.choice(
                (f"is rated {value} by customers", f"has a customer rating of {value}")
            )
        article = "an" if value == "average" else "a"
        return dice.choice((f"has {article} {value} customer rating", f"gets {value} ratings"))
    if value in ("cheap", "moderate", "high"):
        noun = {"cheap": "low", "moderate": "moderate", "high": "high"}[value]
        return dice.choice((f"has {noun} prices", f"has prices that are {noun}"))
    return dice.choice((f"charges {value}", f"has meals for {value}"))


def _joined(predicates: list[str]) -> str:
    if len(predicates) == 1:
        return predicates[0]
    return f"{' , '.join(predicates[:-1])} and {predicates[-1]}"


TASK = Task(
    name="restaurants",
    read_file=e2e.read,
    metrics=e2e.TASK.metrics,
    splits={split: (f"{split}.txt",) for split in ("train", "valid", "test")},
    built_in=corpus,
)
