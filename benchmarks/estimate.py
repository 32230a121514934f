"""Estimated and measured memory of finished runs: ``python -m benchmarks.estimate RUN...``

A run folder has its recipe and, in environment.json, the peak memory of its process. The exit code
is 1 if an estimate is off by more than a fifth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jlora.report import environment
from jlora.runs.memory_check import estimate_recipe, measure_texts
from jlora.runs.memory_estimate import MIB
from jlora.runs.recipe import load_recipe

TOLERANCE = 0.2


def main(runs: list[str]) -> int:
    rows, worst = [], 0.0
    for run in runs:
        recipe = load_recipe(Path(run) / "config.yaml")
        measured = environment.read(run)["peak_memory_bytes"]
        found = estimate_recipe(recipe, measure_texts(recipe))
        off = found.process_peak / measured - 1
        worst = max(worst, abs(off))
        stage = max(found.stages, key=lambda name: found.total(name, java=False))
        rows.append(
            f"| {Path(run).name} | {stage} | {found.batch.tokens:,} "
            f"| {found.process_peak / MIB:,.0f} | {measured / MIB:,.0f} | {off:+.0%} |"
        )
    print("| run | largest stage | tokens a batch | estimated, MiB | measured, MiB | off |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    sys.exit(main(parser.parse_args().runs))
