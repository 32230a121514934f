"""``make bench ARGS=scale``: time and memory of a step, by tokens in a batch and by row length T.

Every point has new processes, since the peak memory of a process only grows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import work
from benchmarks.sides import alternate, check
from benchmarks.training import add_options, begin, training_sides


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", nargs="+", default=["gpt2-small"], choices=work.MODELS)
    options.add_argument("--tokens", nargs="*", type=int, default=[2**i for i in range(6, 14)],
                         help="tokens in a batch, in rows of --row")  # fmt: skip
    options.add_argument("--row", type=int, default=64)
    options.add_argument("--lengths", nargs="*", type=int, default=[2**i for i in range(6, 11)],
                         help="T, the tokens of a row, in batches of --batch tokens")  # fmt: skip
    options.add_argument("--batch", type=int, default=4096)
    add_options(options, peers=["PEFT bf16", "PEFT bf16, memory kept"])
    options.set_defaults(precisions=["bf16"])
    options.add_argument("--rounds", type=int, default=5)
    chosen, peak = begin(options)
    results = []
    for model in chosen.models:
        if chosen.tokens:
            print(f"\n{model}, rows of {chosen.row} tokens")
            shapes = [(max(1, tokens // chosen.row), chosen.row) for tokens in chosen.tokens]
            points = [measure_point(model, *shape, chosen, peak) for shape in shapes]
            print_straightness(points)
            results += points
        if chosen.lengths:
            print(f"\n{model}, batches of {chosen.batch} tokens in rows of T")
            shapes = [(max(1, chosen.batch // T), T) for T in chosen.lengths]
            points = [measure_point(model, *shape, chosen, peak) for shape in shapes]
            print_growth(points)
            results += points
    (chosen.out / "scale.json").write_text(json.dumps(results, indent=1))


def measure_point(model: str, rows: int, length: int, chosen, peak: float) -> dict:
    """Run all sides on batches of ``rows`` rows of ``length`` tokens and print their lines."""
    config, tokens = work.MODELS[model], rows * length
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "batches.npz"
        work.even_batches(path, config["vocab_size"], rows, length)
        sides = training_sides(model, path, chosen)
        alternate(sides, chosen.rounds)
        check(sides)
        targets = int(np.load(path)["mask0"].sum())
    flops = work.training_flops(config, np.full(rows, length), targets)
    for side in sides:
        print(
            f"{tokens:6} tokens, {rows:3} x {length:4}  {side.name:23} {side.median:8.3f} s/step "
            f"{tokens / side.median:6.0f} tokens/s  MFU {flops / side.median / peak:5.1%} "
            f"{side.peak_mb:6.0f} MB  ratio {side.median / sides[0].median:5.2f}",
            flush=True,
        )
    return {
        "model": model, "rows": rows, "length": length, "tokens": tokens, "flops": flops,
        "peak_flops": peak,
        "sides": {
            s.name: {"median": s.median, "seconds": s.seconds, "peak_mb": s.peak_mb, "part": s.part}
            for s in sides
        },
    }  # fmt: skip


def print_straightness(points: list[dict]) -> None:
    """How far each side's times over the number of tokens are from a straight line."""
    tokens = [point["tokens"] for point in points]
    for name in common_sides(points):
        seconds = [point["sides"][name]["median"] for point in points]
        each = relative_cost(tokens, seconds)
        print(f"{name}: time a token, relative to the best: {listed(tokens, each)}")
        if len(points) > 2:
            fixed, slope, off = straight_line(tokens, seconds)
            print(
                f"{name}: nearest line {fixed * 1e3:.0f} ms + {slope * 1e3:.3f} ms a token; "
                f"the points are off it by {listed(tokens, off, '+.0%')}"
            )
            memory = [point["sides"][name]["peak_mb"] for point in points]
            fixed, slope, off = straight_line(tokens, memory)
            print(
                f"{name}: memory {fixed:.0f} MB + {slope * 1e3:.0f} kB a token; "
                f"off by {listed(tokens, off, '+.0%')}"
            )


def print_growth(points: list[dict]) -> None:
    """Each side's time for a token by T, relative to the first, and the expected arithmetic."""
    lengths, tokens = ([point[key] for point in points] for key in ("length", "tokens"))
    predicted = growth(tokens, [point["flops"] for point in points])
    print(f"by the arithmetic, a token costs: {listed(lengths, predicted)}")
    for name in common_sides(points):
        each = growth(tokens, [point["sides"][name]["median"] for point in points])
        print(f"{name}, time a token: {listed(lengths, each)}")


def growth(tokens: list[int], cost: list[float]) -> np.ndarray:
    """Cost a token at each point, relative to the first point."""
    each = np.array(cost) / tokens
    return each / each[0]


def common_sides(points: list[dict]) -> list[str]:
    """The sides that all points have; a scaled side has another name where the whole batch fits."""
    return [name for name in points[0]["sides"] if all(name in point["sides"] for point in points)]


def listed(keys, values, form: str = ".2f") -> str:
    return ", ".join(f"{key}: {value:{form}}" for key, value in zip(keys, values))


def relative_cost(tokens, seconds) -> np.ndarray:
    """Seconds a token at each point, relative to the cheapest point."""
    each = np.array(seconds) / np.array(tokens)
    return each / each.min()


def straight_line(x, y) -> tuple[float, float, np.ndarray]:
    """The line ``a + b x`` with the least squares of relative errors; y must be above 0.

    Returns:
        a, b, and the relative distance of each point above the line.
    """
    x, y = np.array(x, float), np.array(y, float)
    a, b = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)[0]
    return float(a), float(b), y / (a + b * x) - 1


if __name__ == "__main__":
    main()
