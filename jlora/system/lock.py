"""One process a run folder, one compiler a cache: locks that die with who holds them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jlora.system.console import say, warn
from jlora.system.distributed import world
from jlora.system.errors import UserError
from jlora.system.files import make_folder, os_error, remove_leftovers

NAME = ".lock"
ATTEMPTS = 10  # a hundredth of a second apart


@contextlib.contextmanager
def lock_run(run: str | Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is not there, for this process alone.

    Of the processes of one run (`jlora.system.distributed`) the first holds it; others wait.

    ``RUN/.lock`` says who holds it. What counts is the kernel's lock on that file (flock), which
    ends with the process however it ends, so a file left behind locks nothing. What killed
    processes have left half-written in the folder is removed. A folder that was made and is still
    empty at the end is taken away again.

    On NFS the kernel turns flock into a lock on the server, which other machines see, unless the
    folder is mounted with ``nolock`` or ``local_lock``; where locks are not supported there is a
    warning and no lock.

    Raises:
        UserError: another process holds the folder (with its pid, owner, machine and start), the
            folder cannot be made or written, or it is not the one that the first process holds.
    """
    run = Path(run)
    if not world().is_first:
        world().first(lambda: None)
        if not (run / NAME).exists():
            raise UserError(
                f"this process does not see {run.resolve()}; put the run (--out) on a file system "
                "that all machines share"
            )
        yield
        return
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        handle = None
        while handle is None:
            make_folder(run)
            # The one before may have taken an empty folder away again meanwhile.
            with contextlib.suppress(FileNotFoundError):
                handle = _take(run / NAME)
    except OSError as error:
        raise os_error("write to", run, error) from error
    try:
        remove_leftovers(run)
        world().first(lambda: None)
        yield
    finally:
        # Removed before it is unlocked, so that nobody locks a file that is about to go. In a
        # folder that can no longer be written it stays, and says nothing once it is unlocked.
        with contextlib.suppress(OSError):
            (run / NAME).unlink()
        handle.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def is_held(run: str | Path) -> bool:
    """Whether a process is at work in a run folder, as far as the file system tells."""
    try:
        with open(Path(run) / NAME, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or no locks
        return False
    return False


@contextlib.contextmanager
def one_at_a_time(path: Path, work: str) -> Iterator[None]:
    """Do something that other processes may be about to do, too, after them.

    Where the lock file cannot be made (a cache that is shared and may only be read) or the file
    system has no locks, nobody waits.

    Args:
        work: what the others are doing, for the message of the one that waits.
    """
    try:
        make_folder(path.parent)
        handle = open(path, "ab")  # noqa: SIM115  (held for the caller's block)
    except OSError:
        yield
        return
    with handle:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is {work}; waiting")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _take(path: Path) -> BinaryIO:
    """The locked file, open, with this process in it."""
    attempts = 0
    while True:
        handle = open(path, "ab+")  # noqa: SIM115  (held as long as the run)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            handle.close()
            attempts += 1
            if attempts < ATTEMPTS:  # it may be `is_held`, which only looks
                time.sleep(0.01)
                continue
            raise UserError(
                f"{path.parent} is in use by {holder}; wait until it has ended, or choose another "
                "--out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                handle.close()
                raise
            warn(
                f"{path.parent} cannot be locked ({error.strerror}); make sure that no other run "
                "writes there"
            )
        # The one before may have removed the file between opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
        handle.close()
    owner = {
        "pid": os.getpid(),
        "owner": _user(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    handle.truncate(0)
    handle.write(json.dumps(owner).encode() + b"\n")
    handle.flush()
    return handle


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        owner = json.loads(path.read_bytes())
        return (
            f"process {owner['pid']} of {owner['owner']} on {owner['host']}, "
            f"started {owner['started']}"
        )
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return "another process"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return str(os.getuid())
