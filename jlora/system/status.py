"""One line on stderr while something is compiled for this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

# A compiler is several processes, which would go on without the one that started it. A pipe that
# ends with that one, however it dies, is read by a process of the compiler's group, which then ends
# the group. (A shell gives what it puts in the background another standard input, so the pipe is
# number 3.)
_WATCHED = """
exec 3<&0
{ read -r _ <&3; kill -9 0; } >/dev/null 2>&1 &
exec "$@" </dev/null 3<&-
"""


class Status:
    """What is compiled and for how long.

    On a terminal one line is rewritten in place, and goes away at the end. Into a file or a pipe a
    process writes one line in all, of the first thing that it compiles.
    """

    _written = False  # whether this process has written its line into the file or pipe

    def __init__(self, message: str):
        self._message, self._start, self._shown = message, time.monotonic(), False

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def show(self) -> None:
        """Show the line, or the time that has passed; to be called about twice a second."""
        if sys.stderr.isatty():
            self._write(f"\r\033[Kjlora: {self._message} ... {self.seconds:.0f} s")
        elif not Status._written:
            Status._written = True
            self._write(f"jlora: {self._message} ...")
        else:
            return
        self._shown = True

    def end(self, how: str = "done") -> None:
        """End the line, if there is one."""
        if self._shown:
            terminal = sys.stderr.isatty()
            self._write("\r\033[K" if terminal else f" {how} after {self.seconds:.0f} s\n")

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def run_compiler(command: Sequence[str], message: str) -> tuple[int, str]:
    """Run a compiler under a `Status`; it ends with this process, and Ctrl-C is not for it.

    Returns:
        Its exit code and what it wrote to stderr.

    Raises:
        OSError: it cannot be started.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} does not run")
    status = Status(message)
    pipe, end = os.pipe()
    try:
        with subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, "sh", *command],
            stdin=pipe,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                while True:
                    status.show()
                    try:
                        _, errors = process.communicate(timeout=0.5)
                        break
                    except subprocess.TimeoutExpired:
                        pass
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
    finally:
        os.close(pipe)
        os.close(end)
    status.end("failed" if process.returncode else "done")
    return process.returncode, errors
