"""Processes that do rounds of work on request, and running several of them in alternation."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The Python of every environment; the Makefile makes each from benchmarks/requirements/NAME.txt.
PYTHON = {
    "jlora": Path(sys.executable),
    **{
        name: (ROOT / f".venv-{name}").resolve() / "bin" / "python"
        for name in ("peft", "mlx", "jittor2", "ctranslate2", "openvino", "llamacpp",
                     "llamacpp-native")
    },
}  # fmt: skip
_BEGUN = frozenset(os.environ)
LONGEST = 900  # seconds that a side may take for an answer
FEWEST = 2  # rounds of a slow side


@dataclass
class Side:
    """A competitor.

    Attributes:
        name: its name in the table.
        module: a module of this folder; its ``make(spec)`` returns a function that does one round.
            Or a file of JavaScript that answers as `serve` does.
        environment: a key of `PYTHON`.
        spec: the arguments of ``make``, as JSON values.
        most_rounds: limit for a slow side, which also has only one warm-up round; None: no limit.
        apart: run it after the others have ended, because it needs most of the machine's memory.
        variables: environment variables of its process.
        part: share of the work that a round does; ``median`` is what all of it would take.
        arguments: of every round, as JSON values.
        seconds: of every round except warm-up rounds.
        first_seconds: of the first round, including compilation.
        peak_mb: largest resident memory of the process.
        extra: what its rounds said; dictionaries among it are merged.
        problem: why it was not measured, or not to the end.
    """

    name: str
    module: str
    environment: str
    spec: dict
    most_rounds: int | None = None
    apart: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    part: float = 1.0
    arguments: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_mb: float = 0.0
    extra: dict = field(default_factory=dict)
    problem: str | None = None
    process: subprocess.Popen | None = None
    errors: Path | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) / self.part

    def start(self) -> None:
        python = PYTHON[self.environment]
        command = [python, "-W", "ignore", "-m", "benchmarks.sides", self.module]
        if self.module.endswith(".mjs"):
            command = ["node", ROOT / "benchmarks" / self.module, python.parents[1]]
        handle, name = tempfile.mkstemp(prefix="jlora-side-")
        self.errors = Path(name)
        with open(handle, "w") as errors:
            self.process = subprocess.Popen(
                [*command, json.dumps(self.spec)], cwd=ROOT, text=True, stderr=errors,
                env={**outside(), **self.variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        self._ask("ready")

    def round(self) -> float:
        asked = f"round {json.dumps(self.arguments)}" if self.arguments else "round"
        answer = self._ask(asked)
        self.peak_mb = answer["peak_mb"]
        for name, said in answer["extra"].items():
            merged = isinstance(said, dict) and name in self.extra
            self.extra[name] = {**self.extra[name], **said} if merged else said
        return answer["seconds"]

    def stop(self) -> int:
        """End the process and return its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        self.errors.unlink(missing_ok=True)
        return code

    def _ask(self, what: str) -> dict:
        watch = threading.Timer(LONGEST, self.process.kill)
        watch.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; its output below fails
                self.process.stdin.write(what + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        finally:
            watch.cancel()
        said = last_line(self.errors)
        code = self.stop()
        if code == -9 and not watch.is_alive() and not said:
            said = f"no answer within {LONGEST} seconds, or not enough memory"
        raise RuntimeError(f"{self.name} ended with exit code {code}" + (said and f": {said}"))


def outside() -> dict[str, str]:
    """The environment without what Jittor's import has set in this process, as it does where a
    model is made: peers would take over jlora's OpenMP, and another Jittor its compiler's flags."""
    from jlora.system.operator_compiler import FLAGS
    from jlora.system.runtime import environment_defaults

    ours = {*environment_defaults(), *FLAGS} - _BEGUN
    return {name: value for name, value in os.environ.items() if name not in ours}


def last_line(file: Path) -> str:
    """The last line of a log that says something."""
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def alternate(
    sides: Iterable[Side], rounds: int, warmup: int = 2, seconds: float = float("inf")
) -> None:
    """Start all sides, warm up, and do rounds in turn; then the sides ``apart``, one by one.

    A side that fails gets a `problem` and takes no further part.

    Args:
        rounds: of each side.
        warmup: rounds that do not count.
        seconds: that the rounds of a side may take; a slow one does fewer, but at least `FEWEST`.
    """
    sides = list(sides)
    for group in [[s for s in sides if not s.apart], *([s] for s in sides if s.apart)]:
        start(group)
        take_turns(group, rounds, warmup, seconds)
        stop(group)


def start(sides: Iterable[Side]) -> None:
    for side in working(sides):
        with problems_of(side):
            side.start()


def take_turns(
    sides: Iterable[Side], rounds: int, warmup: int = 2, seconds: float = float("inf")
) -> None:
    """Warm up and do rounds in turn, as `alternate`, of sides that have been started."""
    many = {}
    for side in working(sides):
        with problems_of(side):
            side.first_seconds = last = side.round()
            for _ in range(warmup - 1 if side.most_rounds is None else 0):
                last = side.round()
            many[id(side)] = min(
                rounds,
                rounds if side.most_rounds is None else side.most_rounds,
                max(FEWEST, int(min(seconds / max(last, 1e-9), rounds))),
            )
    for done in range(rounds):
        for side in working(sides):
            if done < many[id(side)]:
                with problems_of(side):
                    side.seconds.append(side.round())


def stop(sides: Iterable[Side]) -> None:
    for side in working(sides):
        side.stop()


def check(sides: Iterable[Side]) -> None:
    """Raise the problem of a side.

    Raises:
        RuntimeError: a side has one.
    """
    for side in sides:
        if side.problem is not None:
            raise RuntimeError(side.problem)


def working(sides: Iterable[Side]) -> list[Side]:
    return [side for side in sides if side.problem is None]


@contextlib.contextmanager
def problems_of(side: Side):
    try:
        yield
    except RuntimeError as error:
        side.problem = str(error)


def with_arguments(side: Side, **arguments) -> Side:
    """The same process, whose rounds have these arguments and are measured for themselves."""
    return replace(side, arguments=arguments, seconds=[], extra={})


def gpu_megabytes() -> float:
    """Memory of the card in use, of all programs together; NaN where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True).stdout.split()[0])
    except (OSError, ValueError, IndexError):
        return math.nan


def peak_mb() -> float:
    """The largest resident memory of this process so far.

    Linux's ru_maxrss would be at least that of the process which started this one.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def serve(module: str, spec: dict) -> None:
    """A side's process: a round for every line on standard input that asks for one."""
    work = importlib.import_module(f"benchmarks.{module}").make(spec)
    begun = time.monotonic()
    for line in sys.stdin:
        command, _, arguments = line.strip().partition(" ")
        answer = {}
        if command == "round":
            started = time.perf_counter()
            extra = work(**json.loads(arguments or "{}"))
            answer = {
                "seconds": time.perf_counter() - started,
                "peak_mb": peak_mb(),
                "extra": {**(extra or {}), "avx512": used_avx512(time.monotonic() - begun)},
            }
        print(json.dumps(answer), flush=True)


def used_avx512(seconds: float) -> bool | None:
    """Whether the kernel saw a thread of this process use AVX-512 in the last so many seconds.

    It looks at registers when it switches to another thread. None: it does not say.
    """
    found = []
    for file in Path("/proc/self/task").glob("*/arch_status"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += re.findall(r"AVX512_elapsed_ms:\s*(-?\d+)", file.read_text())
    times = [int(each) for each in found]
    return any(0 <= each < 1000 * seconds for each in times) if times else None


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
