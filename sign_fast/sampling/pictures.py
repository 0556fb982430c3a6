"""PNG files of generated images, and a grid of them."""

from __future__ import annotations

import math
import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..checkpoints.atomic import make_folder, write_atomically
from ..errors import SignFastError, first_line

UInt8 = npt.NDArray[np.uint8]
_COMMENT = b"Comment\0"  # a keyword that the PNG standard names
_GRID_PIXELS = 512  # small images are enlarged so that a grid is about this wide


def check_channels(channels: int) -> None:
    """Raise SignFastError unless images of that many channels can be saved."""
    if channels not in (1, 3):
        raise SignFastError(f"an image of {channels} channels is no PNG: only 1 or 3 channels can be saved")


def image_path(outdir: Path, seed: int, subdirs: bool) -> Path:
    """{seed:06d}.png, with subdirs in {seed − seed mod 1000:06d}/, as the published programs name them."""
    folder = outdir / f"{seed - seed % 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


def encode_png(image: UInt8, note: str | None = None) -> bytes:
    """The PNG file of an (H, W, C) uint8 image, each row filtered by the one above; `note` is a comment in it.

    Written out here because Pillow spends twice to four times as long, much of it with the interpreter's lock held;
    zlib releases it.

    Raises:
        SignFastError: C is neither 1 nor 3.
        UnicodeError: the note is not ASCII.
    """
    height, width, channels = image.shape
    check_channels(channels)
    pixels = image.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2  # the filter "up"
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    comment = [] if note is None else [(b"tEXt", _COMMENT + note.encode("ascii"))]
    chunks = ((b"IHDR", header), *comment, (b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def read_note(path: Path) -> str | None:
    """The note that `encode_png` has put in a file; None where there is none, or the file is no image.

    Raises:
        SignFastError: the file cannot be read.
    """
    try:
        with Image.open(path) as picture:
            note = picture.info.get("Comment")
    except UnidentifiedImageError:
        return None
    except (OSError, ValueError, SyntaxError) as error:
        raise SignFastError(f"cannot read {path} ({first_line(error)})") from error
    return note if isinstance(note, str) else None


def save_png(path: Path, image: UInt8, note: str | None = None) -> None:
    """Write an (H, W, C) uint8 image, whole or not at all; `note` as in `encode_png`.

    Raises:
        SignFastError: C is neither 1 nor 3, or the file cannot be written.
    """
    data = encode_png(image, note)
    write_atomically(path, lambda temporary: temporary.write_bytes(data), durable=False)


class PngWriter:
    """Encodes and writes images in threads while the caller makes the next ones.

    At most `waiting` images are kept; `save` then waits for the oldest. The first error of a thread is raised by the
    next `save` that comes to it, or on leaving the with block; images that nobody has begun are dropped then.

    ::

        with PngWriter(workers=4, saved=bar.update) as writer:
            writer.save(path, image)

    Args:
        workers: threads.
        saved: called in the caller's thread with the number of images that have been written since.
        waiting: images kept, begun or not.
    """

    def __init__(self, workers: int, saved: Callable[[int], object] = lambda count: None, waiting: int = 256) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="png")
        self._saved = saved
        self._waiting = waiting
        self._jobs: deque[Future[None]] = deque()

    def save(self, path: Path, image: UInt8, note: str | None = None) -> None:
        """Have an (H, W, C) uint8 image written, with a note; it is not copied, so leave it as it is.

        Raises:
            SignFastError: an image before this one could not be written.
        """
        while len(self._jobs) >= self._waiting or (self._jobs and self._jobs[0].done()):
            self._finish_oldest()
        self._jobs.append(self._pool.submit(save_png, path, image, note))

    def _finish_oldest(self) -> None:
        self._jobs.popleft().result()
        self._saved(1)

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._jobs and error is None:
                self._finish_oldest()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


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


def arrange(images: Sequence[UInt8], columns: int | None = None) -> UInt8:
    """A grid (H', W', C) of (H, W, C) images, row by row on white, small ones enlarged.

    Args:
        images: of one shape.
        columns: None makes the grid nearly square.
    """
    height, width, channels = images[0].shape
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    zoom = max(1, round(_GRID_PIXELS / (columns * width)))
    gap = max(1, zoom // 2)
    sheet = np.full((rows * (height * zoom + gap) + gap, columns * (width * zoom + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top = gap + (i // columns) * (height * zoom + gap)
        left = gap + (i % columns) * (width * zoom + gap)
        sheet[top : top + height * zoom, left : left + width * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    return sheet


def save_grid(path: Path, images: Sequence[UInt8], columns: int | None = None) -> None:
    """Write the grid of `arrange`.

    Raises:
        SignFastError: the file cannot be written.
    """
    make_folder(path.parent)
    data = encode_png(arrange(images, columns))
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
