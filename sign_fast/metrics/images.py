"""Where images come from, batch by batch: generators, folders, zips, .npz files, tensors; never all at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import Dataset, open_dataset
from ..errors import SignFastError
from .npz import NpzFile

Shape = tuple[int, int, int]


class ImageSource(Protocol):
    """Images of one size, in a fixed order."""

    @property
    def name(self) -> str:
        """For messages and reports."""

    @property
    def shape(self) -> Shape:
        """(C, H, W), C 1 or 3."""

    def __len__(self) -> int: ...

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        """The images of each part in turn: (B, C, H, W) uint8, on any device.

        Args:
            parts: ranges of indices, ascending.

        Raises:
            SignFastError: an image cannot be read.
        """


class TensorImages:
    """Images that are in memory.

    Args:
        images: (N, C, H, W) uint8 on any device.

    Raises:
        SignFastError: of another shape or dtype.
    """

    def __init__(self, images: Tensor, name: str = "the images") -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise SignFastError(f"{name} must be (N, C, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
        self._images, self.name = images, name
        self.shape: Shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        for part in parts:
            yield self._images[part.start : part.stop]


class DatasetImages:
    """Images of a data set, decoded in threads while the batch before is being measured.

    Args:
        dataset: of uint8 images.
        name: of it.
        threads: None means the cores, at most 8.

    Raises:
        SignFastError: it holds floats.
    """

    def __init__(self, dataset: Dataset, name: str, threads: int | None = None) -> None:
        self._dataset, self.name, self.shape = dataset, name, dataset.shape
        self._threads = threads or min(8, os.cpu_count() or 1)
        if (dtype := dataset.image(0).dtype) != np.uint8:
            raise SignFastError(f"{name} holds {dtype} images: quality is of uint8 ones")

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        ahead: deque[list[Future[Any]]] = deque()
        try:
            for part in parts:
                ahead.append([pool.submit(self._dataset.image, i) for i in part])
                if len(ahead) > 1:
                    yield _stacked(ahead.popleft())
            while ahead:
                yield _stacked(ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stacked(images: list[Future[Any]]) -> Tensor:
    return torch.from_numpy(np.stack([image.result() for image in images]))


class NpzImages:
    """ADM's sample and reference files: arr_0 (N, H, W, C) uint8, read row by row.

    Args:
        file: an .npz with arr_0.

    Raises:
        SignFastError: arr_0 is no such array.
    """

    def __init__(self, file: NpzFile) -> None:
        self._file, self.name = file, str(file.path)
        header = file.headers["arr_0"]
        if len(header.shape) != 4 or header.dtype != np.uint8 or header.shape[3] not in (1, 3) or 0 in header.shape:
            raise SignFastError(
                f"{file.path}: arr_0 is {header.shape} {header.dtype}: images must be (N, H, W, C) uint8 with C 1 or 3"
            )
        if header.fortran:
            raise SignFastError(f"{file.path}: arr_0 is in Fortran order: save np.ascontiguousarray of it")
        self._count, height, width, channels = header.shape
        self.shape: Shape = (channels, height, width)

    def __len__(self) -> int:
        return self._count

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        rows = self._file.rows("arr_0", parts)
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            ahead = pool.submit(next, rows, None)
            while (found := ahead.result()) is not None:
                ahead = pool.submit(next, rows, None)
                yield torch.from_numpy(found.transpose(0, 3, 1, 2).copy())


class GeneratedImages:
    """Images that a generator makes when they are asked for, left on its device.

    Args:
        generator: an `ImageGenerator`.
        seeds: one an image.
        name: of the network.
        options: of the generator's call, e.g. steps.

    Raises:
        SignFastError: a seed or an option is wrong.
    """

    def __init__(self, generator: Any, seeds: Sequence[int], name: str = "the generator", **options: Any) -> None:
        generator.check(seeds, **options)
        self._generator, self._seeds, self.name, self._options = generator, seeds, name, options
        self.shape: Shape = generator.image_shape

    def __len__(self) -> int:
        return len(self._seeds)

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        for part in parts:
            yield self._generator(self._seeds[part.start : part.stop], **self._options).permute(0, 3, 1, 2)


class FirstImages:
    """The first so many images of a source.

    Args:
        source: any.
        count: how many.

    Raises:
        SignFastError: there are not so many.
    """

    def __init__(self, source: ImageSource, count: int) -> None:
        if count > len(source):
            raise SignFastError(f"{source.name} holds {len(source)} images, not {count}")
        self._source, self._count = source, count
        self.name, self.shape = source.name, source.shape

    def __len__(self) -> int:
        return self._count

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        return self._source.batches(parts)


def open_images(source: str | os.PathLike[str] | Tensor) -> ImageSource:
    """A folder, a .zip, an .npz with "images" (N, C, H, W) or arr_0 (N, H, W, C), 'digits', or a uint8 tensor.

    Nothing of a zip is extracted.

    Raises:
        SignFastError: it cannot be opened; one line saying why.
    """
    if isinstance(source, Tensor):
        return TensorImages(source)
    name = os.fspath(source)
    if name.endswith(".npz") and Path(name).is_file():
        file = NpzFile(Path(name))
        if "arr_0" in file.headers:
            return NpzImages(file)
    return DatasetImages(open_dataset(source), name)
