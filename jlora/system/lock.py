"""Locks of run folders and compiler caches; a lock ends with the process that holds it."""

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
    """Lock a run folder for this process; the folder is created if it does not exist.

    Of the processes of one run (`jlora.system.distributed`) the first holds the lock; others wait.

    ``RUN/.lock`` contains the process that holds the lock. The lock itself is the kernel's (flock)
    on that file; it ends with the process, so a remaining file locks nothing. Half-written files of
    killed processes in the folder are removed. If the folder was created here and is still empty at
    the end, it is removed.

    On NFS the kernel turns flock into a lock on the server, which other machines respect, unless
    the folder is mounted with ``nolock`` or ``local_lock``. Where locks are not supported there is
    a warning and no lock.

    Raises:
        UserError: another process holds the lock (the message has its id, user, machine and start
            time), the folder cannot be created or written, or it is not the first process's folder.
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
            # The process before may have removed the empty folder in the meantime.
            with contextlib.suppress(FileNotFoundError):
                handle = _take(run / NAME)
    except OSError as error:
        raise os_error("write to", run, error) from error
    try:
        remove_leftovers(run)
        world().first(lambda: None)
        yield
    finally:
        # Removed before it is unlocked, so that nobody locks a file that is being removed. In a
        # folder that can no longer be written it remains, and unlocked it has no effect.
        with contextlib.suppress(OSError):
            (run / NAME).unlink()
        handle.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def is_held(run: str | Path) -> bool:
    """Whether a process holds the lock of a run folder, if the file system supports locks."""
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
    """A context that only one process enters at a time; others wait until it is free.

    If the lock file cannot be created (a shared cache that is read-only) or the file system has no
    locks, no process waits.

    Args:
        work: what the other process is doing, for the message while waiting.
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
    """Open and lock the file, and write this process into it."""
    attempts = 0
    while True:
        handle = open(path, "ab+")  # noqa: SIM115  (held as long as the run)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            handle.close()
            attempts += 1
            if attempts < ATTEMPTS:  # the other may be `is_held`, which holds the lock for a moment
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
        # The process before may have removed the file between opening and locking it.
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
    """The holder of a lock, for messages."""
    try:
        owner = json.loads(path.read_bytes())
        return (
            f"process {owner['pid']} of {owner['owner']} on {owner['host']}, "
            f"started {owner['started']}"
        )
    except (OSError, ValueError, KeyError, TypeError):  # it is being written at this moment
        return "another process"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return str(os.getuid())
