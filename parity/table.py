"""The table of results: each row with its worst case and whether it passed; Markdown and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from jlora.system.machine import cpu_model
from parity.case import Case, Outcome


@dataclass
class Line:
    """A row of the table: the cases in it and the worst of them."""

    topic: str
    row: str
    cases: int
    failed: int
    absolute: float
    relative: float
    tolerance: str
    worst: str

    @property
    def verdict(self) -> str:
        return "ok" if not self.failed else f"FAIL ({self.failed} of {self.cases})"


def make_lines(topic: str, outcomes: Sequence[tuple[Case, Outcome]]) -> list[Line]:
    """The rows, in the order of their first cases."""
    rows: dict[str, list[tuple[Case, Outcome]]] = {}
    for case, outcome in outcomes:
        rows.setdefault(case.row, []).append((case, outcome))
    lines = []
    for row, members in rows.items():
        case, worst = max(members, key=lambda m: (not m[1].passed, m[1].relative))
        lines.append(
            Line(
                topic,
                row,
                len(members),
                sum(not outcome.passed for _, outcome in members),
                max(outcome.absolute for _, outcome in members),
                worst.relative,
                "equal" if case.relative_to == "exact" else f"{case.tolerance:g}",
                f"{case.name}: {worst.problem or worst.where}",
            )
        )
    return lines


def markdown(lines: Sequence[Line]) -> str:
    """The table as Markdown, with aligned columns for reading in a terminal."""
    header = ("topic", "case", "cases", "largest diff", "relative", "tolerance", "verdict")
    body = [
        (x.topic, x.row, str(x.cases), f"{x.absolute:.1e}", f"{x.relative:.1e}", x.tolerance,
         x.verdict)
        for x in lines
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *body)]
    rows = [header, tuple("-" * width for width in widths), *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in rows
    )


def heading(seed: int, versions: dict[str, str]) -> str:
    """The machine and package versions with which the table was made."""
    ours = {"jittor": importlib.metadata.version("jittor")}
    named = ", ".join(f"{name} {version}" for name, version in {**ours, **versions}.items())
    return (
        f"`make parity SEED={seed}`, {date.today()}, {cpu_model()}, "
        f"Python {platform.python_version()}, {named}"
    )


def write(folder: Path, seed: int, versions: dict[str, str], lines: Sequence[Line]) -> None:
    """table.md and table.json in ``folder``."""
    text = f"{heading(seed, versions)}\n\n{markdown(lines)}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    values = {"seed": seed, "versions": versions, "rows": [asdict(line) for line in lines]}
    (folder / "table.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
