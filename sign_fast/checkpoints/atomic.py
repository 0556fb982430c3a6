"""Files that are either whole or not there: write beside the target, flush, rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ..errors import SignFastError, first_line

_umask_lock = threading.Lock()
_REMEDY = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "a file of that name is in the way: choose another folder",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
}

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}  # of a folder: there is no such thing


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into one line that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0, first_line(error))
        raise SignFastError(f"cannot write {path}: {remedy}") from error


@lru_cache(maxsize=1)
def _umask() -> int:
    with _umask_lock:  # reading it means setting it
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


def _ordinary_mode(path: Path) -> None:
    """Temporary files are made private; give `path` the mode that any new file has."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def _sync_file(path: Path) -> None:
    """Wait until the content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Wait until the names in the folder are on the disk, where the system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a system that opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Call `write(temporary)` and rename the result to `path`; on any error the temporary file is removed.

    Args:
        path: the target file; an older one is replaced in one step.
        write: writes the whole content to the path it is given.
        durable: wait until the content is on the disk, so that it survives a power cut too.

    Raises:
        SignFastError: the system refused (no space, no permission, …); `path` is as it was.
    """
    path = Path(path)
    with explain_os_errors(path), _removing(path.parent) as remove:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            if durable:
                _sync_file(temporary)
            _ordinary_mode(temporary)
            temporary.replace(path)
            if durable:
                _sync_folder(path.parent)
        finally:
            remove(temporary.name)


@contextmanager
def _removing(folder: Path) -> Iterator[Callable[[str], None]]:
    """How to remove a file of `folder` that may be gone, even if the folder has been renamed meanwhile."""
    if os.unlink not in os.supports_dir_fd:
        yield lambda name: (folder / name).unlink(missing_ok=True)
        return
    handle = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))  # a folder may be writable, not readable

    def remove(name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=handle)

    try:
        yield remove
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` for text (UTF-8)."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder (and its parents) and check that files can be made in it.

    Raises:
        SignFastError: it cannot be made or written.
    """
    path = Path(path)
    with explain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def replace_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Fill a temporary folder beside `target` and put it in its place, on the disk when this returns.

    On any error `target` is as it was. There may be folders in it; files that are links stay as they are.
    """
    make_folder(target.parent)
    _put_back(target.with_name(f".{target.name}.old"))
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    _ordinary_mode(temporary)
    old = temporary.with_suffix(".old")
    try:
        fill(temporary)
        with explain_os_errors(target):
            for path in temporary.rglob("*"):
                if path.is_symlink():
                    continue
                if path.is_dir():
                    _ordinary_mode(path)
                    _sync_folder(path)
                elif path.stat().st_nlink == 1:
                    _sync_file(path)
                    _ordinary_mode(path)
            _sync_folder(temporary)
            if target.exists():
                target.replace(old)
            temporary.replace(target)
            _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path) -> None:
    """Undo, or finish, what `replace_folder` was at when its process was killed."""
    target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if old.is_dir() and not target.exists():
        old.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def clean_up(folder: Path, *names: str) -> None:
    """Remove what a killed process left half-written; nobody else may be writing there.

    Args:
        folder: of the files written by `write_atomically`.
        names: of the folders in it that `replace_folder` writes; one that was half replaced is put back.
    """
    for name in names:
        _put_back(folder / f".{name}.old")
        for path in folder.glob(f".{name}.????????"):  # mkdtemp's eight characters
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.????????.tmp"):
        path.unlink(missing_ok=True)
