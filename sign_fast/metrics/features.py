"""Images through a detector, batch by batch, on one process or several: moments, features, class probabilities."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ..errors import SignFastError
from ..sampling.transfer import PinnedRing, Transfer, begin_transfer, to_device
from .detectors import Detector
from .frechet import FeatureStatistics
from .images import ImageSource
from .score import SPLITS, ScoreSums

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What to keep of the images: moments (D² numbers), features (N·D), sums of probabilities (splits·K)."""

    moments: bool = True
    features: bool = False
    classes: bool = False
    splits: int = SPLITS


class Collected:
    """What has been seen of `count` images; with several processes, of this one's part until `gather`.

    Attributes:
        statistics: mean and covariance, where wanted.
        features: (count, D) float32 in the images' order, where wanted; the only part that grows with their number.
        score: sums for the Inception score, where wanted.
    """

    def __init__(self, count: int, wanted: Wanted) -> None:
        self.count = count
        self.wanted = wanted
        self.statistics: FeatureStatistics | None = None
        self.features: Float32 | None = None
        self.score: ScoreSums | None = None

    @property
    def width(self) -> int | None:
        """D, of features or moments; None where there are none."""
        if self.features is not None:
            return self.features.shape[1]
        return None if self.statistics is None else self.statistics.dim

    def append_features(self, start: int, rows: Float32) -> None:
        """Add the (B, D) features of images start to start + B − 1."""
        if self.wanted.moments:
            self.statistics = self.statistics or FeatureStatistics(rows.shape[1])
            self.statistics.append(rows)
        if self.wanted.features:
            if self.features is None:
                self.features = np.empty((self.count, rows.shape[1]), np.float32)
            self.features[start : start + len(rows)] = rows

    def append_probabilities(self, start: int, rows: Float32) -> None:
        """Add the (B, K) probabilities of images start to start + B − 1."""
        self.score = self.score or ScoreSums(self.count, rows.shape[1], self.wanted.splits)
        self.score.append(start, rows)


def cut(count: int, batch: int) -> list[range]:
    """Consecutive batches, cut before they are spread over processes, so that an image's is always the same."""
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def collect(
    source: ImageSource,
    detector: Detector,
    wanted: Wanted | None = None,
    *,
    batch: int = 250,
    rank: int = 0,
    world: int = 1,
    seen: Callable[[int], object] = lambda count: None,
) -> Collected:
    """Send images through the detector, each world-th batch from the rank-th on.

    While one batch is on the GPU the next is decoded or generated, and the one before added up. Images are dropped
    once they have been through.

    Args:
        source: of at least 2 images.
        detector: on whatever device.
        wanted: what to keep; None means the moments.
        batch: images at a time.
        rank, world: this process and their number.
        seen: called with the number of images that have been added since.

    Raises:
        SignFastError: too few images, images that the detector does not take, or values that are not finite.
    """
    wanted = wanted or Wanted()
    if len(source) < 2:
        raise SignFastError(f"{source.name} holds {len(source)} image: quality needs at least 2")
    if wanted.classes and len(source) < wanted.splits:
        ScoreSums(len(source), 1, wanted.splits)  # says what is wrong
    detector.prepare(source.shape, source.name, wanted.classes)
    found = Collected(len(source), wanted)
    parts = cut(len(source), batch)[rank::world]
    ring = PinnedRing(detector.device, slots=4) if detector.device.type == "cuda" else None
    pending: deque[tuple[range, Transfer | None, Transfer | None]] = deque()

    def add() -> None:
        part, features, probabilities = pending.popleft()
        if features is not None:
            found.append_features(part.start, _finite(features.result(), part, source, detector))
        if probabilities is not None:
            found.append_probabilities(part.start, _finite(probabilities.result(), part, source, detector))
        seen(len(part))

    for part, images in zip(parts, source.batches(parts), strict=True):
        images = to_device(images, detector.device)
        features = probabilities = None
        if wanted.moments or wanted.features:
            features = begin_transfer(detector.features(images), ring)
        if wanted.classes:
            probabilities = begin_transfer(detector.probabilities(images), ring)
        pending.append((part, features, probabilities))
        if len(pending) > 1:
            add()
    while pending:
        add()
    return found


def _finite(rows: Float32, part: range, source: ImageSource, detector: Detector) -> Float32:
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        number = part[int(np.flatnonzero(~finite)[0])]
        raise SignFastError(
            f"{detector.name} gives NaN or infinity for image {number} of {source.name}: another image or network"
        )
    return rows


def gather(found: Collected, batch: int, *, rank: int, world: int, device: torch.device) -> None:
    """Bring what all processes have collected to the first; the others' stays as it is. A collective.

    Moments are merged exactly, in the order of the ranks; features go to their images' places.

    Args:
        found: of this process, from `collect` with the same arguments.
        batch: as in `collect`.
        rank, world: this process and their number.
        device: of this process; NCCL sends from there.
    """
    if world == 1:
        return
    parts = cut(found.count, batch)
    # a process without a batch does not know the widths
    widths = torch.tensor([found.width or 0, _classes(found.score)], device=device)
    dist.all_reduce(widths, dist.ReduceOp.MAX)
    dim, classes = (int(width) for width in widths)
    for other in range(1, min(world, len(parts))):
        if rank not in (0, other):
            continue
        ours = parts[other::world]
        if found.wanted.moments:
            own = found.statistics if rank == other else FeatureStatistics(dim)
            assert own is not None
            both = _send(np.concatenate([own.mean[None], own.scatter]), other, rank, device)
            if rank == 0:
                assert found.statistics is not None
                found.statistics.merge(sum(map(len, ours)), both[0], both[1:])
        if found.wanted.classes:
            score = found.score if rank == other else ScoreSums(found.count, classes, found.wanted.splits)
            assert score is not None
            sums = np.concatenate([score.probabilities, score.negative_entropies[:, None]], 1)
            sums = _send(sums, other, rank, device)
            if rank == 0:
                assert found.score is not None
                found.score.probabilities += sums[:, :-1]
                found.score.negative_entropies += sums[:, -1]
        if found.wanted.features:
            assert found.features is not None
            for part in ours:
                rows = found.features[part.start : part.stop]
                rows[:] = _send(rows, other, rank, device)


def _classes(score: ScoreSums | None) -> int:
    return 0 if score is None else score.probabilities.shape[1]


def _send(array: npt.NDArray[Any], source: int, rank: int, device: torch.device) -> npt.NDArray[Any]:
    """On the first process, the array of process `source`, given one of its shape; elsewhere the array."""
    if rank == source:
        dist.send(torch.from_numpy(np.ascontiguousarray(array)).to(device), 0)
    elif rank == 0:
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        dist.recv(tensor, source)
        return tensor.cpu().numpy()
    return array
