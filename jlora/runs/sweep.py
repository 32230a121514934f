"""`jlora sweep`: one recipe under many settings, each a run of its own, and one table of all."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.runs.recipe import Recipe, differences, find_recipe, load_recipe, parse_yaml
from jlora.runs.smoke import smoke
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.files import check_writable, read_text
from jlora.system.json_files import read_object

#: What the report of a sweep writes beside the runs.
REPORT_FILES = ("report.html", "table.md", "loss.png")


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
        _add(cases, name, dict(point), f"--grid {' '.join(grid)}")
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
        if not isinstance(settings, dict):
            raise UserError(f"{path}: case {name}: write `name: {{lora.r: 8, ...}}`")
        _add(cases, str(name), settings, str(path))
    return cases


def _add(cases: dict[str, list[str]], name: str, settings: Mapping[str, Any], source: str) -> None:
    """Add a case, whose name becomes a folder's.

    Raises:
        UserError: it cannot, or another case has that name.
    """
    if not name or name[0] == "." or name in REPORT_FILES or re.search(r"[/\\\x00-\x1f]", name):
        raise UserError(
            f"{source}: case {name!r}: the name becomes a folder's; begin it with a letter or "
            f"digit, without slashes, and not {' or '.join(REPORT_FILES)}"
        )
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    if cases.setdefault(name, overrides) != overrides:
        raise UserError(
            f"{source}: {' '.join(cases[name])} and {' '.join(overrides)} would both be called "
            f"{name}; give them names of their own in a file for --cases"
        )


def sweep(
    recipe: str,
    cases: Mapping[str, Sequence[str]],
    settings: Sequence[str],
    out: Path,
    small: bool = False,
    processes: int = 1,
) -> dict[str, Path]:
    """Run a recipe once a case, each in a process of its own, below ``out``.

    Finished runs are left as they are and interrupted ones go on, so that a sweep is resumed by the
    same command. A run that fails does not stop the others.

    Args:
        recipe: name or path.
        cases: name -> overrides, see `grid_cases` and `file_cases`.
        settings: overrides of all cases.
        small: `jlora run --smoke`.
        processes: of each run.

    Returns:
        The folders of the finished runs by name.

    Raises:
        UserError: an override is wrong or a folder holds a run with other settings (nothing has
            been run then), or a run failed (all others have been run).
    """
    file = find_recipe(recipe)
    for name, overrides in cases.items():
        wanted = load_recipe(file, [*settings, *overrides])
        check_run(out / name, smoke(wanted) if small else wanted)
    check_writable(out)
    finished, failed = {}, []
    for number, (name, overrides) in enumerate(cases.items(), start=1):
        run = out / name
        say(f"sweep {number} of {len(cases)}: {name}")
        if is_finished(run):
            finished[name] = run
            continue
        command = [sys.executable, "-m", "jlora.cli", "run", "--out", str(run)]
        if processes > 1:
            command += ["--nproc", str(processes)]
        if (run / "config.yaml").is_file():
            command.append("--resume")
        else:
            command += [str(file), *["--smoke"] * small]
            for override in [*settings, *overrides]:
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


def check_run(run: Path, wanted: Recipe) -> None:
    """Check that what is in a run's folder is a run of ``wanted``, or nothing.

    Raises:
        UserError: it is a run with other settings, which would be taken for this one.
    """
    config = run / "config.yaml"
    if not config.is_file():
        return
    found = differences(wanted, load_recipe(config))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{run} holds a run with other settings: {', '.join(found[:3])}{more}; remove the "
            "folder to run the case anew, or choose another --out"
        )


def is_finished(run: Path) -> bool:
    """Whether a run has the scores of its tuned model."""
    try:
        return "after" in read_object(run / "scores.json", "")
    except UserError:
        return False


def _shown(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    return "".join(c if c.isalnum() or c in "-_.+" else "-" for c in str(value))
