"""Reading and writing files, with errors that name the file, leaving nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jlora.system.errors import UserError
from jlora.system.text import decode_text


def os_error(action: str, path: str | Path, error: OSError) -> UserError:
    """Turn an OSError into a UserError that names the path and the usual remedy."""
    reason = error.strerror or str(error)
    hints = {
        "No space left on device": "free some space or choose another folder",
        "Permission denied": "check the permissions or choose another folder",
        "Read-only file system": "choose a folder that can be written",
        "No such file or directory": "check the path",
        "Is a directory": "give a file, not a folder",
        "Not a directory": "a part of the path is a file, not a folder; choose another path",
    }
    hint = hints.get(reason)
    return UserError(f"cannot {action} {path}: {reason}" + (f"; {hint}" if hint else ""))


@contextlib.contextmanager
def atomic_path(
    path: str | Path, directory: bool = False, keep: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, which replaces ``path`` on success.

    With ``directory=True`` the temporary path is a new folder that replaces the whole folder
    ``path``. On any error the temporary path is removed and ``path`` is not changed.

    Args:
        keep: a path to which the replaced folder is moved, replacing what is there; None: it is
            removed.

    Raises:
        UserError: the folder cannot be created or written (full disk, permissions).
    """
    path = Path(path)
    temporary = None
    try:
        make_folder(path.parent)
        temporary = temporary_name(path)
        if directory:
            make_folder(temporary)
        yield temporary
        sync(temporary)
        if directory:
            replace_directory(temporary, path, keep)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise os_error("write", path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # an earlier error is the one to report
                remove(temporary)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, unless it exists.

    Other processes may create and remove the same folders at the same time (`lock_run` removes
    those that stay empty). ``Path.mkdir`` can then fail between two of its own calls, so it is
    repeated.

    Raises:
        OSError: it cannot be created.
    """
    attempts = 100  # far more often than processes interfere; a permanent error takes a millisecond
    for attempt in range(1, attempts + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except (FileExistsError, FileNotFoundError):
            if attempt == attempts:
                raise


def temporary_name(path: Path) -> Path:
    """A new temporary name next to ``path``, for writing or removing it.

    It contains the process that uses it, for `remove_leftovers`. The process id alone is not
    enough: two containers that share a volume may have equal ones.
    """
    return path.with_name(
        f".{path.name}.{_processes_here()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    )


@functools.cache
def _processes_here() -> str:
    """Identifies machine, boot and container, within which a process id is unique."""
    marks = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux: the machine alone
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        marks.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]


def replace_directory(new: Path, path: Path, keep: Path | None = None) -> None:
    """Replace a folder by another; see `atomic_path`.

    A folder cannot be replaced by one rename: the old one is moved away first. A folder under
    either name is always complete, and if the process dies between the two renames the old one
    still exists, as ``keep`` or for `recover_directory`.
    """
    old = keep or _moved_away(path)
    while True:
        if path.is_dir():
            discard(old)
            # Another process that replaces the same folder has moved it away, or filled `old`.
            if not _renamed(path, old):
                continue
        # A reader between the two renames has recovered the old one.
        if _renamed(new, path, missing_ok=False):
            break
    if keep is None:
        discard(old)


def _renamed(source: Path, target: Path, missing_ok: bool = True) -> bool:
    """Rename a folder; False if another process put something at ``target`` or took ``source``."""
    try:
        os.rename(source, target)
    except OSError as error:
        crossed = (errno.ENOTEMPTY, errno.EEXIST, *([errno.ENOENT] * missing_ok))
        if error.errno not in crossed:
            raise
        return False
    return True


def recover_directory(path: str | Path) -> None:
    """Undo a replacement by `atomic_path` that was interrupted between its two renames."""
    path = Path(path)
    # It fails if another process has recovered the folder, or finished replacing it.
    with contextlib.suppress(OSError):
        if not path.exists():
            os.rename(_moved_away(path), path)


def _moved_away(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def discard(folder: Path) -> None:
    """Remove a folder if it exists; after an interruption no part of it has the old name."""
    if folder.is_dir():
        doomed = temporary_name(folder)
        if _renamed(folder, doomed):
            remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder.

    Whether a process of another machine or container is alive is not known here: its files are
    removed only if they have not changed for a day.
    """
    for path in folder.glob(".*.tmp"):
        if (found := _TEMPORARY.search(path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # a failed clean-up is no error
            if found["here"] == _processes_here():
                stale = not is_alive(int(found["pid"]))
            else:
                stale = time.time() - path.lstat().st_mtime > DAY
            if stale:
                remove(path)


DAY = 24 * 3600
# As `temporary_name` makes them; earlier versions wrote the pid alone.
_TEMPORARY = re.compile(r"^\..+?\.((?P<here>[0-9a-f]{8})\.)?(?P<pid>\d+)(\.[0-9a-f]{8})?\.tmp$")


def is_alive(pid: int) -> bool:
    """Whether this machine has a process with this id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        pass
    return True


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Without it a power cut can leave a renamed but empty file.
    """
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for chunk in iter(lambda: handle.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file or folder if it exists, even if others remove it at the same time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; a byte order mark is dropped.

    Raises:
        UserError: the file is missing or unreadable, or as `jlora.system.text.decode_text`.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise os_error("read", path, error) from error
    return decode_text(data, path)


def check_writable(folder: str | Path) -> None:
    """Check that a folder can be written, before an hour of training.

    Raises:
        UserError: ``folder`` cannot be created or written.
    """
    folder = Path(folder)
    try:
        make_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise os_error("write to", folder, error) from error


def check_absent(path: str | Path) -> None:
    """Check that writing ``path`` would overwrite nothing.

    Raises:
        UserError: ``path`` is a file, or a folder that is not empty.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or choose another place")
