"""Reading and writing files so that nothing half-written is left and errors say where."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jlora.system.errors import UserError
from jlora.system.text import decode_text


def os_error(action: str, path: str | Path, error: OSError) -> UserError:
    """Turn an OSError into a UserError that names the path and the usual way out."""
    reason = error.strerror or str(error)
    hints = {
        "No space left on device": "free some space or choose another folder",
        "Permission denied": "check the permissions or choose another folder",
        "Read-only file system": "choose a folder that can be written",
        "No such file or directory": "check the path",
        "Is a directory": "give a file, not a folder",
        "Not a directory": "a file stands where a folder should; choose another path",
    }
    hint = hints.get(reason)
    return UserError(f"cannot {action} {path}: {reason}" + (f"; {hint}" if hint else ""))


@contextlib.contextmanager
def atomic_path(
    path: str | Path, directory: bool = False, keep: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``.

    With ``directory=True`` the temporary path is a new folder that replaces the whole folder
    ``path``. On any error the temporary is removed and ``path`` stays as it was.

    Args:
        keep: where the folder that is replaced goes, in place of what stands there; None: it is
            removed.

    Raises:
        UserError: the folder cannot be made or written (full disk, permissions).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        remove(temporary)
        if directory:
            temporary.mkdir()
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
            with contextlib.suppress(OSError):  # what went wrong before is what counts
                remove(temporary)


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written or removed; the pid keeps two processes apart."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_directory(new: Path, path: Path, keep: Path | None = None) -> None:
    """Put a folder in the place of another; see `atomic_path`.

    A folder cannot be replaced in one rename: the old one is moved out of the way first. What
    stands under a name is whole at any time, and if the process dies between the two renames the
    old one is still there, as ``keep`` or for `recover_directory`.
    """
    old = keep or _moved_away(path)
    while True:
        if path.is_dir():
            discard(old)
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError as error:
            # A reader that came between the two renames has put the old one back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            break
    if keep is None:
        discard(old)


def recover_directory(path: str | Path) -> None:
    """Undo a folder replacement of `atomic_path` that was killed between its two renames."""
    path = Path(path)
    # It fails where another process has recovered the folder, or has finished replacing it.
    with contextlib.suppress(OSError):
        if not path.exists():
            os.rename(_moved_away(path), path)


def _moved_away(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def discard(folder: Path) -> None:
    """Remove a folder if it is there; a process that dies in the midst leaves no part of it."""
    if folder.is_dir():
        doomed = temporary_name(folder)
        remove(doomed)
        os.rename(folder, doomed)
        remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine have left in a folder."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not is_alive(int(pid)):
            with contextlib.suppress(OSError):  # tidying stops nobody
                remove(path)


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # someone else's
        pass
    return True


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk.

    Without it a power cut could show a rename and an empty file.
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
    """Remove a file or folder if it is there."""
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
    """Fail now rather than after an hour of training.

    Raises:
        UserError: ``folder`` cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise os_error("write to", folder, error) from error


def check_absent(path: str | Path) -> None:
    """See that a result would overwrite nothing.

    Raises:
        UserError: a file or a folder with something in it stands at ``path``.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or choose another place")
