"""The files that the documentation's commands take as given: made where a block names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sign_fast.data.datasets import digits
from sign_fast.sampling.pictures import save_png
from tests.checkpoints.snapshots import tiny_snapshot
from tests.integrations.diffusers import tiny
from tests.metrics import stand_in


def _images(path: Path) -> None:
    path.mkdir()
    data = digits()
    for i in range(8):
        save_png(path / f"{i:06d}.png", np.transpose(data.image(i), (1, 2, 0)))


def _mask(path: Path) -> None:
    mask = np.full((8, 8, 1), 255, np.uint8)
    mask[2:6, 2:6] = 0
    save_png(path, mask)


def _snapshot(path: Path) -> None:
    path.write_bytes(tiny_snapshot())


def _pipeline(path: Path) -> None:
    tiny.write("sd15", path)


_MAKERS: dict[str, Callable[[Path], None]] = {
    "my_images": _images,
    "real_images": _images,
    "inception-2015-12-05.pt": stand_in.write,
    "mask.png": _mask,
    "edm-cifar10-32x32-uncond-vp.pkl": _snapshot,
    "my_pipeline": _pipeline,
    "my_student": _pipeline,
}


def give(folder: Path, text: str) -> None:
    """Make in `folder` what `text` names."""
    for name, make in _MAKERS.items():
        if name in text:
            make(folder / name)
