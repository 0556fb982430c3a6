"""Inception score: how sure a classifier is of each image, and how varied its answers are (Salimans et al. 2016)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import SignFastError
from .arrays import Features, as_tensor
from .frechet import Float64
from .kernel import MeanAndDeviation

SPLITS = 10


class ScoreSums:
    """All that the score needs of N images' probabilities, in constant memory.

    The images are cut into `splits` consecutive parts, as published; of each part are kept the sum of the
    probabilities and the sum of Σ p ln p.

    Args:
        count: N, of all images.
        classes: number of probabilities an image.
        splits: number of parts.

    Raises:
        SignFastError: fewer images than parts.
    """

    def __init__(self, count: int, classes: int, splits: int = SPLITS) -> None:
        if splits < 1 or count < splits:
            raise SignFastError(f"the Inception score of {splits} parts needs at least as many images, not {count}")
        self._bounds = [i * count // splits for i in range(splits + 1)]
        self.probabilities: Float64 = np.zeros((splits, classes))
        self.negative_entropies: Float64 = np.zeros(splits)

    def append(self, start: int, probabilities: npt.NDArray[np.floating]) -> None:
        """Add the (B, classes) probabilities of images start to start + B − 1."""
        p = probabilities.astype(np.float64)
        information = _p_ln_p(p).sum(1)
        for i, (low, high) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
            rows = slice(max(low - start, 0), max(high - start, 0))
            self.probabilities[i] += p[rows].sum(0)
            self.negative_entropies[i] += information[rows].sum()

    def score(self) -> MeanAndDeviation:
        """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y), mean and deviation over the parts."""
        counts = np.diff(self._bounds)
        mean = self.probabilities / counts[:, None]
        values = np.exp(self.negative_entropies / counts - _p_ln_p(mean).sum(1))
        return MeanAndDeviation(float(values.mean()), float(values.std()))


def inception_score(probabilities: Features, *, splits: int = SPLITS) -> MeanAndDeviation:
    """The score of (N, K) probabilities that are there already; `ScoreSums` takes them batch by batch.

    Args:
        probabilities: rows of a softmax, arrays or tensors.
        splits: consecutive parts of equal size.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        SignFastError: fewer images than parts, or rows that are not probabilities.
    """
    rows = as_tensor(probabilities, "probabilities").cpu().numpy()
    if (rows < 0).any() or not np.allclose(rows.sum(1, dtype=np.float64), 1, atol=1e-2):
        raise SignFastError("probabilities must be rows from 0 to 1 that sum to 1: apply a softmax")
    sums = ScoreSums(len(rows), rows.shape[1], splits)
    for start in range(0, len(rows), 4096):
        sums.append(start, rows[start : start + 4096])
    return sums.score()


def _p_ln_p(p: Float64) -> Float64:
    """p ln p, 0 at 0."""
    return p * np.log(p, out=np.zeros_like(p), where=p > 0)
