"""Images in one .npz file: "images" (N, C, H, W) and, where there are classes, "labels" (N,)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from ..errors import SignFastError, first_line
from .datasets import ArrayDataset


def read_arrays(path: Path) -> ArrayDataset:
    """The data set of an .npz file: images uint8, or floats in [-1, 1].

    Raises:
        SignFastError: not such a file, or its images or labels are not what training can read.
    """
    if not path.exists():
        raise SignFastError(f"no data set at {path}: there is no file of that name")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, NpzFile):
            with file:
                arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise SignFastError(f"{path} is not a whole .npz file ({first_line(error)}): write it again") from error
    if not isinstance(file, NpzFile):
        raise SignFastError(f"{path} holds one array as np.save writes it: write it with np.savez, the images by name")
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None or images.ndim != 4 or images.shape[2] != images.shape[3] or not len(images):
        raise SignFastError(f'{path} must hold "images" (N, C, H, W) of square images')
    if images.dtype != np.uint8:
        if not np.issubdtype(images.dtype, np.floating):
            raise SignFastError(f"{path}: images are {images.dtype}: write uint8, or floats in [-1, 1]")
        images = images.astype(np.float32)
        _check_values(images, path)
    if labels is not None:
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise SignFastError(f'{path}: "labels" must be {len(images)} whole numbers from 0, one an image')
        labels = labels.astype(np.int64)
    return ArrayDataset(images, labels)


def _check_values(images: npt.NDArray[np.float32], path: Path) -> None:
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        number = int(np.flatnonzero(~finite)[0])
        raise SignFastError(
            f"{path}: image {number} holds NaN or Inf, {int((~finite).sum())} of {len(images)} do: leave them out"
        )
    outside = np.abs(images).max(axis=(1, 2, 3)) > 1
    if outside.any():
        number = int(np.flatnonzero(outside)[0])
        raise SignFastError(f"{path}: image {number} goes beyond [-1, 1]: scale the images to it, or write uint8")
