"""Memory and processors that this process may use, on made-up /proc and /sys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jlora.system import cgroup, machine

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 4194304 kB\n"
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "25 19 0:20 / /sys rw - sysfs sysfs rw\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
V1_GROUPS = "9:name=systemd:/x\n5:cpu,cpuacct:/job\n4:memory:/slurm/uid_7/job_3\n0::/\n"


@pytest.fixture
def tree(tmp_path):
    """Writes files of a root folder; the folder."""

    def write(files: dict[str, str]):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def v2(own: str, groups: dict[str, dict[str, str]], mounts: str = V2) -> dict[str, str]:
    files = {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": mounts}
    for group, values in groups.items():
        for name, text in values.items():
            files[f"sys/fs/cgroup{group}/{name}"] = f"{text}\n"
    return files


@pytest.mark.parametrize(
    "module, name, unit",
    [("jlora.system.machine", "peak_memory", 1), ("benchmarks.sides", "peak_mb", 1 << 20)],
)
def test_peak_memory_is_that_of_the_process_alone(module, name, unit):
    here = bytearray(b"x") * (256 << 20)
    for own in (0, 160):
        code = f"from {module} import {name}; x = bytearray(b'x') * ({own} << 20); print({name}())"
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        assert own << 20 < float(child.stdout) * unit < own + 80 << 20 < len(here)


def test_peak_memory_where_proc_does_not_tell(tree):
    assert machine.peak_memory(tree({})) > 0.9 * machine.peak_memory()


def test_a_machine_without_limits(tree):
    root = tree({})
    assert machine.memory_limit(root) == 16 * GIB
    assert machine.available_memory(root) == 4 * GIB
    assert cgroup.memory_left(root) is cgroup.processor_quota(root) is None
    root = tree(v2("/user.slice", {"/user.slice": {"memory.max": "max", "cpu.max": "max 100000"}}))
    assert machine.memory_limit(root) == 16 * GIB
    assert machine.available_memory(root) == 4 * GIB and cgroup.processor_quota(root) is None


def test_the_limit_of_a_container(tree):
    """It sees its own group as the root."""
    limits = {"memory.max": f"{3 * GIB}", "memory.current": f"{GIB}", "cpu.max": "150000 100000"}
    root = tree(v2("/", {"": limits}))
    assert machine.memory_limit(root) == 3 * GIB
    assert machine.available_memory(root) == 2 * GIB
    assert cgroup.processor_quota(root) == 2


def test_what_the_machine_has_left_may_be_less_than_the_limit(tree):
    root = tree(v2("/", {"": {"memory.max": f"{12 * GIB}", "memory.current": f"{GIB}"}}))
    assert machine.memory_limit(root) == 12 * GIB
    assert machine.available_memory(root) == 4 * GIB


def test_cached_files_make_room(tree):
    stat = f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\nshmem {GIB}"
    values = {"memory.max": f"{3 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": stat}
    assert machine.available_memory(tree(v2("/", {"": values}))) == GIB * 3 // 2


@pytest.mark.parametrize("tight", ["/top", "/top/slurm", "/top/slurm/job"])
def test_the_tightest_of_nested_groups_counts(tree, tight):
    job = "/top/slurm/job"
    groups = {
        group: {"memory.max": "max", "cpu.max": "max 100000"}
        for group in ("/top", "/top/slurm", job)
    }
    groups["/top"]["memory.max"] = f"{8 * GIB}"
    groups["/top"]["memory.current"] = f"{GIB}"
    groups[tight] = {
        "memory.max": f"{2 * GIB}",
        "memory.current": f"{GIB}",
        "cpu.max": "100001 100000",
    }
    root = tree(v2(job, groups))
    assert machine.memory_limit(root) == 2 * GIB
    assert machine.available_memory(root) == GIB
    assert cgroup.processor_quota(root) == 2


def test_a_neighbour_s_group_does_not_count(tree):
    groups = {"/a": {"memory.max": f"{GIB}"}, "/b": {"memory.max": f"{5 * GIB}"}}
    assert machine.memory_limit(tree(v2("/b", groups))) == 5 * GIB


def test_version_1_nested(tree):
    memory, no_limit = "sys/fs/cgroup/memory", str((1 << 63) - 4096)
    root = tree(
        {
            "proc/self/cgroup": V1_GROUPS,
            "proc/self/mountinfo": V1,
            f"{memory}/memory.limit_in_bytes": no_limit,
            f"{memory}/slurm/uid_7/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{memory}/slurm/uid_7/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{memory}/slurm/uid_7/memory.stat": f"cache 9\ntotal_inactive_file {GIB}\n",
            f"{memory}/slurm/uid_7/job_3/memory.limit_in_bytes": no_limit,
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
    )
    assert machine.memory_limit(root) == 4 * GIB
    assert machine.available_memory(root) == 2 * GIB
    assert cgroup.processor_quota(root) == 3


def test_a_container_that_sees_the_machine_s_names(tree):
    """Without a namespace of its own: its group is mounted at the top, under its full name."""
    mounts = V2.replace(" / /sys", " /docker/ab\\040c /sys", 1)
    values = {"memory.max": f"{GIB}", "memory.current": "0"}
    inner = {"memory.max": f"{GIB // 2}", "memory.current": "0"}
    root = tree(v2("/docker/ab c/inner", {"": values, "/inner": inner}, mounts))
    assert machine.memory_limit(root) == GIB // 2
    assert machine.memory_limit(tree(v2("/docker/ab c", {}, mounts))) == GIB
    assert machine.memory_limit(tree(v2("/../../other", {}, mounts))) == GIB


@pytest.mark.parametrize("broken", ["", "nonsense\n", "-5\n"])
def test_files_that_say_nothing_limit_nothing(tree, broken):
    values = {"memory.max": broken, "memory.current": broken, "cpu.max": broken}
    root = tree(v2("/", {"": values}))
    assert machine.memory_limit(root) == 16 * GIB
    assert machine.available_memory(root) == 4 * GIB and cgroup.processor_quota(root) is None


def test_a_group_over_its_limit_has_nothing_left(tree):
    values = {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}
    assert machine.available_memory(tree(v2("/", {"": values}))) == 0


def test_usable_is_what_the_process_has_and_may_take(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: 100 * GIB)
    monkeypatch.setattr(machine, "available_memory", lambda: 8 * GIB)
    alone, shared = machine.usable_memory(), machine.usable_memory(4)
    own = alone - 8 * GIB
    assert 0 < own < 8 * GIB and abs(shared - own - 2 * GIB) < GIB // 4
    monkeypatch.setattr(machine, "memory_limit", lambda: GIB)
    assert machine.usable_memory(4) == GIB // 4


def test_this_machine():
    assert 0 < machine.available_memory() <= machine.memory_limit()
    assert 0 < machine.usable_memory() <= machine.memory_limit()
