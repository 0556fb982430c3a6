"""Arrays in .npz files of others: no pickle, sizes known before anything is read, images read in rows."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import SignFastError, first_line, short

Array = npt.NDArray[Any]
_MOST_DEFLATE = 1032  # bytes of one byte


@dataclass(frozen=True)
class Header:
    """Shape and dtype of an array, and whether its first index runs fastest."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


class NpzFile:
    """The arrays of an .npz file, read one at a time or row by row.

    Args:
        path: the file; it is opened for each reading and never written to.

    Raises:
        SignFastError: missing, not a zip, or an array in it that is none of plain numbers or text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers: dict[str, Header] = {}
        if not path.is_file():
            raise SignFastError(f"no file {path}: check the path")
        with self._explained(), zipfile.ZipFile(path) as archive:
            whole = path.stat().st_size
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        header = self._header(file, name)
                        self._check_size(header, name, archive.getinfo(name), file.tell(), whole)
                    self.headers[name.removesuffix(".npy")] = header

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SignFastError:
            raise
        # zipfile raises RuntimeError for encrypted files and NotImplementedError for other compressions
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
            raise SignFastError(f"{self.path} is not a whole .npz file ({first_line(error)}): copy it again") from error

    def _check_size(self, header: Header, name: str, member: zipfile.ZipInfo, begin: int, whole: int) -> None:
        """Whether the array can be as large as it says, before anything is made for it."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SignFastError(f"{self.path}: {name} is packed otherwise than NumPy does: write it with np.savez")
        claimed = math.prod(header.shape) * header.dtype.itemsize
        if min(header.shape, default=0) < 0 or begin + claimed > min(member.file_size, _MOST_DEFLATE * whole):
            raise SignFastError(
                f"{self.path} is not a whole .npz file ({name} is not as large as {short(header.shape)}): copy it again"
            )

    def _header(self, file: IO[bytes], name: str) -> Header:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise SignFastError(f"{self.path}: {name} is of an unknown version {version}: write it with np.savez")
        if dtype.hasobject or dtype.kind not in "fiubU":
            raise SignFastError(
                f"{self.path}: {name} is {short(dtype.str)}, not an array of numbers: pickles are not read, save plain "
                "arrays with np.savez"
            )
        return Header(tuple(shape), dtype, bool(fortran))

    def read(self, name: str) -> Array:
        """The whole array; look at `headers` first.

        Raises:
            SignFastError: truncated.
        """
        with self._explained(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))

    def rows(self, name: str, parts: Sequence[range]) -> Iterator[Array]:
        """The rows of each part in turn, without the rest of the array in memory.

        Args:
            name: of an array in C order.
            parts: ranges of its first index, ascending.

        Raises:
            SignFastError: truncated.
        """
        header = self.headers[name]
        size = int(np.prod(header.shape[1:])) * header.dtype.itemsize
        with self._explained(), zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
            self._header(file, name)
            position = 0
            for part in parts:
                self._pass(file, (part.start - position) * size)
                data = self._take(file, len(part) * size)
                position = part.stop
                yield np.frombuffer(data, header.dtype).reshape(len(part), *header.shape[1:])

    def _pass(self, file: IO[bytes], count: int) -> None:
        while count:
            count -= len(self._take(file, min(count, 1 << 20)))

    def _take(self, file: IO[bytes], count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise EOFError("it ends too early")
        return data
