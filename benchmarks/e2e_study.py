"""What changes BLEU on E2E, from finished runs, without training or decoding.

    python -m benchmarks.e2e_study runs/study/lora [runs/study/smoothing-0 ...]

prints a table of all runs with validation loss (by which the paper selects) and BLEU, and for the
first run its scores under other length penalties (its hypotheses ranked again), with fewer
references, and with the plain references of the official CSV instead of the tokenised ones.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from jlora.data.tasks import get_task
from jlora.decoding.predictions import read_predictions, rerank
from jlora.metrics import evaluate
from jlora.report.runs import read_run
from jlora.report.tables import METRICS, markdown_table

NAMES = ("BLEU", "NIST")  # those that need no Java
PENALTIES = (0.0, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", help="folder with E2E's files (default: the usual places)")
    arguments = parser.parse_args()
    print(runs_table(arguments.runs))
    study = Study(arguments.runs[0], arguments.data)
    for title, rows in (
        ("length penalty", study.penalties()),
        ("references of an input", study.references()),
        ("texts", study.texts()),
    ):
        print(f"\n{title}, {arguments.runs[0].name}\n")
        print(markdown_table(rows))


def runs_table(folders: Sequence[Path]) -> str:
    """One row for each run: validation loss and the five scores."""
    known = [metric for metric in METRICS if metric.key in get_task("e2e").metrics]
    cells = [["run", "valid. loss", *(metric.label for metric in known)]]
    for folder in folders:
        run = read_run(folder)
        scores = run.after
        loss = "" if run.best_valid_loss is None else f"{run.best_valid_loss:.4f}"
        cells.append(
            [folder.name, loss, *(metric.text(scores.get(metric.key)) for metric in known)]
        )
    return markdown_table(cells)


class Study:
    """The predictions of a run, scored in several ways."""

    def __init__(self, run: Path, data: str | None):
        self.predictions = read_predictions(run / "predictions.jsonl")
        task = get_task("e2e")
        self.references_of = {g.prompt: g.references for g in task.groups(task.load(data, "test"))}
        csv = task.find_data(data, "test").with_name("testset_w_refs.csv")
        groups = task.groups(task.read(csv)) if csv.is_file() else []
        self.plain_of = {group.prompt: group.references for group in groups}

    def penalties(self) -> list[list[str]]:
        rows = [["penalty", *NAMES, "words an answer"]]
        for penalty in PENALTIES:
            texts = [p.prediction for p in rerank(self.predictions, penalty)]
            words = sum(len(text.split()) for text in texts) / len(texts)
            rows.append([f"{penalty}", *self._scores(texts, self._tokenised()), f"{words:.2f}"])
        return rows

    def references(self) -> list[list[str]]:
        texts = [p.prediction for p in self.predictions]
        rows = [["references", *NAMES]]
        for count in (1, 2, 4, 8, None):
            groups = [group[:count] for group in self._tokenised()]
            mean = sum(map(len, groups)) / len(groups)
            label = f"at most {count}" if count else "all"
            rows.append([f"{label} (mean {mean:.2f})", *self._scores(texts, groups)])
        return rows

    def texts(self) -> list[list[str]]:
        texts = [p.prediction for p in self.predictions]
        rows = [["answers", "references", *NAMES]]
        rows.append(["tokenised", "tokenised", *self._scores(texts, self._tokenised())])
        if self.plain_of:
            plain = [self.plain_of[p.prompt] for p in self.predictions]
            rows.append(["tokenised", "plain", *self._scores(texts, plain)])
            joined = [detokenise(text) for text in texts]
            rows.append(["joined up", "plain", *self._scores(joined, plain)])
        return rows

    def _tokenised(self) -> list[list[str]]:
        return [self.references_of[p.prompt] for p in self.predictions]

    @staticmethod
    def _scores(texts: list[str], references: list[list[str]]) -> list[str]:
        known = {metric.key: metric for metric in METRICS}
        scores = evaluate(NAMES, texts, references)
        return [f"{scores[name] * known[name].scale:.2f}" for name in NAMES]


def detokenise(text: str) -> str:
    """Remove the spaces that E2E's text files have around punctuation."""
    text = re.sub(r"\s+([.,;:!?)])", r"\1", text)
    text = re.sub(r"([(£])\s+", r"\1", text)
    text = re.sub(r"\s+('|n't\b)", r"\1", text)
    return re.sub(r"(?<=\w)\s+-\s+(?=\w)", "-", text)


if __name__ == "__main__":
    main()
