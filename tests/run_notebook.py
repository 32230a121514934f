"""Runs a notebook's cells in this process.

``python -m tests.run_notebook FILE`` also stores in the file what they print.

Jupyter's own machinery (a kernel, a message bus) would be five packages and seconds for text alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored(cell: dict) -> str:
    """The text that the cell printed when the notebook was saved."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def run(notebook: dict) -> list[str]:
    """What each code cell prints, one after another in one namespace."""
    names: dict = {"__name__": "__main__"}
    printed = []
    for cell in code_cells(notebook):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), "<cell>", "exec"), names)
        printed.append(out.getvalue())
    return printed


def main(path: Path) -> None:
    notebook = read(path)
    for count, (cell, text) in enumerate(zip(code_cells(notebook), run(notebook)), start=1):
        cell["execution_count"] = count
        cell["outputs"] = [{"name": "stdout", "output_type": "stream",
                            "text": text.splitlines(keepends=True)}] if text else []  # fmt: skip
        print(text, end="")
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
