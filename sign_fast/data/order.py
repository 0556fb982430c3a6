"""The order in which training reads a data set: a function of seed and position, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .datasets import Dataset


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    found = np.random.default_rng([seed, epoch]).permutation(size)
    found.flags.writeable = False
    return found


def indices_at(position: int, count: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """The `count` indices from `position` on in an endless sequence of permutations of `size`, one an epoch."""
    out: list[npt.NDArray[np.int64]] = []
    while count > 0:
        epoch, start = divmod(position, size)
        part = _order(seed, epoch, size)[start : start + count]
        out.append(part)
        position += len(part)
        count -= len(part)
    return np.concatenate(out)


def in_range(images: Tensor) -> Tensor:
    """Float32 images in [-1, 1] of uint8 ones, or of those that are so already."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def one_hot(classes: Tensor, label_dim: int) -> Tensor | None:
    """(N, label_dim) float32 rows of (N,) class numbers; None where label_dim is 0."""
    return torch.nn.functional.one_hot(classes, label_dim).float() if label_dim else None


class BatchLoader:
    """Batches of images in [-1, 1] with one-hot labels, decoded ahead in threads.

    Args:
        dataset: what to read.
        batch: images a global batch; rank r of `world` reads its r-th part of each.
        seed: of the order.
        label_dim: width of the one-hot rows, 0 for none.
        xflip: mirror every image with probability ½ (drawn from seed and position).
        rank, world: this process and their number; world divides batch.
        threads: decoding threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        label_dim: int = 0,
        xflip: bool = False,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
    ) -> None:
        self.dataset = dataset
        self.batch = batch
        self.seed = seed
        self.label_dim = label_dim
        self.xflip = xflip
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)
        self._pool = ThreadPoolExecutor(threads)

    def _load(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        indices = indices_at(iteration * self.batch, self.batch, len(self.dataset), self.seed)[self.part]
        images = torch.from_numpy(np.stack([self.dataset.image(int(i)) for i in indices]))
        if self.xflip:
            coins = np.random.default_rng([self.seed, iteration, 1]).random(self.batch)[self.part] < 0.5
            images = torch.where(torch.from_numpy(coins).reshape(-1, 1, 1, 1), images.flip(3), images)
        classes = torch.tensor([self.dataset.label(int(i)) for i in indices])
        return in_range(images), one_hot(classes, self.label_dim)

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of iterations start, start + 1, … without end; the next two are decoded ahead."""
        ahead: list[Future[tuple[Tensor, Tensor | None]]] = [self._pool.submit(self._load, start + i) for i in range(2)]
        iteration = start + len(ahead)
        try:
            while True:
                batch = ahead.pop(0).result()
                ahead.append(self._pool.submit(self._load, iteration))
                iteration += 1
                yield batch
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
