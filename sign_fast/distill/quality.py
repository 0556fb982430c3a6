"""Is a distillation converging? What its losses do not tell: they hover around zero while the images get better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import SignFastError
from ..metrics.frechet import FeatureStatistics, Float64, frechet_distance
from ..models.precond import Precond
from ..sampling import ImageGenerator
from ..sampling.noise import check_seeds
from ..sampling.pictures import UInt8, arrange, save_png
from ..sampling.requests import Labels, check_labels

SCORE_GAP_SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels of `score_gap`: from fine detail to the composition of an image."""
IDEMPOTENCE_COLUMNS = ["idempotence_noise", "idempotence_data", "reconstruction"]
"""What `idempotence_and_reconstruction` returns."""


class Quality(Protocol):
    """How bad generated images are: 0 at best, the lower the better."""

    def __call__(self, images: Tensor, /) -> float:
        """The figure for (N, C, H, W) uint8 images on any device."""


class FeatureDistance:
    """A `Quality`: Fréchet distance of the images' features to those of real images (Heusel et al. 2017, eq. 6).

    Args:
        features: (B, C, H, W) float32 images in [-1, 1] on `device` -> (B, D).
        mu, sigma: mean (D,) and covariance (D, D) of the real images' features.
        device: where `features` runs.
        batch: images it is given at a time.

    Raises:
        SignFastError: mu and sigma do not fit each other.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        mu: Float64,
        sigma: Float64,
        *,
        device: torch.device | str = "cpu",
        batch: int = 500,
    ) -> None:
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise SignFastError(f"mu {mu.shape} and sigma {sigma.shape} must be (D,) and (D, D) of the same features")
        self._features = features
        self._mu, self._sigma = mu, sigma
        self._device = torch.device(device)
        self._batch = batch

    @classmethod
    def to_images(
        cls,
        features: Callable[[Tensor], Tensor],
        real: Tensor,
        *,
        device: torch.device | str = "cpu",
        batch: int = 500,
    ) -> FeatureDistance:
        """The distance to (N, C, H, W) uint8 real images; other arguments as in the constructor."""
        found = _statistics(features, real, torch.device(device), batch)
        return cls(features, found.mean, found.covariance, device=device, batch=batch)

    def __call__(self, images: Tensor) -> float:
        """Distance of at least 2 (N, C, H, W) uint8 images; distances at different N do not compare.

        Raises:
            SignFastError: fewer images, features of another width, or features that are not finite.
        """
        found = _statistics(self._features, images, self._device, self._batch)
        if found.dim != len(self._mu):
            raise SignFastError(f"features have {found.dim} values an image, the real ones' mean {len(self._mu)}")
        return frechet_distance(found.mean, found.covariance, self._mu, self._sigma)


@torch.no_grad()
def _statistics(
    features: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, batch: int
) -> FeatureStatistics:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise SignFastError(f"quality is of (N, C, H, W) uint8 images, not {tuple(images.shape)} {images.dtype}")
    if len(images) < 2:
        raise SignFastError(f"a Fréchet distance needs at least 2 images, not {len(images)}")
    parts = [features(part.to(device).float() / 127.5 - 1).cpu().numpy() for part in images.split(batch)]
    found = FeatureStatistics(parts[0].shape[1])
    for part in parts:
        found.append(part)
    return found


def no_quality(shape: tuple[int, int, int]) -> str | None:
    """Why there is no quality for images of this shape (C, H, W), or None where there is one."""
    if tuple(shape) != (1, 8, 8):
        channels, height, width = shape
        return (
            f"no quality is logged: no features are bundled for {channels}×{height}×{width} images, only for the 1×8×8 "
            "digits; give a FeatureDistance of your own"
        )
    return None


def quality_for(shape: tuple[int, int, int]) -> Quality | None:
    """The bundled quality for images of this shape (C, H, W), or None; `no_quality` says why.

    1×8×8: the Fréchet distance to scikit-learn's digits, equal to `metrics.digits_classifier.digits_distance`.
    """
    if no_quality(shape) is not None:
        return None
    from ..metrics.digits_classifier import bundled

    net, mu, sigma = bundled()
    return FeatureDistance(net.features, mu, sigma)


# ---- images of a student in training ----

_generators: WeakKeyDictionary[nn.Module, ImageGenerator] = WeakKeyDictionary()


def _generator(student: nn.Module) -> ImageGenerator:
    """One inference copy for as long as the student lives, with its weights of now."""
    if not isinstance(student, Precond):
        return ImageGenerator(student)  # runs as it is: nothing to keep
    generator = _generators.get(student)
    if generator is None or generator.device != next(student.parameters()).device:
        generator = _generators[student] = ImageGenerator(student)
    else:
        generator.net.update(student)
    return generator


def sample_images(
    student: nn.Module,
    kind: str = "one_step",
    num: int = 500,
    *,
    seeds: Iterable[int] | None = None,
    batch: int = 500,
    labels: Labels = None,
    steps: int = 1,
    **options: Any,
) -> Tensor:
    """Images of a student in training, through an inference copy that is made once and then follows its weights.

    The same seeds each time make curves comparable, and are the images of `sign-fast generate`. No random state is
    touched, nor is the student.

    Args:
        student: usually the EMA, on the device where it shall run, whole and not sharded. A module that is not of
            `sign_fast.models` runs itself, and is put in eval mode.
        kind: "one_step" or "few_step"; "recursive" (or "multistep") for a student without a time input.
        num: images, of seeds 0 to num − 1.
        seeds: in place of num.
        batch: images at a time.
        labels: a class number, or one an image; None draws them from the seeds where there are classes.
        steps: calls of the network.
        options: of the sampler, e.g. sigma=2.5, or noise_levels of "multistep".

    Returns:
        (N, C, H, W) uint8 on the student's device.

    Raises:
        SignFastError: an argument is wrong, or does not go with the student.
    """
    generator = _generator(student)
    numbers = check_seeds(range(num) if seeds is None else seeds)
    classes = check_labels(labels, len(numbers), generator.label_dim)
    parts = []
    for start in range(0, len(numbers), batch):
        part = slice(start, start + batch)
        of_part = None if classes is None else classes[part]
        parts.append(generator(numbers[part], steps, of_part, kind, **options))
    return torch.cat(parts).permute(0, 3, 1, 2)


def sample_grid(folder: Path, iteration: int, images: Tensor) -> UInt8:
    """Write samples-ITERATION.png, a nearly square grid of (N, C, H, W) uint8 images, and return it (H, W, C).

    Raises:
        SignFastError: C is neither 1 nor 3, or the file cannot be written.
    """
    grid = arrange(list(images.permute(0, 2, 3, 1).cpu().numpy()))
    save_png(folder / f"samples-{iteration:08d}.png", grid)
    return grid


# ---- what the images do not show ----


def _rms(difference: Tensor) -> Tensor:
    return difference.double().square().mean().sqrt()


@torch.no_grad()
def idempotence_and_reconstruction(
    student: nn.Module, held_out: Tensor, latents: Tensor, labels: Tensor | None = None
) -> dict[str, float]:
    """How far SIGN's student f is from idempotent, and from the identity on data; pixels in [-1, 1].

    The identity and constants are perfectly idempotent: read it beside the quality of f(z), never alone.

    Args:
        student: f, time-free; its inference copy is the one of `sample_images`.
        held_out: (N, C, H, W) in [-1, 1], images that the student was not trained on.
        latents: (M, C, H, W) standard normal z.
        labels: (max(N, M), label_dim) or (1, label_dim), where there are classes.

    Returns:
        Root mean squares over all pixels: "idempotence_noise" of f(f(z)) − f(z), "idempotence_data" of
        f(f(x)) − f(x), "reconstruction" of f(x) − x.

    Raises:
        SignFastError: the student has a time input.
    """
    if not getattr(student, "time_free", False):
        raise SignFastError("idempotence is of a student without a time input: this one takes a noise level")
    f = _generator(student).net

    def call(u: Tensor) -> Tensor:
        return f(u) if labels is None else f(u, labels[: len(u)])

    g, y = call(latents), call(held_out)
    values = torch.stack([_rms(call(g) - g), _rms(call(y) - y), _rms(y - held_out)])
    return dict(zip(IDEMPOTENCE_COLUMNS, values.tolist(), strict=True))


def score_gap_columns(sigmas: Sequence[float] = SCORE_GAP_SIGMAS) -> list[str]:
    """The names of `score_gap`'s values, e.g. "score_gap_0.1"."""
    return [f"score_gap_{sigma:g}" for sigma in sigmas]


@torch.no_grad()
def score_gap(
    teacher: nn.Module,
    fake: nn.Module,
    images: Tensor,
    noise: Tensor,
    sigmas: Sequence[float] = SCORE_GAP_SIGMAS,
    labels: Tensor | None = None,
) -> dict[str, float]:
    """Where the fake score still differs from the teacher: RMS of y_real − y_fake at each noise level.

    y = D(x + σn; σ), both on the student's images x. The fake score starts as the teacher, so the gap starts near 0 and
    rises while the fake score learns what the student makes; from then on it is what still drives the student, σ by
    σ, over a floor that the fake score's own noise sets. Read it beside the quality.

    Args:
        teacher, fake: denoisers net(x, sigma, labels); put in eval mode meanwhile.
        images: (B, C, H, W) in about [-1, 1], made by the student.
        noise: n, standard normal, of the same shape; the same each time makes curves comparable.
        sigmas: noise levels.
        labels: (B, label_dim) or None.

    Returns:
        Root mean squares over all images and pixels, by the names of `score_gap_columns`.
    """
    levels = torch.tensor(list(sigmas), dtype=torch.float32, device=images.device)
    gaps = []
    with _evaluating(teacher), _evaluating(fake):
        for sigma in levels:
            noised = images + noise * sigma
            gaps.append(_rms(teacher(noised, sigma, labels) - fake(noised, sigma, labels)))
    return dict(zip(score_gap_columns(sigmas), torch.stack(gaps).tolist(), strict=True))


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode: dropout would add to the gap, and draw numbers that a resumed run does not."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
