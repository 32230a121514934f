"""The limits of Linux's control groups for this process: containers, Slurm jobs, systemd slices.

A process is in one group of a tree, and the limits of all groups above apply as well. Version 2 has
one tree, version 1 has one for each controller; a machine may have both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

#: Version 1 says "no limit" by a number close to 2**63.
UNLIMITED = 1 << 60


def groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """The groups of this process for a controller: its own, then those above.

    Args:
        controller: "memory" or "cpu".
        root: the folder with /proc and /sys.

    Yields:
        The version (1 or 2) and the folder of each.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux, or /proc is hidden
        return
    own = {}
    for line in memberships:  # 4:cpu,cpuacct:/slurm/job_7 in version 1, 0::/user.slice in 2
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    for line in mounts:  # 30 25 0:26 ROOT PLACE rw,nosuid shared:4 - cgroup cgroup rw,memory
        front, _, back = line.partition(" - ")
        fields, kind = front.split(), back.split()
        if len(fields) < 5 or not kind:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version not in own or (version == 1 and controller not in kind[-1].split(",")):
            continue
        top = root / _unescaped(fields[4]).lstrip("/")
        for folder in _upwards(top, _unescaped(fields[3]), own[version]):
            yield version, folder


def _upwards(top: Path, mounted: str, own: str) -> Iterator[Path]:
    """From a process's own group to the top one that is mounted (``mounted`` of the whole tree)."""
    below = own[len(mounted.rstrip("/")) :] if own.startswith(mounted) else ""
    folder = top / below.strip("/")
    if ".." in folder.parts or not folder.is_dir():  # outside the part that this container can see
        folder = top
    while True:
        yield folder
        if folder == top:
            return
        folder = folder.parent


def _unescaped(path: str) -> str:
    """A path of mountinfo, which writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The smallest limit for this process in bytes; None: no limit."""
    return min((limit for limit, _ in _memory(root)), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate before it reaches a limit; None: no limit."""
    return min((max(0, limit - used) for limit, used in _memory(root)), default=None)


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and usage of each group with a limit; the page cache does not count as used."""
    for version, folder in groups("memory", root):
        limit_name, use_name, prefix = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            2: ("memory.max", "memory.current", ""),
        }[version]
        limit = _number(folder / limit_name)
        if limit is None or limit >= UNLIMITED:
            continue
        cached = 0
        for line in _lines(folder / "memory.stat"):
            name, _, value = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                cached += int(value)
        yield limit, max(0, (_number(folder / use_name) or 0) - cached)


def processor_quota(root: Path = Path("/")) -> int | None:
    """The number of processors that quotas allow (``docker run --cpus``), rounded up; None: all."""
    found = []
    for version, folder in groups("cpu", root):
        if version == 2:
            values = " ".join(_lines(folder / "cpu.max")).split()
        else:
            values = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
        # No quota: "max 100000" in version 2, -1 in version 1.
        if len(values) == 2 and values[0].isdecimal() and values[1].isdecimal() and int(values[1]):
            found.append(-(-int(values[0]) // int(values[1])))
    return max(1, min(found)) if found else None


def _number(path: Path) -> int | None:
    """The number in a file; None if the file is missing or contains "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")[:-1]
    except OSError:
        return []
