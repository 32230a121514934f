"""One run in several processes, over MPI: their communication, and how they start and end.

``mpirun -np N jlora run RECIPE``, or `launch` (``--nproc N``), starts N processes that each call
`join`; `world` then returns the group of all. Each batch is divided among them and the gradients of
trained parameters are summed; nothing else is exchanged. Only the first process writes the run
folder. docs/scale.md says which results do not depend on N.

MPI is used through mpi4py. Jittor's own MPI operators are off: they sum gradients inside its
optimisers, which jlora does not use.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jlora.system.errors import UserError
from jlora.system.files import make_folder

if TYPE_CHECKING:  # keeps NumPy out of the start of the command line
    import numpy as np

T = TypeVar("T")
#: Set by Open MPI's mpirun, by MPICH's and Intel's, and by Slurm's srun --mpi=pmix.
MARKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
INSTALL = "run `pip install 'jlora[mpi]'`"
LOGS = "JLORA_RANK_LOGS"  # folder for the logs of all processes except the first; set by `launch`
JOINED = 1 << 16  # gradients with fewer numbers are sent together


class World:
    """The processes of a run; only this one unless `join` found others.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        local_size: the number of processes on this machine.
    """

    rank, size, local_size = 0, 1, 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the first, which writes the files."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the items: every ``size``-th, starting with number ``rank``."""
        return items[self.rank :: self.size]

    def threads(self, cores: int) -> int:
        """The number of threads for this process: its share of ``cores``."""
        return cores

    def first(self, work: Callable[[], T]) -> T:
        """The result of ``work()`` in the first process; the others wait without using the CPU.

        Raises:
            UserError: that of the first process, in all processes.
        """
        return work()

    def gather(self, item: T) -> list[T]:
        """The items of all processes, by rank."""
        return [item]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        return list(numbers)

    def sum_arrays(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace each array by its sum over the processes; all get identical bits."""

    def interleave(self, mine: Sequence[T]) -> list[T]:
        """The items that `mine` divided, in their original order."""
        parts, found = self.gather(list(mine)), []
        for place in range(max(map(len, parts))):
            found += [part[place] for part in parts if place < len(part)]
        return found

    def finish(self, code: int) -> int:
        """Wait for the others to finish; returns the exit code for this process."""
        return code

    def abort(self, message: str, code: int) -> None:
        """End all processes because of an error in this one; returns if there are no others."""


_world = World()


def world() -> World:
    """The processes of this run."""
    return _world


def started_by_mpi() -> bool:
    """Whether this process may be one of several that MPI has started; `join` finds out."""
    return announced_size() != 1


def announced_size() -> int | None:
    """How many processes MPI has started, as far as the environment says; None: more than 0.

    ``mpirun -n 1`` and ``srun --pty`` start one. A PMIX_RANK without the name of its job was set by
    hand, or is left from an outer program.
    """
    sizes = [os.environ.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    if "PMIX_RANK" in os.environ and "PMIX_NAMESPACE" in os.environ:
        sizes.append(os.environ.get("SLURM_STEP_NUM_TASKS", "unknown"))
    found = next((size for size in sizes if size), "1")
    return int(found) if found.isdecimal() else None


def is_one_of_several() -> bool:
    """Whether there are certainly other processes."""
    size = announced_size()
    return size > 1 if size is not None else os.environ.get("PMIX_RANK") != "0"


def without_mpi() -> dict[str, str]:
    """The environment for a program that must not take part in this process's MPI job."""
    ours = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def join() -> World:
    """Connect to the other processes; must be called before Jittor is imported.

    Raises:
        UserError: mpi4py, or the MPI that it needs, is missing.
    """
    global _world
    if _world.size == 1 and started_by_mpi():
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(f"several processes need mpi4py ({error}); {INSTALL}") from error
        except RuntimeError as error:
            raise UserError(f"mpi4py finds no MPI ({error}); {INSTALL}") from error
        if MPI.COMM_WORLD.size > 1:
            _world = MPIWorld(MPI)
            _stop_by_signal()
    return _world


def _stop_by_signal() -> None:
    """Handle SIGUSR1, which mpirun forwards, like Ctrl-C, which it does not forward."""
    process = os.getpid()

    def stop(number, frame) -> None:
        # The compilers that Jittor has forked get it too, and must not die while they hold a lock.
        if os.getpid() == process:
            raise KeyboardInterrupt

    signal.signal(signal.SIGUSR1, stop)
    # Jittor treats locking that a signal interrupts as failed.
    signal.siginterrupt(signal.SIGUSR1, False)


class MPIWorld(World):
    """The processes that MPI has started together."""

    def __init__(self, mpi: Any):
        self._mpi, self._comm = mpi, mpi.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        neighbours = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local_size = neighbours.size
        self._cores = neighbours.allgather(_affinity())
        self._place = neighbours.rank
        self._host = mpi.Get_processor_name()
        self._stderr, self._log = sys.stderr, None
        folder = self.first(lambda: os.environ.get(LOGS) or tempfile.mkdtemp(prefix="jlora-"))
        if not self.is_first:
            self._take_log(Path(folder))
        elif LOGS not in os.environ:
            self._log = Path(folder)
            logs = log_file(self._log, "N")
            print(f"jlora: {self.size} processes; should one die, see {logs}", file=sys.stderr)

    def _take_log(self, folder: Path) -> None:
        """Redirect this process's output to a file; `abort` still prints on the original stderr."""
        make_folder(folder)  # on another machine it does not exist yet
        self._log = log_file(folder, self.rank)
        self._stderr = os.fdopen(os.dup(2), "w")
        with open(self._log, "ab") as log:
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                os.dup2(log.fileno(), number)
        print(f"process {os.getpid()} on {self._host}", file=sys.stderr, flush=True)

    def threads(self, cores: int) -> int:
        own = self._cores[self._place]
        share = sum(1 / sum(core in each for each in self._cores) for core in own) / len(own)
        return max(1, round(cores * share))

    def first(self, work: Callable[[], T]) -> T:
        error = found = None
        if self.is_first:
            try:
                found = work()
            except UserError as problem:
                error = problem
        self._wait()
        found, error = self._comm.bcast((found, error))
        if error is not None:
            raise error
        return found

    def gather(self, item: T) -> list[T]:
        self._wait()
        return self._comm.allgather(item)

    def total(self, numbers: Sequence[float]) -> list[float]:
        import numpy as np

        sums = np.array(numbers, np.float64)
        self._comm.Allreduce(self._mpi.IN_PLACE, sums)
        return sums.tolist()

    def sum_arrays(self, arrays: Sequence[np.ndarray]) -> None:
        import numpy as np

        small = [array for array in arrays if array.size < JOINED]
        if small:
            joined = np.concatenate([array.reshape(-1) for array in small])
            self._comm.Allreduce(self._mpi.IN_PLACE, joined)
            ends = np.cumsum([array.size for array in small])
            for array, part in zip(small, np.split(joined, ends[:-1])):
                array[...] = part.reshape(array.shape)
        for array in arrays:
            if array.size >= JOINED:
                self._comm.Allreduce(self._mpi.IN_PLACE, array)

    def _wait(self) -> None:
        """Wait for all others with sleeps: MPI would keep a core busy, and scoring takes long."""
        request = self._comm.Ibarrier()
        pause = 0.0001
        while not request.Test():
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)

    def finish(self, code: int) -> int:
        self._wait()
        if self._log is not None:
            with contextlib.suppress(OSError):
                if self.is_first:
                    shutil.rmtree(self._log, ignore_errors=True)  # the others remove their own
                else:
                    self._log.unlink()
        # mpirun treats a process with another exit code as failed.
        return code if self.is_first else 0

    def abort(self, message: str, code: int) -> None:
        """End all processes; an error that all have is printed by the first only."""
        if not self.is_first:
            time.sleep(2)  # the first process has the same error and ends this one
            message = f"jlora: process {self.rank} of {self.size} on {self._host} failed\n{message}"
        print(message, file=self._stderr, flush=True)
        self._comm.Abort(code)


def _affinity() -> set[int]:
    """The cores that this process is allowed to use."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return set(range(os.cpu_count() or 1))


def log_file(folder: Path, rank: int | str) -> Path:
    """The file to which a process's output goes."""
    return folder / f"rank-{rank}.log"


# --- starting them ------------------------------------------------------------------------------


def find_mpirun() -> str | None:
    """The mpirun of this Python's environment, else the system's; None: there is none."""
    own = Path(sys.executable).parent / "mpirun"
    return str(own) if own.is_file() else shutil.which("mpirun")


def mpirun(processes: int, *flags: str) -> list[str]:
    """The mpirun command line in front of the command for several processes on this machine."""
    options = ["-np", str(processes), "--bind-to", "none"]
    if processes > len(_affinity()):
        options.append("--oversubscribe")
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    return [str(find_mpirun()), *options, *flags, sys.executable]


def mpi_problem() -> str | None:
    """Why several processes cannot be started here; None if they can."""
    mpirun = find_mpirun()
    if mpirun is None:
        return "mpirun not found"
    try:
        asked = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{mpirun} does not run ({error})"
    if "Open MPI" not in asked.stdout:
        return f"{mpirun} is not Open MPI's; start the processes with it: mpirun -n N jlora ..."
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return "mpi4py is not installed"
    return None


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Start ``jlora`` as several processes on this machine; returns the exit code.

    The first Ctrl-C (or SIGTERM) finishes the step and saves, as in one process; the second ends
    all processes at once.

    Raises:
        UserError: there is no MPI, or a process has died (with its name and its last output).
    """
    problem = mpi_problem()
    if problem is not None:
        raise UserError(f"--nproc {processes}: {problem}; {INSTALL}")
    command = [*mpirun(processes), "-m", "jlora.cli", *arguments]
    with tempfile.TemporaryDirectory(prefix="jlora-") as logs:
        job = subprocess.Popen(
            command,
            env={**without_mpi(), LOGS: logs},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # only this process gets Ctrl-C
        )
        errors = _Messages(job.stderr)
        asked = 0

        def stop(number, frame) -> None:
            nonlocal asked
            asked += 1
            # mpirun forwards SIGUSR1 to every process, and ends all on SIGTERM.
            job.send_signal(signal.SIGUSR1 if asked == 1 else signal.SIGTERM)

        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = job.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        errors.join()
        if errors.died is None:
            return 130 if asked else code
        if asked:
            return 130
        rank, number = errors.died
        raise UserError(
            f"process {rank} of {processes} was ended by signal {number} ({_signal_name(number)}), "
            f"and with it all others{_last_words(log_file(Path(logs), rank))}. Training goes on "
            "from its last checkpoint with --resume"
        )


def _signal_name(number: int) -> str:
    names = {9: "killed, most often for want of memory", 11: "a crash"}
    with contextlib.suppress(ValueError):
        return names.get(number) or signal.Signals(number).name
    return "unknown"


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").replace("\r", "\n").split("\n")
    except OSError:  # the first process has no log: its output goes to the terminal
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return f"; it was {said[0]}, and its last output is: {' / '.join(said[1:][-3:]) or 'nothing'}"


class _Messages(threading.Thread):
    """Prints the output of the processes and mpirun, without mpirun's explanations.

    Attributes:
        died: rank and signal of the process that died according to mpirun, or None.
    """

    RULE = b"-" * 60  # mpirun's explanations are between two of these lines
    DIED = re.compile(rb"process rank (\d+) with PID .* exited on\s+signal (\d+)", re.DOTALL)

    def __init__(self, source):
        super().__init__(daemon=True)
        self._source, self.died = source, None
        self.start()

    def run(self) -> None:
        explanation, line = None, b"\n"
        for line in self._lines():
            if line.startswith(self.RULE):
                found = self.DIED.search(explanation or b"")
                if found:
                    self.died = int(found[1]), int(found[2])
                explanation = b"" if explanation is None else None
            elif explanation is not None:
                explanation += line
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
        if not line.endswith(b"\n"):  # an unfinished progress bar
            sys.stderr.write("\n")

    def _lines(self):
        """Lines; the carriage return of a progress bar ends a line, too."""
        rest = b""
        while chunk := os.read(self._source.fileno(), 1 << 16):
            *whole, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
            yield from whole
        if rest:
            yield rest
