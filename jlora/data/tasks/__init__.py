"""Tasks: how a dataset is read, how its references are grouped, and which metrics score it.

A task is a module of this folder with a `TASK`, or of another package (`register_task`); `get_task`
finds it by name.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jlora.data.batches import Example
from jlora.data.pull_datasets import DATASETS, data_cache
from jlora.system.errors import UserError
from jlora.system.plugins import load_plugin, plugins

#: The modules of this folder, each of which is imported when its task is requested.
NAMES = tuple(each.name for each in pkgutil.iter_modules(__path__) if each.name != "split")
GROUP = "jlora.tasks"  # of entry points


@dataclass(frozen=True)
class ReferenceGroup:
    """One distinct input and all its reference texts; `part` and `keep` as in `Example`."""

    prompt: str
    references: list[str]
    part: str | None = None
    keep: int = 0


@dataclass(frozen=True)
class Task:
    """What jlora has to know about a dataset.

    Attributes:
        name: as in `get_task`.
        read_file: reads the examples of a file: ``read_file(path)``, or ``read_file(path,
            template)`` if the task has `templates`. Raises UserError with file and line.
        metrics: names of the scores that are computed for this dataset.
        splits: for each split the possible names of its file; the first that exists is read.
        built_in: returns a split's examples without any file.
        choices: the possible answers of a task that is a choice ("true", "false"); empty for tasks
            that are answered by free text.
        templates: named format strings that make a prompt from a row's fields; the first is the
            default. Empty: prompts are not configurable.
    """

    name: str
    read_file: Callable[..., list[Example]]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    built_in: Callable[[str], list[Example]] | None = None
    choices: tuple[str, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)

    def read(self, path: str | Path, template: str | None = None) -> list[Example]:
        """The examples of one file.

        Args:
            template: a name from `templates`, or a format string; None: the default.

        Raises:
            UserError: the file cannot be read, or the template cannot be used.
        """
        text = self.find_template(template)
        return self.read_file(path) if text is None else self.read_file(path, text)

    def load(
        self, data: str | Path | None, split: str, template: str | None = None
    ) -> list[Example]:
        """The examples of a split, from ``data`` or the default folders; see `find_data`, `read`.

        Raises:
            UserError: no data, or it cannot be read.
        """
        if data is None and self.built_in is not None:
            self.find_template(template)
            return self.built_in(split)
        return self.read(self.find_data(data, split), template)

    def find_template(self, template: str | None) -> str | None:
        """The format string of a template's name; None: this task has no templates.

        Raises:
            UserError: there is no template of that name.
        """
        if not self.templates:
            if template is not None:
                raise UserError(
                    f"task {self.name} has no prompt templates; leave data.template out"
                )
            return None
        if template is None:
            return next(iter(self.templates.values()))
        if template not in self.templates and "{" not in template:
            raise UserError(
                f"no prompt template {template!r}; task {self.name} has "
                f"{', '.join(self.templates)}, or give a format string with its fields in braces"
            )
        return self.templates.get(template, template)

    def groups(self, examples: Sequence[Example]) -> list[ReferenceGroup]:
        """Group examples by prompt, in the order in which prompts are first seen."""
        return group_by_prompt(examples)

    def find_data(self, folder: str | Path | None, split: str) -> Path:
        """Path of a split's file; see `find_data`."""
        return find_data(self.name, self.splits, split, folder)


#: Of `register_task`, and of other packages once they were asked for.
_registered: dict[str, Task] = {}


def group_by_prompt(examples: Sequence[Example]) -> list[ReferenceGroup]:
    """Group examples by prompt, in the order in which prompts are first seen."""
    groups: dict[str, ReferenceGroup] = {}
    for example in examples:
        if example.prompt not in groups:
            groups[example.prompt] = ReferenceGroup(example.prompt, [], example.part, example.keep)
        groups[example.prompt].references.append(example.completion)
    return list(groups.values())


def find_data(
    name: str,
    splits: Mapping[str, tuple[str, ...]],
    split: str,
    explicit: str | Path | None = None,
) -> Path:
    """Find the file of a split.

    ``explicit`` (``--data``) is a file, or the only folder that is searched. Without it these are
    searched in order: ``$JLORA_DATA``, ``./data``, ``../shared/data``, and what `jlora pull`
        fetched.
    The file may be in the folder itself or in its subfolder with the task's name.

    Raises:
        UserError: nothing found; lists the folders that were searched.
    """
    if split not in splits:
        raise UserError(f"task {name} has no split {split!r}; it has {', '.join(splits)}")
    # os.path.isfile returns False where Path.is_file raises (no permission for the folder).
    if explicit is not None:
        explicit = Path(explicit)
        if os.path.isfile(explicit):
            return explicit
        if not os.path.isdir(explicit):
            raise UserError(f"no file or folder {explicit}; check --data")
        folders = [explicit]
    else:
        folders = data_folders()
    looked = []
    for folder in folders:
        # The task's own folder comes first: data/test.txt may belong to another task.
        for place in (folder / name, folder):
            for file_name in splits[split]:
                if os.path.isfile(place / file_name):
                    return place / file_name
            looked.append(str(place))
    raise UserError(
        f"no {split} data for task {name}: none of {', '.join(splits[split])} in "
        f"{', '.join(looked)}; give the file or its folder with --data or $JLORA_DATA"
        + (f", or run `jlora pull {name}`" if explicit is None and name in DATASETS else "")
    )


def data_folders() -> list[Path]:
    """Where data are looked for that nobody gave a place."""
    folders = [Path("data"), Path("..") / "shared" / "data", data_cache()]
    if os.environ.get("JLORA_DATA"):
        folders.insert(0, Path(os.environ["JLORA_DATA"]))
    return folders


def register_task(task: Task) -> Task:
    """Make a task known by its name, to recipes and commands.

    In a package of its own, an entry point of the group ``jlora.tasks`` does the same for every
    process: its name is the task's, its object the `Task`.

    Raises:
        UserError: there is a task of that name, or the name cannot be used.
    """
    if task.name in NAMES or task.name in _registered:
        raise UserError(f"there is a task {task.name!r} already; choose another name")
    if not task.name.strip() or set(task.name) & set("/\\, "):
        raise UserError(f"{task.name!r} cannot name a task; use no space, comma or slash")
    _registered[task.name] = task
    return task


def task_names() -> list[str]:
    """The names that `get_task` knows."""
    return list(dict.fromkeys([*NAMES, *_registered, *plugins(GROUP)]))


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none (shows the nearest names), or another package's cannot be used.
    """
    if name in NAMES:
        return importlib.import_module(f"jlora.data.tasks.{name}").TASK
    if name not in _registered:
        found = load_plugin(GROUP, name, Task)
        if found is None:
            names = task_names()
            near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"no task {name!r}; {hint}")
        if found.name != name:
            raise UserError(f"the entry point {name} ({GROUP}) holds the task {found.name!r}")
        register_task(found)
    return _registered[name]


__all__ = [
    "NAMES",
    "ReferenceGroup",
    "Task",
    "data_folders",
    "find_data",
    "get_task",
    "group_by_prompt",
    "register_task",
    "task_names",
]
