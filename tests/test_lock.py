"""Two runs in one folder refuse each other."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jlora.system import distributed, files
from jlora.system import lock as lock_module
from jlora.system.errors import UserError
from jlora.system.files import remove_leftovers, temporary_name
from jlora.system.lock import is_held, lock_run

HOLDER = """
import sys, time
from jlora.system.lock import lock_run
with lock_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, popen):
    """A process that holds ``tmp_path / "run"``."""
    process = popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError) as error, lock_run(tmp_path / "run"):
        pass
    message = str(error.value)
    assert f"run is in use by process {holder.pid} of " in message
    assert f"on {socket.gethostname()}, started 2" in message and "another --out" in message


def test_a_killed_process_frees_the_folder(holder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as other:
        other.setattr(os, "getpid", lambda: holder.pid)
        temporary_name(run / "adapter").mkdir()  # what it was writing
    alive = temporary_name(run / "report.html")
    alive.write_text("of a process that lives")
    (run / ".notes.tmp").write_text("not of this program")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / ".lock").exists()
    with lock_run(run):
        left = sorted(path.name for path in run.iterdir())
        assert left == [".lock", ".notes.tmp", alive.name]
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("hours", [1, 25])
def test_leftovers_of_another_machine_go_after_a_day(tmp_path, monkeypatch, hours):
    """A pid says nothing of a process of another machine, another container or an earlier boot."""
    with monkeypatch.context() as other:
        other.setattr(files, "_processes_here", lambda: "0123abcd")
        other.setattr(os, "getpid", lambda: 4_000_000_000)  # no process has that number
        foreign = temporary_name(tmp_path / "adapter")
    earlier = tmp_path / ".adapter.4000000000.tmp"  # as versions before this one named them
    for path in (foreign, earlier):
        path.mkdir()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    remove_leftovers(tmp_path)
    assert foreign.exists() == earlier.exists() == (hours < 24)


def test_temporary_names_are_never_the_same(tmp_path):
    first, second = temporary_name(tmp_path / "x"), temporary_name(tmp_path / "x")
    assert first != second and first.parent == second.parent == tmp_path
    assert first.name.startswith(".x.") and f".{os.getpid()}." in first.name


def test_other_folders_are_free(holder, tmp_path):
    with lock_run(tmp_path / "other"), lock_run(tmp_path / "third"):
        pass


def test_nothing_is_left_of_a_folder_that_was_not_used(tmp_path):
    with lock_run(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").is_file()
    assert not list(tmp_path.iterdir())
    with lock_run(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.yaml").write_text("")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]


def test_the_folder_goes_while_it_is_made(tmp_path, monkeypatch):
    """Between mkdir's "exists" and its look at what exists, another run takes the folder away."""
    run, real, crossed = tmp_path / "run", Path.is_dir, []
    run.mkdir()

    def is_dir(path, **options):
        if path == run and not crossed:
            crossed.append(run.rmdir())
        return real(path, **options)

    with monkeypatch.context() as crossing:
        crossing.setattr(Path, "is_dir", is_dir)
        lock = lock_run(run)
        lock.__enter__()
    assert crossed and (run / ".lock").is_file()
    lock.__exit__(None, None, None)


def test_the_parent_goes_while_the_folder_is_made(tmp_path, monkeypatch):
    run, real, crossed = tmp_path / "a" / "run", Path.mkdir, []

    def mkdir(path, *arguments, **options):
        if path == run and run.parent.is_dir() and not crossed:
            crossed.append(run.parent.rmdir())
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with lock_run(run):
        assert crossed and (run / ".lock").is_file()


def test_the_folder_goes_before_the_lock_file_is_made(tmp_path, monkeypatch):
    run, real, crossed = tmp_path / "run", lock_module._take, []

    def take(path):
        if not crossed:
            crossed.append(run.rmdir())
        return real(path)

    monkeypatch.setattr(lock_module, "_take", take)
    with lock_run(run):
        assert crossed and (run / ".lock").is_file()


def test_the_lock_file_goes_between_opening_and_locking(tmp_path, monkeypatch):
    run, real, crossed = tmp_path / "run", fcntl.flock, []

    def flock(handle, how):
        if not crossed:
            crossed.append((run / ".lock").unlink())
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run(run):
        assert crossed and is_held(run)
    assert not run.exists()


def test_looking_whether_a_folder_is_held_does_not_hold_it(tmp_path, monkeypatch):
    """`jlora runs` looks at the moment in which a run starts."""
    looking = open(tmp_path / ".lock", "ab+")  # noqa: SIM115
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock_module.time, "sleep", lambda _: looking.close())
    with lock_run(tmp_path):
        assert looking.closed


def test_of_many_that_start_together_one_at_a_time_is_in(tmp_path, popen):
    """Each takes the lock many times and looks whether another is in."""
    code = textwrap.dedent(
        """
        import os, sys
        from jlora.system.errors import UserError
        from jlora.system.lock import lock_run
        taken = 0
        while taken < 100:
            try:
                with lock_run(sys.argv[1]):
                    inside = os.open(sys.argv[1] + "/inside", os.O_CREAT | os.O_EXCL)
                    os.close(inside)
                    os.unlink(sys.argv[1] + "/inside")
                    taken += 1
            except UserError as error:
                assert "in use by" in str(error), error
        """
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    lock = lock_run(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write to .*file/run"), lock:
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock_run(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_the_other_processes_of_a_run_must_see_its_folder(tmp_path, monkeypatch):
    class Second(distributed.World):
        rank, size = 1, 2

        def first(self, work):
            return None  # the first has done its own

    monkeypatch.setattr(distributed, "_world", Second())
    refused = pytest.raises(UserError, match="this process does not see .*absent; put the run")
    with refused, lock_run(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    with lock_run(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert (tmp_path / "run" / ".lock").exists()  # the first's to remove
