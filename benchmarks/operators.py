"""The number of operators that Jittor compiles for a training step, and for other shapes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks import jlora_train, work
from benchmarks.sides import Side

#: (rows, tokens in a row) of the steps: the first compiles, the second has the same shape and must
#: not, the others have other numbers of rows and tokens. A single row is a separate case: operators
#: that broadcast over the rows become different operators.
SHAPES = {"first": [(8, 64)], "same": [(8, 64)], "other": [(4, 128), (3, 61), (16, 30), (2, 500)],
          "one row": [(1, 300)]}  # fmt: skip


def make(spec: dict):
    """One round builds the model and takes steps of all ``SHAPES`` with an empty cache.

    Jittor's cache has one library file for each distinct operator, so the files that a step adds to
    an empty folder are what it compiles on a new machine. jlora's own library, compiled once for
    all models, is loaded before.
    """
    from jlora.kernels import native
    from jlora.system.runtime import jt

    native.library()

    def round_():
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch)
            for name in ("jit", "tmp"):
                (cache / name).mkdir()
            before, jt.flags.cache_path = jt.flags.cache_path, scratch
            try:
                return count(cache)
            finally:
                jt.flags.cache_path = before

    def count(cache: Path) -> dict:
        def compiled() -> int:
            jt.sync_all(True)
            return sum(1 for _ in (cache / "jit").rglob("*.so"))

        shapes = [shape for group in SHAPES.values() for shape in group]
        lengths = [np.full(rows, tokens) for rows, tokens in shapes]
        rng, vocabulary = np.random.default_rng(0), spec["config"]["vocab_size"]
        path = cache / "batches.npz"
        work.write_batches(path, rng, vocabulary, lengths, [tokens // 2 for tokens in lengths])
        step = jlora_train.make({**spec, "batches": str(path)})
        found, so_far = {"model": compiled()}, compiled()
        for name, group in SHAPES.items():
            for _ in group:
                step()
            found[name], so_far = compiled() - so_far, compiled()
        return found

    return round_


def describe(model: str, precision: str) -> tuple[str, dict]:
    """A line about one model, and the counts: model, first step, same shape, others, one row."""
    settings = {"lora": work.lora_settings(model), "label_smoothing": 0.1}
    spec = {"config": work.MODELS[model], "precision": precision, **settings}
    side = Side(f"jlora {precision}", "operators", "jlora", spec)
    side.start()
    seconds = side.round()
    side.stop()
    found = side.extra
    line = (
        f"{model}, jlora {precision}: {found['model'] + found['first']} operators compiled, "
        f"{found['model']} for the model and {found['first']} for the first step; more for the "
        f"same shape {found['same']}, for other B and T {found['other']}, for B = 1 "
        f"{found['one row']} ({seconds:.0f} s with an empty cache)"
    )
    return line, found


def main() -> None:
    for model in work.MODELS:
        print(describe(model, "bf16")[0], flush=True)
