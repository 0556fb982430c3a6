"""Image data sets: the digits of scikit-learn, and a folder or zip of images with dataset.json labels."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..errors import SignFastError, first_line

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    RuntimeError,  # zipfile's for encrypted files, and for compressions that it does not know
    zipfile.BadZipFile,
    zlib.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UInt8 = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


class Dataset(Protocol):
    """Images (C, H, W) and class numbers."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where there are no labels."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Pixels:
        """(C, H, W) uint8, or float32 in [-1, 1]."""

    def label(self, index: int) -> int:
        """Class number; 0 where there are no labels."""

    def name(self, index: int) -> str:
        """Path of the image's file in the data set; its number where there are no files."""


class ArrayDataset:
    """Images that are in memory.

    Args:
        images: (N, C, H, W) uint8, or float32 in [-1, 1].
        labels: (N,) class numbers from 0, or None.
    """

    def __init__(self, images: Pixels, labels: npt.NDArray[np.int64] | None) -> None:
        self._images = images
        self._labels = labels
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.shape: tuple[int, int, int] = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Pixels:
        return self._images[index]

    def label(self, index: int) -> int:
        return 0 if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{index:06d}"


class ImageFolderDataset:
    """A folder or zip of square images of one size; labels from its dataset.json, as the published data tools write it.

    dataset.json: {"labels": [["00000/img00000000.png", 6], …]}, or "labels": null.

    Args:
        path: the folder or .zip.

    Raises:
        SignFastError: not there, not a zip, no image in it, or dataset.json does not fit.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        if self.path.is_dir():
            names = [str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()]
        elif self.path.suffix == ".zip" and self.path.is_file():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise SignFastError(
                    f"{self.path} is not a whole zip file ({first_line(error)}): copy it again"
                ) from error
            names = self._zip.namelist()
        else:
            raise SignFastError(f"no data set at {self.path}: give 'digits', a folder of images, a .zip or an .npz")
        self._names = sorted(name for name in names if Path(name).suffix.lower() in _ENDINGS)
        if not self._names:
            raise SignFastError(f"{self.path} holds no image ({', '.join(sorted(_ENDINGS))})")
        self._labels = self._read_labels() if "dataset.json" in names else None
        self.num_classes = 0 if self._labels is None else max(self._labels) + 1
        first = self._decode(self._names[0])
        if first.shape[1] != first.shape[2]:
            raise SignFastError(
                f"{self.path}: {self._names[0]} is {first.shape[2]}×{first.shape[1]}: images must be square"
            )
        self.shape: tuple[int, int, int] = (first.shape[0], first.shape[1], first.shape[2])

    def _bytes(self, name: str) -> bytes:
        if self._zip is None:
            return (self.path / name).read_bytes()
        with self._lock:  # one file handle, read by several threads
            return self._zip.read(name)

    def _read_labels(self) -> list[int] | None:
        where = f"{self.path}: dataset.json"
        try:
            entries = json.loads(self._bytes("dataset.json"))["labels"]
            if entries is None:
                return None
            table = {str(name): label for name, label in entries}
        except (*_UNREADABLE, KeyError, TypeError) as error:
            raise SignFastError(f'{where} must be {{"labels": [["name.png", 0], …]}} ({first_line(error)})') from error
        lacking = [name for name in self._names if name.replace("\\", "/") not in table]
        if lacking:
            raise SignFastError(f"{where} has no label for {lacking[0]} ({len(lacking)} images lack one)")
        labels = [table[name.replace("\\", "/")] for name in self._names]
        for name, label in zip(self._names, labels, strict=True):
            if type(label) is not int or label < 0:
                raise SignFastError(f"{where}: the label of {name} is {label!r}: labels are whole numbers from 0")
        return labels

    def _decode(self, name: str) -> UInt8:
        try:
            with Image.open(io.BytesIO(self._bytes(name))) as picture:
                picture.load()
                pixels = np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        except _UNREADABLE as error:
            raise SignFastError(
                f"{self.path}: {name} is not a readable image ({first_line(error)}): mend or remove it"
            ) from error
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> UInt8:
        pixels = self._decode(self._names[index])
        if pixels.shape != self.shape:
            raise SignFastError(
                f"{self.path}: {self._names[index]} is {pixels.shape} (C, H, W), the first image {self.shape}: "
                "all images must have one size and one mode"
            )
        return pixels

    def label(self, index: int) -> int:
        return 0 if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._names[index]


def digits(part: Literal["all", "train", "test"] = "all") -> ArrayDataset:
    """The 8×8 handwritten digits that come with scikit-learn (Alpaydin & Kaynak 1998), 10 classes.

    The held-out part "test" is the last fifth of every class in the file's order, 359 images; "train" the other 1,438.
    The file goes from writer to writer and does not name them, so a tail leaves the test few writers that training has
    seen, where a random fifth would leave it all of them.

    Args:
        part: "all" of the 1,797 images, or one part; each in the file's order.

    Raises:
        SignFastError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SignFastError("--data digits needs scikit-learn: pip install 'sign-fast[train]'") from error
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = raw.target.astype(np.int64)
    if part == "all":
        return ArrayDataset(images, labels)
    chosen = _last_fifth(labels) == (part == "test")
    return ArrayDataset(images[chosen], labels[chosen])


def _last_fifth(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which images are among the last fifth of their class, rounded."""
    last = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        last[members[len(members) - round(len(members) / 5) :]] = True
    return last


_DIGITS: dict[str, Literal["all", "train", "test"]] = {"digits": "all", "digits:train": "train", "digits:test": "test"}


def open_dataset(source: str | os.PathLike[str]) -> Dataset:
    """'digits', its parts 'digits:train' and 'digits:test' (see `digits`), or the path of a folder, .zip or .npz.

    Raises:
        SignFastError: it cannot be opened; one line saying why.
    """
    name = os.fspath(source)
    if name in _DIGITS:
        return digits(_DIGITS[name])
    if name.startswith("digits:"):
        raise SignFastError(f"no data set {name!r}: the digits are {', '.join(_DIGITS)}")
    if name.endswith(".npz"):
        from .arrays import read_arrays

        return read_arrays(Path(name))
    return ImageFolderDataset(source)
