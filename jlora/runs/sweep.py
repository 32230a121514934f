"""`jlora sweep`: one recipe under many settings, each a run of its own, and one table of all."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.runs.recipe import find_recipe, load_recipe, parse_yaml
from jlora.system.errors import UserError
from jlora.system.files import check_writable, read_text
from jlora.runs.adapter_file import say


def grid_cases(grid: Sequence[str]) -> dict[str, list[str]]:
    """``["lora.r=1,2", "train.seed=1,2"]`` -> every combination, name -> overrides.

    Values are YAML, so that a list is written ``lora.target_modules=[q_proj],[q_proj,v_proj]``.

    Raises:
        UserError: not of the form KEY=VALUE,VALUE.
    """
    axes = []
    for axis in grid:
        key, equals, text = axis.partition("=")
        values = parse_yaml(f"[{text}]", f"--grid {axis}", lines=False) if equals else None
        if not key.strip() or not isinstance(values, list) or not values:
            raise UserError(f"--grid {axis}: write KEY=VALUE,VALUE, such as lora.r=1,2,4")
        axes.append([(key.strip(), value) for value in values])
    cases = {}
    for point in itertools.product(*axes):
        name = "_".join(f"{key.rpartition('.')[2]}-{_shown(value)}" for key, value in point)
        cases[name] = [f"{key}={json.dumps(value)}" for key, value in point]
    return cases


def file_cases(path: str | Path) -> dict[str, list[str]]:
    """Cases out of a YAML file: ``name: {setting: value, ...}``; name -> overrides.

    Raises:
        UserError: the file is not of that form.
    """
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: write `name: {{lora.r: 8, ...}}`, one case a line")
    cases = {}
    for name, settings in values.items():
        if not isinstance(settings, dict) or Path(str(name)).name != str(name):
            raise UserError(f"{path}: case {name}: write `name: {{lora.r: 8, ...}}`")
        cases[str(name)] = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return cases


def sweep(
    recipe: str, cases: Mapping[str, Sequence[str]], options: Sequence[str], out: Path
) -> dict[str, Path]:
    """Run a recipe once a case, each in a process of its own, below ``out``.

    Finished runs are left as they are and interrupted ones go on, so that a sweep is resumed by the
    same command. A run that fails does not stop the others.

    Args:
        recipe: name or path.
        cases: name -> overrides, see `grid_cases` and `file_cases`.
        options: what `jlora run` is given beside them.

    Returns:
        The folders of the finished runs by name.

    Raises:
        UserError: an override is wrong (nothing has been run then), or a run failed (all others
            have been run).
    """
    file = find_recipe(recipe)
    for overrides in cases.values():
        load_recipe(file, overrides)
    check_writable(out)
    finished, failed = {}, []
    for number, (name, overrides) in enumerate(cases.items(), start=1):
        run = out / name
        say(f"sweep {number} of {len(cases)}: {name}")
        if is_finished(run):
            finished[name] = run
            continue
        command = [sys.executable, "-m", "jlora.cli", "run"]
        if (run / "config.yaml").is_file():
            command += ["--resume", "--out", str(run)]
        else:
            command += [str(file), "--out", str(run), *options]
            for override in overrides:
                command += ["--set", override]
        code = subprocess.run(command, check=False).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code == 0:
            finished[name] = run
        else:
            failed.append(name)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cases)} runs failed: {', '.join(failed)}; their messages stand "
            f"above. The same command goes on with what is missing in {out}"
        )
    return finished


def is_finished(run: Path) -> bool:
    """Whether a run has the scores of its tuned model."""
    try:
        return "after" in json.loads(read_text(run / "scores.json"))
    except (UserError, ValueError, TypeError):
        return False


def _shown(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in str(value))
