"""What an iteration reads: real images or the teacher's samples, and pairs, as a function of its number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import BatchLoader, Dataset
from ..training.seeds import seed_of
from .pairs import Pairs, pairs_at
from .settings import DistillSettings

_ORDER_AS_IMAGES, _ORDER_AS_PAIRS = 14, 15  # streams of random numbers


class Batches:
    """Shares of one process, on its device.

    Args:
        settings: of the run.
        dataset: real images, or None.
        pairs: the teacher's, where settings.needs_pairs.
        label_dim: classes of the teacher.
        device: where they go.
        rank, world: this process and their number.
    """

    def __init__(
        self,
        settings: DistillSettings,
        dataset: Dataset | None,
        pairs: Pairs | None,
        label_dim: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        s = self.settings = settings
        self.pairs = pairs
        self.device = device
        self.part = slice(rank * s.batch // world, (rank + 1) * s.batch // world)
        self.place = {"rank": rank, "world": world}
        self.label_dim = label_dim
        self.dataset = dataset if s.method != "sid" else None
        self._loaded: Iterator[tuple[Tensor, Tensor | None]] | None = None
        self._next = -1

    def at(self, iteration: int) -> tuple[Tensor | None, Tensor | None, Pairs | None]:
        """(images, labels, pairs) of an iteration, fastest for the one after the last; None where it needs none."""
        s = self.settings
        images = labels = pairs = None
        if self.dataset is not None:
            images, labels = self._read(iteration)
        elif self.pairs is not None and s.method == "sign":
            _, images, labels = pairs_at(self.pairs, iteration, s.batch, seed_of(s.seed, _ORDER_AS_IMAGES), self.part)
            images = _channels_last(images)
        if self.pairs is not None and s.reg:
            z, y, classes = pairs_at(self.pairs, iteration, s.batch, seed_of(s.seed, _ORDER_AS_PAIRS), self.part)
            pairs = (z, y, classes) if z.ndim == 5 else (_channels_last(z), _channels_last(y), classes)
        return images, labels, pairs

    def _read(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        if self._loaded is None or iteration != self._next:
            self.close()
            assert self.dataset is not None
            s = self.settings
            loader = BatchLoader(
                self.dataset, s.batch, s.seed, self.label_dim, s.xflip, threads=s.threads, **self.place
            )
            self._loaded = loader.batches(iteration)
        self._next = iteration + 1
        images, labels = next(self._loaded)
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return images, None if labels is None else labels.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._loaded is not None:
            self._loaded.close()  # type: ignore[attr-defined]
            self._loaded = None


def _channels_last(images: Tensor) -> Tensor:
    return images.to(memory_format=torch.channels_last)
