"""Processes that do rounds of work on request, and running several of them in alternation."""

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
        name: its name in the table.
        module: a module of this folder; its ``make(spec)`` returns a function that does one round.
        environment: "jlora" or "torch".
        spec: the arguments of ``make``, as JSON values.
        most_rounds: limit for a slow side, which also has only one warm-up round; None: no limit.
        apart: run it after the others have ended, because it needs most of the machine's memory.
        variables: environment variables of its process.
        part: share of the work that a round does; ``median`` is what all of it would take.
        seconds: of every round except warm-up rounds.
        first_seconds: of the first round, including compilation.
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
        self.peak_mb, self.extra = answer["peak_mb"], {**self.extra, **answer["extra"]}
        return answer["seconds"]

    def stop(self) -> int:
        """End the process and return its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        return code

    def _ask(self, what: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading its output below fails
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit code {self.stop()}")


def alternate(sides: list[Side], rounds: int, warmup: int = 2) -> None:
    """Start all sides, warm up, and do rounds in turn; then the sides ``apart``, one by one."""
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


def gpu_megabytes() -> float:
    """Memory of the card in use, of all programs together."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])


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
