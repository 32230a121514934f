"""Reading and writing files so that nothing half-written is left and errors say where."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jlora.errors import UserError


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
def atomic_path(path: str | Path, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``.

    With ``directory=True`` the temporary path is a new folder that replaces the whole folder
    ``path``. On any error the temporary is removed and ``path`` stays as it was.

    Raises:
        UserError: the folder cannot be made or written (full disk, permissions).
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A pid in the name keeps two processes that write the same file apart.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        remove(temporary)
        if directory:
            temporary.mkdir()
        yield temporary
        if directory and path.is_dir():
            # A folder cannot be replaced in one rename: the old one is moved out of the way first,
            # and `recover_directory` puts it back if the process dies between the two renames.
            old = path.with_name(f".{path.name}.old")
            remove(old)
            os.rename(path, old)
            os.rename(temporary, path)
            remove(old)
        else:
            sync(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise os_error("write", path, error) from error
    finally:
        if temporary is not None:
            remove(temporary)


def recover_directory(path: str | Path) -> None:
    """Undo a folder replacement of `atomic_path` that was killed between its two renames."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        os.rename(old, path)


def sync(path: Path) -> None:
    """Flush a file to the disk, so that a rename never shows an empty file after a power cut."""
    if path.is_file():
        with open(path, "rb+") as handle:
            os.fsync(handle.fileno())


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
    """Read a UTF-8 text file.

    Raises:
        UserError: the file is missing, unreadable, or not UTF-8 (with the line of the first bad
            byte).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise os_error("read", path, error) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); "
            "convert it, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error


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
