"""Networks whose features measure images: a TorchScript file such as the published Inception's, the digits' own."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import SignFastError, first_line

INCEPTION = "inception-2015-12-05.pt"
WHICH_FILE = (
    f"give --inception FILE, a TorchScript network such as {INCEPTION} of stylegan2-ada-pytorch, whose 2048 features "
    "the published figures are of"
)
_HASH_DIGITS = 12
_MOST_PIXELS = 8192**2


class Detector(Protocol):
    """Turns images into features, and where it can into probabilities of classes."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def sha256(self) -> str:
        """The first 12 hexadecimal digits of the file's."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def prepare(self, shape: tuple[int, int, int], source: str, classes: bool = False) -> int:
        """Find out whether it takes (C, H, W) images, and knows classes where these are wanted; D of its features.

        Raises:
            SignFastError: it does not; `source` names the images.
        """

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 on `device` -> (B, D) float32."""

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 on `device` -> (B, K) float32 rows that sum to 1.

        After `prepare` with `classes`.
        """


def file_hash(path: Path) -> str:
    """The first 12 hexadecimal digits of a file's sha256.

    Raises:
        SignFastError: it cannot be read.
    """
    try:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                found.update(data)
        return found.hexdigest()[:_HASH_DIGITS]
    except OSError as error:
        raise SignFastError(f"cannot read {path} ({error.strerror or first_line(error)}): check the path") from error


class InceptionDetector:
    """A network in a TorchScript file. Its code runs, inside TorchScript's interpreter: use files that you trust.

    Its `forward` decides how it is called. With an argument `return_features`, as the published file has it, features
    come from net(images, return_features=True), and class probabilities from net(images, no_output_bias=True), the
    second argument where it is known; what does not sum to 1 is taken for logits. Without, net(images) gives features
    and there are no classes. It is given 3 channels of uint8 in 0 to 255, or the same values as float32 if it fails
    on bytes. Grey images are repeated. Any resizing is its own.

    Convolutions compute in float32, not TensorFloat-32, whatever the settings.

    Args:
        path: the file.
        device: where it runs; None means CUDA where there is one.

    Raises:
        SignFastError: missing, not TorchScript, or it cannot be loaded.
    """

    def __init__(self, path: Path, device: torch.device | str | None = None) -> None:
        from ..checkpoints.store import resolve_device

        self.device = resolve_device(device)
        self.name = path.name
        self._path = path
        self._net = _load(path, self.device)
        self._arguments = {argument.name for argument in self._net.forward.schema.arguments}
        self._dtype = torch.uint8
        self._logits = False

    @cached_property
    def sha256(self) -> str:
        return file_hash(self._path)

    def prepare(self, shape: tuple[int, int, int], source: str, classes: bool = False) -> int:
        if shape[0] not in (1, 3):
            raise SignFastError(f"{source} has images of {shape[0]} channels: an Inception network takes 1 or 3")
        if shape[1] * shape[2] > _MOST_PIXELS:
            size = "×".join(map(str, shape))
            raise SignFastError(f"{source} has {size} images, more than {_MOST_PIXELS:,} pixels: make them smaller")
        values = torch.arange(2 * shape[0] * shape[1] * shape[2], device=self.device) * 37 % 256
        images = values.to(torch.uint8).reshape(2, *shape)
        try:
            width = self.features(images).shape[1]
        except SignFastError:
            self._dtype = torch.float32
            width = self.features(images).shape[1]
        if classes:
            if "return_features" not in self._arguments:
                raise SignFastError(
                    f"{self.name} gives features and no classes, which the Inception score needs: give a network whose "
                    f"forward knows return_features, such as {INCEPTION}"
                )
            rows = self._called(images, **self._of_classes())
            self._logits = bool((rows < 0).any()) or not torch.allclose(rows.sum(1), rows.new_ones(2), atol=1e-3)
        return width

    def features(self, images: Tensor) -> Tensor:
        return self._called(images, **({"return_features": True} if "return_features" in self._arguments else {}))

    def probabilities(self, images: Tensor) -> Tensor:
        rows = self._called(images, **self._of_classes())
        return rows.softmax(1) if self._logits else rows

    def _of_classes(self) -> dict[str, bool]:
        # the published score is without the bias of the last layer
        return {"no_output_bias": True} if "no_output_bias" in self._arguments else {}

    @torch.no_grad()
    def _called(self, images: Tensor, **options: bool) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        images = images.contiguous().to(self._dtype)
        try:
            # fusers compile anew for each batch size, and those of some versions of torch fail on the published file
            with _true_float32(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                found = self._net(images, **options)
        except (RuntimeError, torch.jit.Error) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise SignFastError(f"{self.name} needs more memory than there is: lower --batch") from error
            size = "×".join(map(str, images.shape[1:]))
            raise SignFastError(f"{self.name} fails on {size} images ({_last_line(error)}): {WHICH_FILE}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SignFastError(f"{self.name} gives {what} for {len(images)} images instead of (N, D): {WHICH_FILE}")
        return found.float()


def _load(path: Path, device: torch.device) -> Any:
    if not path.is_file():
        raise SignFastError(f"no Inception file {path}: {WHICH_FILE}")
    if path.suffix == ".pkl":
        raise SignFastError(
            f"{path} is named as a pickle, which can hold a program and is not read here: take {INCEPTION}, the "
            "same network as TorchScript"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # there is no other reader of such files
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error).split(". ")[0]
        raise SignFastError(f"{path} is not a whole TorchScript file ({reason}): {WHICH_FILE}") from error


def _last_line(error: BaseException) -> str:
    """What went wrong; TorchScript writes it below its own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _true_float32() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


class DigitsDetector:
    """The bundled classifier of 8×8 grey digits: 64 features, 10 classes; runs on the CPU."""

    name = "the digits classifier"
    device = torch.device("cpu")

    def __init__(self) -> None:
        from .digits_classifier import bundled

        self._net = bundled()[0]

    @cached_property
    def sha256(self) -> str:
        return file_hash(Path(str(files(__package__) / "digits" / "classifier.safetensors")))

    def prepare(self, shape: tuple[int, int, int], source: str, classes: bool = False) -> int:
        if shape != (1, 8, 8):
            size = "×".join(map(str, shape))
            raise SignFastError(f"{source} has {size} images, and the bundled features know 1×8×8 digits: {WHICH_FILE}")
        return 64

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self._net.features(images.float() / 127.5 - 1)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self._net(images.float() / 127.5 - 1)).softmax(1)
