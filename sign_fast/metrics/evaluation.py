"""Several metrics in one pass over the images, and one over the reference where it is images too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SignFastError
from .detectors import Detector, DigitsDetector, InceptionDetector
from .features import Collected, Wanted, collect
from .frechet import frechet_distance
from .images import ImageSource, open_images
from .kernel import SUBSETS, kernel_distance
from .manifold import NEIGHBOURS, precision_recall
from .reference import DIGITS, Reference, bundled_digits, read_reference
from .score import SPLITS

METRICS = ("fid", "kid", "is", "precision", "recall")
_OF_FEATURES = {"kid", "precision", "recall"}


def check_metrics(names: str | Iterable[str]) -> list[str]:
    """Names of metrics, of a list or separated by commas, each once, in the order of `METRICS`.

    Raises:
        SignFastError: an unknown one, or none.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    wanted = [part.strip().lower() for part in parts]
    for name in wanted:
        if name not in METRICS:
            raise SignFastError(f"no metric {name!r}: there are {', '.join(METRICS)}")
    if not wanted:
        raise SignFastError(f"no metric is named: there are {', '.join(METRICS)}")
    return [name for name in METRICS if name in wanted]


@dataclass(frozen=True)
class Protocol:
    """How the metrics are computed; the defaults are the published ones.

    Args:
        kid_subsets: subsets of the kernel distance.
        kid_subset_size: images of each; None means min(1000, images, reference).
        seed: of the subsets.
        splits: consecutive parts of the Inception score.
        neighbours: k of precision and recall.
    """

    kid_subsets: int = SUBSETS
    kid_subset_size: int | None = None
    seed: int = 0
    splits: int = SPLITS
    neighbours: int = NEIGHBOURS


def wanted_of_images(metrics: Sequence[str], protocol: Protocol) -> Wanted:
    """What the metrics need of the images."""
    return Wanted("fid" in metrics, bool(_OF_FEATURES & {*metrics}), "is" in metrics, protocol.splits)


def wanted_of_reference(metrics: Sequence[str], reference: Reference) -> Wanted | None:
    """What has to be computed from the reference's images; None where the file holds all that is needed.

    Raises:
        SignFastError: the reference lacks it, and has no images.
    """
    needs_moments = "fid" in metrics and reference.mu is None
    by_features = [name for name in metrics if name in _OF_FEATURES]
    needs_features = bool(by_features) and reference.features is None
    if reference.images is None and (needs_moments or needs_features):
        lacking = by_features if needs_features else ["fid"]
        held = "mu and sigma" if needs_features else "features"
        raise SignFastError(
            f"{', '.join(lacking)} cannot be had from {reference.name}, which holds {held} only: give images (folder, "
            "zip, .npz with arr_0), or a file of --save-reference with --save-features"
        )
    return Wanted(needs_moments, needs_features) if needs_moments or needs_features else None


def check_counts(metrics: Sequence[str], protocol: Protocol, images: int, reference: Reference | None) -> None:
    """Refuse too few images before any work is done.

    Raises:
        SignFastError: naming the metric and what it needs.
    """
    counts = [images]
    if reference is not None and _OF_FEATURES & {*metrics}:
        held = reference.features if reference.features is not None else reference.images
        counts += [] if held is None else [len(held)]
    fewest = min(counts)
    size = protocol.kid_subset_size
    if "kid" in metrics and size is not None and fewest < size:
        raise SignFastError(
            f"kid in subsets of {size} needs that many images and as many of the reference, not {fewest}: take more, "
            "or smaller subsets"
        )
    if {"precision", "recall"} & {*metrics} and fewest <= protocol.neighbours:
        raise SignFastError(f"precision and recall need more than {protocol.neighbours} images, not {fewest}")
    if "is" in metrics and images < protocol.splits:
        raise SignFastError(f"the Inception score in {protocol.splits} parts needs as many images, not {images}")


def values(
    metrics: Sequence[str],
    found: Collected,
    reference: Reference | None,
    of_reference: Collected | None,
    protocol: Protocol,
    device: torch.device | str,
) -> dict[str, float]:
    """The metrics of what was collected.

    Args:
        metrics: names.
        found: of the images.
        reference: what they are compared with; None where only "is" is asked for.
        of_reference: of the reference's images, as `wanted_of_reference` said.
        protocol: how.
        device: where to compute.

    Returns:
        "fid", "kid", "kid_std", "is", "is_std", "precision", "recall", those asked for.

    Raises:
        SignFastError: the reference does not fit.
    """
    out: dict[str, float] = {}
    if "fid" in metrics:
        assert found.statistics is not None and reference is not None
        mu, sigma = reference.mu, reference.sigma
        if mu is None or sigma is None:
            assert of_reference is not None and of_reference.statistics is not None
            mu, sigma = of_reference.statistics.mean, of_reference.statistics.covariance
        out["fid"] = frechet_distance(found.statistics.mean, found.statistics.covariance, mu, sigma)
    if _OF_FEATURES & {*metrics}:
        assert found.features is not None and reference is not None
        real = reference.features
        if real is None:
            assert of_reference is not None and of_reference.features is not None
            real = of_reference.features
        if "kid" in metrics:
            out["kid"], out["kid_std"] = kernel_distance(
                found.features,
                real,
                subsets=protocol.kid_subsets,
                subset_size=protocol.kid_subset_size,
                seed=protocol.seed,
                device=device,
            )
        if {"precision", "recall"} & {*metrics}:
            both = precision_recall(found.features, real, neighbours=protocol.neighbours, device=device)
            out |= {name: value for name, value in both._asdict().items() if name in metrics}
    if "is" in metrics:
        assert found.score is not None
        out["is"], out["is_std"] = found.score.score()
    return {name: out[name] for name in _ORDER if name in out}


_ORDER = ("fid", "kid", "kid_std", "is", "is_std", "precision", "recall")


def choose_detector(inception: str | os.PathLike[str] | None, device: torch.device | str | None = None) -> Detector:
    """The network of a TorchScript file, or without one that of the digits."""
    return DigitsDetector() if inception is None else InceptionDetector(Path(inception), device)


def choose_reference(
    reference: str | os.PathLike[str] | None, metrics: Sequence[str], detector: Detector
) -> Reference | None:
    """The reference named; without a name the digits' for their own detector. None where no metric needs one.

    Raises:
        SignFastError: it cannot be read, or one is needed and none is named.
    """
    needing = [name for name in metrics if name != "is"]
    if not needing:
        return None
    if reference is None and not isinstance(detector, DigitsDetector):
        raise SignFastError(
            f"{', '.join(needing)} compare with real images: give --reference, an .npz with mu and sigma such as the "
            "published ones, or images"
        )
    if reference is None or os.fspath(reference) == DIGITS:
        return bundled_digits(detector, moments_only=needing == ["fid"])
    return read_reference(reference)


def evaluate(
    images: ImageSource | str | os.PathLike[str] | Tensor,
    metrics: str | Iterable[str] = "fid",
    *,
    reference: Reference | str | os.PathLike[str] | None = None,
    inception: str | os.PathLike[str] | None = None,
    batch: int = 250,
    device: torch.device | str | None = None,
    protocol: Protocol | None = None,
    seen: Callable[[int], Any] = lambda count: None,
) -> dict[str, float]:
    """How good images are, in this process.

    Args:
        images: (N, C, H, W) uint8, or what `open_images` opens, or a source such as `images.GeneratedImages`.
        metrics: of "fid", "kid", "is", "precision", "recall"; a list, or separated by commas.
        reference: see `read_reference`; None means the digits, for 8×8 digits.
        inception: TorchScript file, see `InceptionDetector`; None means the digits classifier, for 8×8 digits.
        batch: images at a time.
        device: of the network and the metrics; None means CUDA where there is one.
        protocol: subsets, splits, neighbours; None means the published ones.
        seen: called with the number of images that have been measured since.

    Returns:
        "fid", "kid", "kid_std", "is", "is_std", "precision", "recall", those asked for.

    Raises:
        SignFastError: anything that does not fit, in one line.
    """
    names = check_metrics(metrics)
    protocol = protocol or Protocol()
    source = open_images(images) if isinstance(images, (str, os.PathLike, Tensor)) else images
    detector = choose_detector(inception, device)
    real = reference if isinstance(reference, Reference) else choose_reference(reference, names, detector)
    check_counts(names, protocol, len(source), real)
    width = detector.prepare(source.shape, source.name, "is" in names)
    of_reference = None
    if real is not None:
        real.check(detector, width)
        if (wanted := wanted_of_reference(names, real)) is not None:
            assert real.images is not None
            of_reference = collect(real.images, detector, wanted, batch=batch, seen=seen)
    found = collect(source, detector, wanted_of_images(names, protocol), batch=batch, seen=seen)
    return values(names, found, real, of_reference, protocol, detector.device)
