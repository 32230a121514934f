"""The models that `make bench` measures, in the form that each side reads; made once and kept."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import work
from benchmarks.environments import missing
from benchmarks.serve_inputs import made
from benchmarks.sides import PYTHON, ROOT, outside


class NotMade(Exception):
    """A model cannot be converted; says why."""


@dataclass
class Inputs:
    """Where the files are; each is made when it is first asked for.

    Raises:
        NotMade: a converter failed, or its environment is missing.
    """

    folder: Path

    @property
    def adapter(self) -> Path:
        """A run that tuned SmolLM2-135M for E2E: the 100 steps of `jlora demo`."""
        settings = ["train.steps=100", "train.valid_every=0", "score_before=false"]
        parts = [part for setting in settings for part in ("--set", setting)]
        command = ["-m", "jlora", "finetune", "--recipe", "demo", *parts, "--out"]
        return made(self.folder / "tuned-run", lambda path: run("jlora", *command, path))

    @property
    def tuned(self) -> Path:
        """Its weights and SmolLM2's as one model in bf16, as transformers reads it."""
        command = ["-m", "jlora", "merge", "--dtype", "bfloat16", "smollm2-135m"]
        return made(self.folder / "tuned", lambda path: run("jlora", *command, self.adapter, path))

    def gguf(self, kind: str) -> Path:
        def export(path: Path) -> None:
            command = ["-m", "jlora", "export", self.tuned, "--gguf", path, "--type", kind]
            run("jlora", *command)
            (path.parent / "Modelfile").unlink(missing_ok=True)  # for Ollama

        return made(self.folder / f"tuned-{kind}.gguf", export)

    def ctranslate2(self, kind: str) -> Path:
        command = ["-m", "ctranslate2.converters.transformers", "--model", self.tuned]
        command += ["--quantization", kind, "--output_dir"]
        return made(
            self.folder / f"ctranslate2-{kind}", lambda path: run("ctranslate2", *command, path)
        )

    def openvino(self, kind: str) -> Path:
        command = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model"]
        command += [self.tuned, "--task", "text-generation-with-past", "--weight-format", kind]
        return made(self.folder / f"openvino-{kind}", lambda path: run("openvino", *command, path))

    def checkpoint(self, model: str) -> Path:
        """A model of `work.MODELS` with random weights, as transformers reads it."""
        from benchmarks.large import write_checkpoint

        return made(self.folder / model, lambda path: write_checkpoint(path, work.MODELS[model]))


def run(environment: str, *arguments: str | Path) -> None:
    """Run Python in an environment.

    Raises:
        NotMade: it failed; says its last line.
    """
    if missing(environment):
        raise NotMade(missing(environment))
    command = [str(PYTHON[environment]), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=outside(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"code {done.returncode}"]
        raise NotMade(f"conversion failed: {said[-1][:300]}")


def or_reason(make: Callable[[], Path]) -> tuple[str, str | None]:
    """The path that ``make`` gives, or nothing and why."""
    try:
        return str(make()), None
    except NotMade as error:
        return "", str(error)
