"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import SignFastError

Float64 = npt.NDArray[np.float64]


@dataclass
class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 and constant memory.

    Batches are combined around their own means (Chan et al. 1983), so that large means lose no digits.

    Args:
        dim: length of a feature vector.
    """

    dim: int
    count: int = 0
    mean: Float64 = field(default_factory=lambda: np.zeros(0))
    scatter: Float64 = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.dim)
        self.scatter = np.zeros((self.dim, self.dim))

    def append(self, features: npt.NDArray[np.floating]) -> None:
        """Add (N, dim) features.

        Raises:
            ValueError: of another width.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (N, {self.dim}), not {features.shape}")
        if len(features) == 0:
            return
        x = features.astype(np.float64)
        mean = x.mean(0)
        centred = x - mean
        gap = mean - self.mean
        total = self.count + len(x)
        self.scatter = self.scatter + centred.T @ centred + np.outer(gap, gap) * (self.count * len(x) / total)
        self.mean = self.mean + gap * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Float64:
        """(dim, dim), divided by N − 1.

        Raises:
            SignFastError: of fewer than two features.
        """
        if self.count < 2:
            raise SignFastError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1: Float64, sigma1: Float64, mu2: Float64, sigma2: Float64) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the root by eigen-decomposition of the symmetric √Σ₁ Σ₂ √Σ₁.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric and positive semi-definite.

    Raises:
        SignFastError: a value is not finite.
    """
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise SignFastError("the features are not finite: the images or the network hold NaN or infinity")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ sigma2 @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    gap = mu1 - mu2
    return float(gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
