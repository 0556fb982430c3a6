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
        rows = np.empty((len(features) + 1, self.dim))
        centred, last = rows[:-1], rows[-1]
        centred[:] = features
        mean = centred.mean(0)
        centred -= mean
        # the step between the means is one more row, so that all is one symmetric product added in place
        last[:] = self._move_mean(mean, len(features))
        self.scatter += rows.T @ rows

    def merge(self, count: int, mean: Float64, scatter: Float64) -> None:
        """Add what another one has seen.

        Args:
            count: its number of features.
            mean: (dim,).
            scatter: (dim, dim), sum of the outer products around its mean.

        Raises:
            ValueError: of another width.
        """
        if mean.shape != (self.dim,) or scatter.shape != (self.dim, self.dim):
            raise ValueError(f"moments must be of {self.dim} features, not {mean.shape} and {scatter.shape}")
        if count:
            step = self._move_mean(mean, count)
            self.scatter += scatter
            self.scatter += np.outer(step, step)

    def _move_mean(self, mean: Float64, count: int) -> Float64:
        """Take `count` features of this mean into mean and count; the vector whose outer product the scatter gains."""
        gap = mean - self.mean
        total = self.count + count
        step: Float64 = gap * np.sqrt(self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total
        return step

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
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the last the sum of the singular values of L₁ᵀL₂, Σᵢ = LᵢLᵢᵀ.

    Each Lᵢ is from the eigen-decomposition of Σᵢ; no root is taken of eigenvalues of the product, whose condition is
    the square. Eigenvalues below the rounding of the largest are left out: their square roots would add up to an error
    that grows with the dimension where there are fewer images than features.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric and positive semi-definite.

    Raises:
        SignFastError: shapes that do not fit each other, or a value that is not finite.
    """
    if mu1.ndim != 1 or mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != 2 * mu1.shape:
        raise SignFastError(
            f"means {mu1.shape} and {mu2.shape} and covariances {sigma1.shape} and {sigma2.shape} must be (D,) and "
            "(D, D) of the same features"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise SignFastError("the features are not finite: the images or the network hold NaN or infinity")
    cross = np.linalg.svd(_root(sigma1).T @ _root(sigma2), compute_uv=False).sum()
    gap = mu1 - mu2
    found = gap @ gap + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return float(np.maximum(0.0, found))  # of equal ones roundings may be left, of a NaN a NaN


def _root(sigma: Float64) -> Float64:
    """L, (D, rank), of sigma = L Lᵀ."""
    values, vectors = np.linalg.eigh(np.asarray(sigma, np.float64))
    kept = values > _rounding(values)
    root: Float64 = vectors[:, kept] * np.sqrt(values[kept])
    return root


def _rounding(eigenvalues: Float64) -> float:
    """What an eigen-decomposition leaves of eigenvalues that are 0: D·ε times the largest."""
    return float(len(eigenvalues) * np.finfo(np.float64).eps * np.abs(eigenvalues).max(initial=0))
