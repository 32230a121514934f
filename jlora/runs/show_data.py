"""`jlora data show`: the examples of a training as the model sees them, and what of them counts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jlora.data.batches import TokenExample
from jlora.runs.run_data import RunData
from jlora.system.console import has_colours
from jlora.system.files import read_text

#: Round what is trained, with colour (green, and back) and without.
COLOUR, PLAIN = ("\x1b[32m", "\x1b[0m"), ("\u27e6", "\u27e7")
BINS, WIDTH = 8, 40
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def uses_colour(choice: str) -> bool:
    """Whether to print colours: ``always``, ``never``, or ``auto``: on a terminal that wants it."""
    if choice != "auto":
        return choice == "always"
    return has_colours(sys.stdout)


def view(data: RunData, count: int, colour: bool) -> str:
    """The first examples of the training data, counts and lengths, as text for a terminal."""
    begin, end = COLOUR if colour else PLAIN
    lines = []
    for number, example in enumerate(data.train[:count], start=1):
        lines.append(f"--- example {number}: {_size(example)}")
        text = ""
        for piece, is_trained in pieces(example, data.tokenizer):
            text += f"{begin}{_safe(piece)}{end}" if is_trained else _safe(piece)
        lines.append(text.rstrip("\n"))
    lines += ["---", *_totals(data), "lengths in tokens:"]
    bins = histogram([len(example.ids) for example in data.train])
    most = max(number for _, _, number in bins)
    for first, last, number in bins:
        bar = "#" * -(-number * WIDTH // most)
        lines.append(f"{first:7,} to {last:6,} {number:8,} {bar}".rstrip())
    return "\n".join(lines)


def page(data: RunData, count: int) -> str:
    """The same as one HTML page without scripts."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(read_text(Path(__file__).with_name("show_data.html.j2")))
    bins = histogram([len(example.ids) for example in data.train])
    examples = [
        (_size(example), [(_safe(text), kind) for text, kind in pieces(example, data.tokenizer)])
        for example in data.train[:count]
    ]
    return template.render(
        model=data.recipe.model,
        totals=_totals(data),
        examples=examples,
        bins=bins,
        most=max(number for _, _, number in bins),
    )


def pieces(example: TokenExample, tokenizer) -> Iterator[tuple[str, bool]]:
    """An example as texts in turn, each with whether it is trained."""
    edges = [0, *(edge for span in example.trained for edge in span), len(example.ids)]
    before = ""
    for index, edge in enumerate(edges[1:]):
        # Decoded from the beginning: some tokenizers drop the first space of a text.
        text = tokenizer.decode(example.ids[:edge], skip_special_tokens=False)
        if text != before:
            yield text[len(before) :], index % 2 == 1
        before = text


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first length, last length, how many) of bins of like width from the shortest on."""
    first, last = min(lengths), max(lengths)
    width = max(1, -(-(last - first + 1) // BINS))
    counts = np.bincount((np.asarray(lengths) - first) // width)
    return [
        (first + width * bin, min(last, first + width * (bin + 1) - 1), int(number))
        for bin, number in enumerate(counts)
    ]


def _size(example: TokenExample) -> str:
    cut = f", {example.cut:,} cut off" if example.cut else ""
    return f"{len(example.ids):,} tokens, {example.target_count:,} trained{cut}"


def _totals(data: RunData) -> list[str]:
    return [
        f"{split}: {len(getattr(data, split)):,} examples{note}"
        for split, note in data.notes.items()
    ]


def _safe(text: str) -> str:
    """Control characters written out, so that a file cannot steer the terminal."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
