"""One running job a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from ..errors import SignFastError
from .atomic import explain_os_errors


class FolderLock:
    """Holds FOLDER/.lock while a job writes there; the system lets go of it when the process ends, however it ends.

    Args:
        folder: an existing folder.

    Raises:
        SignFastError: another running process holds it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        with explain_os_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # a system without flock: no protection
            pass
        except BlockingIOError as error:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            self.release()
            raise SignFastError(
                f"{folder} is in use by a running job (process {holder or 'unknown'}): wait for it, or choose another "
                "--outdir"
            ) from error
        except OSError:  # a file system without locks
            pass
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, so that two jobs can never hold two files of one name."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
