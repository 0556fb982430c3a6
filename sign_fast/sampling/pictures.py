"""PNG files of generated images, and a grid of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..checkpoints.atomic import make_folder, write_atomically
from ..errors import SignFastError, first_line

UInt8 = npt.NDArray[np.uint8]
_GRID_PIXELS = 512  # small images are enlarged so that a grid is about this wide


def _picture(image: UInt8) -> Image.Image:
    if image.shape[2] not in (1, 3):
        raise SignFastError(f"an image of {image.shape[2]} channels is no PNG: only 1 or 3 channels can be saved")
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def image_path(outdir: Path, seed: int, subdirs: bool) -> Path:
    """{seed:06d}.png, with subdirs in {seed − seed mod 1000:06d}/, as the published programs name them."""
    folder = outdir / f"{seed - seed % 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


def save_png(path: Path, image: UInt8) -> None:
    """Write an (H, W, C) uint8 image, whole or not at all.

    Raises:
        SignFastError: C is neither 1 nor 3, or the file cannot be written.
    """
    picture = _picture(image)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", compress_level=1), durable=False)


def read_png(path: Path) -> UInt8:
    """(H, W, C) uint8.

    Raises:
        SignFastError: unreadable.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise SignFastError(f"{path} is not a readable image ({first_line(error)}): remove it and run again") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def save_grid(path: Path, images: Sequence[UInt8]) -> None:
    """Write a nearly square grid of (H, W, C) images, row by row, small ones enlarged.

    Raises:
        SignFastError: the file cannot be written.
    """
    height, width, channels = images[0].shape
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    zoom = max(1, round(_GRID_PIXELS / (columns * width)))
    gap = max(1, zoom // 2)
    sheet = np.full((rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height * zoom + gap)
        left = gap + (i % columns) * (width * zoom + gap)
        sheet[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    make_folder(path.parent)
    picture = _picture(sheet)
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
