"""Processes that do rounds of work on demand, and the alternation of several of them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = {
    "jlora": ROOT / ".venv" / "bin" / "python",
    "torch": ROOT / ".venv-parity" / "bin" / "python",
}


@dataclass
class Side:
    """A competitor.

    Attributes:
        name: what the table calls it.
        module: of this folder; its ``make(spec)`` gives a function that does one round.
        environment: "jlora" or "torch".
        spec: what ``make`` needs, as JSON holds it.
        most_rounds: of a slow side, which also warms up by one round only; None: as the others.
        apart: it runs when the others have ended, because its memory fills the machine.
        variables: environment variables of its process.
        part: share of the work that a round does; ``median`` is what all of it would take.
        seconds: of every round but the warm-up ones.
        first_seconds: of the very first round, compilation included.
        peak_mb: largest resident memory of the process.
    """

    name: str
    module: str
    environment: str
    spec: dict
    most_rounds: int | None = None
    apart: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    part: float = 1.0
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_mb: float = 0.0
    extra: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) / self.part

    def start(self) -> None:
        command = [PYTHON[self.environment], "-W", "ignore", "-m", "benchmarks.sides", self.module]
        self.process = subprocess.Popen(
            [*command, json.dumps(self.spec)], cwd=ROOT, text=True,
            env={**os.environ, **self.variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._ask("ready")

    def round(self) -> float:
        answer = self._ask("round")
        self.peak_mb, self.extra = answer["peak_mb"], answer["extra"]
        return answer["seconds"]

    def stop(self) -> int:
        """End the process; its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        return code

    def _ask(self, what: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has died: its output ends below
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit code {self.stop()}")


def alternate(sides: list[Side], rounds: int, warmup: int = 2) -> None:
    """Start all sides, let each warm up, then do rounds in turn; those apart one by one after."""
    for group in [[s for s in sides if not s.apart], *([s] for s in sides if s.apart)]:
        for side in group:
            side.start()
            side.first_seconds = side.round()
            for _ in range(warmup - 1 if side.most_rounds is None else 0):
                side.round()
        for done in range(rounds):
            for side in group:
                if side.most_rounds is None or done < side.most_rounds:
                    side.seconds.append(side.round())
        for side in group:
            side.stop()


def serve(module: str, spec: dict) -> None:
    """A side's process: a round for every line on standard input."""
    work = importlib.import_module(f"benchmarks.{module}").make(spec)
    for line in sys.stdin:
        answer = {}
        if line.strip() == "round":
            started = time.perf_counter()
            extra = work()
            answer = {
                "seconds": time.perf_counter() - started,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "extra": extra or {},
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
