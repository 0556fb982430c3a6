"""What images are compared with: published statistics, images, or a file of one's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.atomic import write_atomically
from ..checkpoints.store import read_weights
from ..errors import SignFastError
from .detectors import Detector, DigitsDetector, file_hash
from .features import Collected
from .frechet import Float64
from .images import ImageSource, open_images
from .npz import Header, NpzFile

DIGITS = "digits"
_LARGEST_WIDTH = 16384  # whose covariance has 2 GiB; no network here is wider
_MOST_NUMBERS = 2**34 // 4  # of features: 16 GiB, two million of 2048


@dataclass(frozen=True)
class Reference:
    """Any of moments, features and images of the real ones.

    Attributes:
        name: what was asked for.
        sha256: the first 12 hexadecimal digits of the file's; None for a folder.
        mu, sigma: (D,) and (D, D) float64.
        features: (N, D) float32 or float16.
        images: from which the rest can be computed.
        detector: sha256 of the network that moments and features came from, where the file says it.
    """

    name: str
    sha256: str | None = None
    mu: Float64 | None = None
    sigma: Float64 | None = None
    features: npt.NDArray[Any] | None = None
    images: ImageSource | None = None
    detector: str | None = None

    def check(self, detector: Detector, width: int) -> None:
        """Whether moments and features are of this network.

        Args:
            detector: the network.
            width: D of its features, as `prepare` said.

        Raises:
            SignFastError: they are of another.
        """
        if self.detector is not None and self.detector != detector.sha256:
            raise SignFastError(
                f"{self.name} was made with another network ({self.detector}) than {detector.name} "
                f"({detector.sha256}): make it anew with --save-reference"
            )
        for found in (self.mu, self.features):
            if found is not None and found.shape[-1] != width:
                raise SignFastError(
                    f"{self.name} has {found.shape[-1]} features an image, {detector.name} gives {width}: it is the "
                    "reference of another network"
                )


def read_reference(source: str | os.PathLike[str]) -> Reference:
    """'digits', an .npz with any of mu and sigma, features, arr_0 and images, a .safetensors, or a folder or zip.

    mu and sigma are EDM's and SiD's, arr_0 (N, H, W, C) uint8 images are ADM's; ADM's files hold both.

    Raises:
        SignFastError: it cannot be read, or its numbers are no statistics.
    """
    name = os.fspath(source)
    path = Path(name)
    if name.endswith(".safetensors"):
        # NumPy has no bfloat16
        found = {key: value.float() if value.dtype.itemsize == 2 else value for key, value in _weights(path).items()}
        tensors = {key: value.numpy() for key, value in found.items() if value.dtype.itemsize > 1}
        headers = {key: Header(value.shape, value.dtype, False) for key, value in tensors.items()}
        return _statistics(name, path, headers, tensors.__getitem__, None)
    if not name.endswith(".npz"):
        if name.endswith(".pkl"):
            raise SignFastError(f"{name} is a pickle, which is not read: take the .npz with mu and sigma")
        return Reference(name, file_hash(path) if path.is_file() else None, images=open_images(source))
    file = NpzFile(path)
    images = open_images(source) if file.headers.keys() & {"arr_0", "images"} else None
    return _statistics(name, path, file.headers, file.read, images)


def _weights(path: Path) -> Any:
    if not path.is_file():
        raise SignFastError(f"no file {path}: check the path")
    return read_weights(path)


def _statistics(name: str, path: Path, headers: dict[str, Header], read: Any, images: ImageSource | None) -> Reference:
    """A reference of arrays, whose sizes are looked at before they are read."""
    if ("mu" in headers) != ("sigma" in headers):
        raise SignFastError(f"{name} holds only one of mu and sigma: statistics are both")
    if images is None and not headers.keys() & {"mu", "features"}:
        held = ", ".join(sorted(headers)[:5]) or "nothing"
        raise SignFastError(f"{name} holds {held}: a reference has mu and sigma, features, or images as arr_0")
    mu = sigma = features = detector = None
    if "mu" in headers:
        shape = headers["mu"].shape
        if len(shape) != 1 or not 0 < shape[0] <= _LARGEST_WIDTH or headers["sigma"].shape != 2 * shape:
            raise SignFastError(f"{name}: mu {shape} and sigma {headers['sigma'].shape} must be (D,) and (D, D)")
        mu, sigma = (_floats(name, key, headers[key], read).astype(np.float64) for key in ("mu", "sigma"))
        _check_covariance(name, sigma)
    if "features" in headers:
        shape = headers["features"].shape
        if len(shape) != 2 or shape[0] < 2 or not 0 < shape[1] <= _LARGEST_WIDTH or shape[0] * shape[1] > _MOST_NUMBERS:
            raise SignFastError(f"{name}: features {shape} must be (N, D) of at least 2 images")
        features = _floats(name, "features", headers["features"], read)
        if mu is not None and shape[1] != len(mu):
            raise SignFastError(f"{name}: features {shape} and mu {mu.shape} are of different networks")
    if "detector" in headers and headers["detector"].shape == () and headers["detector"].dtype.kind == "U":
        detector = str(read("detector"))[:64]
    return Reference(name, file_hash(path), mu, sigma, features, images, detector)


def _floats(name: str, key: str, header: Header, read: Any) -> npt.NDArray[Any]:
    if header.dtype.kind != "f":
        raise SignFastError(f"{name}: {key} is {header.dtype}: statistics are floats")
    found: npt.NDArray[Any] = read(key)
    if not all(np.isfinite(found[i : i + 4096]).all() for i in range(0, len(found), 4096)):
        raise SignFastError(f"{name}: {key} holds NaN or infinity: make the file anew")
    return found


def _check_covariance(name: str, sigma: Float64) -> None:
    """Symmetric and positive semi-definite, up to what rounding each entry to float32 may do (‖E‖ ≤ ε·‖Σ‖)."""
    allowed = 4 * float(np.finfo(np.float32).eps) * float(np.linalg.norm(sigma))
    if np.abs(sigma - sigma.T).max() > allowed:
        raise SignFastError(f"{name}: sigma is not symmetric: it is no covariance")
    lowest = float(np.linalg.eigvalsh(sigma)[0])
    if lowest < -allowed:
        raise SignFastError(f"{name}: sigma has the eigenvalue {lowest:.3g}, below 0: it is no covariance")


def bundled_digits(detector: Detector, *, moments_only: bool) -> Reference:
    """The 1,797 digits of scikit-learn; with the digits' own detector their moments come with the library.

    Raises:
        SignFastError: scikit-learn is missing where the images themselves are needed.
    """
    if not isinstance(detector, DigitsDetector):
        return read_reference(DIGITS)
    from .digits_classifier import bundled

    _, mu, sigma = bundled()
    return Reference(DIGITS, None, mu, sigma, images=None if moments_only else open_images(DIGITS))


def save_reference(
    path: str | os.PathLike[str], found: Collected, detector: Detector, *, features: bool = False
) -> None:
    """Write an .npz with mu and sigma in float64, as EDM's files have them, and the detector's sha256.

    Args:
        path: ends in .npz.
        found: collected with `moments`, and with `features` where these are to be written, in float32.
        detector: what made them.
        features: write them too, for kernel distance, precision and recall.

    Raises:
        SignFastError: another ending, or it cannot be written.
    """
    path = check_ending(path)
    if found.statistics is None or (features and found.features is None):
        raise SignFastError("a reference needs moments, and features where they are asked for: collect them first")
    arrays: dict[str, npt.NDArray[Any]] = {"mu": found.statistics.mean, "sigma": found.statistics.covariance}
    arrays |= {"detector": np.array(detector.sha256), "count": np.array(found.count)}
    if features and found.features is not None:
        arrays["features"] = found.features

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, np.savez would add an ending
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def check_ending(path: str | os.PathLike[str]) -> Path:
    """The path of a reference to be written.

    Raises:
        SignFastError: it does not end in .npz.
    """
    if not os.fspath(path).endswith(".npz"):
        raise SignFastError(f"a reference is written as .npz: name it {Path(path).with_suffix('.npz')}")
    return Path(path)
