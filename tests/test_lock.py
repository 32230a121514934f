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

import pytest

from jlora.system import distributed
from jlora.system.errors import UserError
from jlora.system.lock import lock_run

HOLDER = """
import sys, time
from jlora.system.lock import lock_run
with lock_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(UserError) as error, lock_run(tmp_path / "run"):
        pass
    message = str(error.value)
    assert f"run is in use by process {holder.pid} of " in message
    assert f"on {socket.gethostname()}, started 2" in message and "another --out" in message


def test_a_killed_process_frees_the_folder(holder, tmp_path):
    run = tmp_path / "run"
    (run / f".adapter.{holder.pid}.tmp").mkdir()  # what it was writing
    (run / f".report.html.{os.getpid()}.tmp").write_text("of a process that lives")
    (run / ".notes.tmp").write_text("not of this program")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run / ".lock").exists()
    with lock_run(run):
        left = sorted(path.name for path in run.iterdir())
        assert left == [".lock", ".notes.tmp", f".report.html.{os.getpid()}.tmp"]
    assert not (run / ".lock").exists()


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


def test_of_many_that_start_together_one_at_a_time_is_in(tmp_path):
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
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.wait(120) == 0, process.stderr.read()
        process.stderr.close()


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
