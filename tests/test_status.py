"""What is said while something is compiled: one line."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jlora.system import status
from jlora.system.status import Status, run_compiler


@pytest.fixture
def stderr(monkeypatch):
    """A function that puts a terminal or a pipe in the place of stderr, of a new process."""

    def put(terminal: bool) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(Status, "_written", False)
        return stream

    clock = iter(range(100))
    monkeypatch.setattr(status.time, "monotonic", lambda: next(clock))
    return put


def test_a_terminal_shows_the_time_on_one_line_that_goes_away(stderr):
    stream = stderr(terminal=True)
    for message in ("compiling one", "compiling two"):
        line = Status(message)
        line.show()
        line.show()
        line.end()
    shown = stream.getvalue()
    assert "\n" not in shown and shown.endswith("\r\033[K")
    assert shown.split("\r\033[K")[1:3] == [f"jlora: compiling one ... {n} s" for n in (1, 2)]
    assert "compiling two ... 1 s" in shown


def test_a_pipe_gets_one_line_in_all(stderr):
    stream = stderr(terminal=False)
    for message in ("compiling one", "compiling two"):
        line = Status(message)
        line.show()
        line.show()
        line.end()
    assert stream.getvalue() == "jlora: compiling one ... done after 1 s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_was_never_shown_is_not_ended(stderr, terminal):
    stream = stderr(terminal)
    Status("compiling").end()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("code", "how"), [(0, "done"), (3, "failed")])
def test_a_compiler_that_talks(stderr, code, how):
    """Megabytes of warnings, more than a pipe holds, must not stop it."""
    stream = stderr(terminal=False)
    script = f"import sys; sys.stderr.write('w' * 3_000_000 + 'error: x'); sys.exit({code})"
    found, errors = run_compiler([sys.executable, "-c", script], "compiling")
    assert found == code and len(errors) == 3_000_008 and errors.endswith("error: x")
    said = stream.getvalue()
    assert said.startswith(f"jlora: compiling ... {how} after ") and said.count("\n") == 1


def test_a_compiler_that_cannot_be_started(stderr):
    stream = stderr(terminal=False)
    with pytest.raises(FileNotFoundError):
        run_compiler(["no-such-compiler"], "compiling")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_compiler_and_its_children_end_with_the_process(tmp_path, popen, sent):
    """g++ starts cc1plus, which would go on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    compiler = f"exec >{pipe}; trap '' INT TERM; sleep 100 & echo started; wait"
    script = "import sys; from jlora.system import status; status.run_compiler(sys.argv[1:], '')"
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        process = popen(
            [sys.executable, "-c", script, "/bin/sh", "-c", compiler],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert select.select([reader], [], [], 60)[0] and os.read(reader, 99) == b"started\n"
        process.send_signal(sent)
        # Nobody has the pipe open any more.
        assert select.select([reader], [], [], 60)[0] and os.read(reader, 99) == b""
        assert process.wait(60) == -sent
    finally:
        os.close(reader)
