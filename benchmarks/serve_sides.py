"""The competitors of `benchmarks.serve`: processes that have a model and its adapters in memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.serve_client import Answer, all_at_once
from benchmarks.serve_inputs import Inputs
from benchmarks.sides import PYTHON, ROOT, outside
from jlora.system.machine import processors

PYTHONS = {
    "jlora": PYTHON["jlora"],
    "llama.cpp": PYTHON["llamacpp"],
    "mlx-lm": PYTHON["mlx"],
    "PEFT": PYTHON["peft"],
}
START = 300  # seconds that a server may take to start


@dataclass
class Round:
    """A measurement: seconds in all, to the first token (median of the streams), and a step."""

    seconds: float
    first: float
    step: float


@dataclass
class Side:
    """A server, and what it has been measured at.

    Attributes:
        most: (streams, adapters) that are not too slow for it, or that it cannot have.
        tokens: of an answer; fewer for a slow side, whose seconds are then extrapolated.
        rounds: scenario -> measurements.
    """

    name: str
    most: tuple[int, int] = (64, 64)
    tokens: int | None = None
    rounds: dict[tuple[int, int], list[Round]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    address: str = ""
    log: Path | None = None

    @property
    def kind(self) -> str:
        return self.name.split()[0]

    def start(self, inputs: Inputs, adapters: int, streams: int, context: int, log: Path) -> None:
        numbers = range(min(adapters, self.most[1]))
        spec = {"streams": streams, "context": context, "threads": processors()}
        python, variables = str(PYTHONS[self.kind]), {}
        if self.kind == "jlora":
            self.address = f"http://127.0.0.1:{free_port()}"
            command = [python, "-m", "jlora", "serve", str(inputs.model), "--precision", "bf16"]
            command += ["--port", self.address.rpartition(":")[2]]
            for number in numbers:
                command += ["--adapter", f"{number}={inputs.adapter(number)}"]
        elif self.kind == "llama.cpp":
            spec["model"] = str(inputs.gguf(self.name.split()[1]))
            spec["lora"] = [str(inputs.gguf_adapter(number)) for number in numbers]
            command = [python, "-m", "benchmarks.serve_llamacpp", json.dumps(spec)]
        elif self.kind == "mlx-lm":
            self.address = f"http://127.0.0.1:{free_port()}"
            command = [python, "-m", "mlx_lm", "server", "--model", str(inputs.model)]
            command += ["--adapter-path", str(inputs.mlx_adapter()), "--prompt-cache-size", "1"]
            command += ["--port", self.address.rpartition(":")[2], "--log-level", "WARNING"]
            command += ["--decode-concurrency", "64", "--prompt-concurrency", "64"]
            for library in (PYTHONS[self.kind].parents[1] / "lib").glob("libmkl_rt.so*"):
                variables["LD_PRELOAD"] = str(library)  # the BLAS of its wheel is netlib's
        else:
            spec["model"] = str(inputs.model)
            spec["adapters"] = [str(inputs.adapter(number)) for number in numbers]
            command = [python, "-W", "ignore", "-m", "benchmarks.serve_torch", json.dumps(spec)]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, text=True, env={**outside(), **variables}, stderr=errors,
                stdin=subprocess.PIPE, stdout=errors if self.address else subprocess.PIPE,
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + START
        if not self.address:
            for line in self.process.stdout:
                if line.startswith("{"):
                    self.address = json.loads(line)["address"]
                    return
        while self.address and time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
                if self.ask(["a"], [0], 1)[0].tokens is not None:
                    return
            time.sleep(0.2)
        raise self.broken("does not answer")

    def broken(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self.name} {what}:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()

    def body(self, prompt: str, adapter: int, tokens: int) -> dict:
        body = {
            "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True}, "model": "default_model",
        }  # fmt: skip
        if self.kind == "jlora":
            body["model"] = str(adapter)
        elif self.kind == "llama.cpp":
            lora = [{"id": adapter, "scale": 1.0}]
            body |= {"lora": lora, "ignore_eos": True, "top_k": 1, "cache_prompt": False}
        return body

    def ask(self, prompts: Sequence[str], adapters: Sequence[int], tokens: int) -> list[Answer]:
        bodies = [self.body(prompt, each, tokens) for prompt, each in zip(prompts, adapters)]
        return asyncio.run(all_at_once(self.address, bodies))

    def round(self, prompts: Sequence[str], adapters: Sequence[int], tokens: int) -> Round:
        """Measure one batch of streams.

        Raises:
            RuntimeError: an answer is missing or has another length.
        """
        asked = min(tokens, self.tokens or tokens)
        if self.kind == "PEFT":
            job = {"prompts": prompts, "adapters": adapters, "tokens": asked}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise self.broken("has ended")
            times = json.loads(line)
            step = (times[-1] - times[0]) / max(asked - 1, 1)
            return extrapolated(Round(times[-1], times[0], step), asked, tokens)
        answers = self.ask(prompts, adapters, asked)
        for answer in answers:
            if answer.tokens != asked:
                raise self.broken(f"wrote {answer.tokens} tokens ({answer.error})")
        seconds = max(a.times[-1] for a in answers) - min(a.sent for a in answers)
        first = statistics.median(answer.first for answer in answers)
        step = statistics.median(answer.step for answer in answers)
        return extrapolated(Round(seconds, first, step), asked, tokens)


def extrapolated(measured: Round, asked: int, tokens: int) -> Round:
    """The round as it would be with answers of so many tokens."""
    return Round(measured.seconds + (tokens - asked) * measured.step, measured.first, measured.step)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
