"""PNG files: pixels come back, and the threads that write them keep few images and tell every error."""

from __future__ import annotations

import io
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from sign_fast.errors import SignFastError
from sign_fast.sampling import pictures
from sign_fast.sampling.pictures import PngWriter, encode_png, read_note, read_png, save_grid, save_png


def image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 1, 3), (5, 3, 3), (7, 64, 1), (64, 33, 3)])
def test_pixels_come_back(tmp_path, shape):
    want = image(*shape)
    picture = Image.open(io.BytesIO(encode_png(want)))
    picture.verify()
    assert picture.mode == ("L" if shape[2] == 1 else "RGB") and picture.size == (shape[1], shape[0])
    save_png(tmp_path / "a.png", want)
    assert (read_png(tmp_path / "a.png") == want).all()
    turned = want.transpose(1, 0, 2)  # not contiguous
    save_png(tmp_path / "b.png", turned)
    assert (read_png(tmp_path / "b.png") == turned).all()


@pytest.mark.parametrize(("columns", "shape"), [(None, (2, 3)), (2, (3, 2)), (5, (1, 5))])
def test_grid_of_columns(tmp_path, columns, shape):
    images = [np.full((4, 6, 1), 40 * (i + 1), np.uint8) for i in range(5)]
    save_grid(tmp_path / "grid.png", images, columns)
    grid = read_png(tmp_path / "grid.png")[:, :, 0].astype(int)
    rows, across = shape
    height, width = grid.shape[0] / rows, grid.shape[1] / across
    for i in range(rows * across):
        middle = grid[int((i // across + 0.5) * height), int((i % across + 0.5) * width)]
        assert middle == (40 * (i + 1) if i < 5 else 255)


def test_other_channels():
    with pytest.raises(SignFastError, match="only 1 or 3 channels"):
        encode_png(image(4, 4, 2))


@pytest.mark.parametrize("workers", [1, 4])
def test_few_images_are_kept(tmp_path, monkeypatch, workers):
    alive, most, lock = weakref.WeakSet(), [0], threading.Lock()

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def save(path, picture, note):
        with lock:
            most[0] = max(most[0], len(list(alive)))

    monkeypatch.setattr(pictures, "save_png", save)
    counts = []
    with PngWriter(workers, counts.append, waiting=6) as writer:
        for i in range(200):
            picture = image(4, 4, 1).view(Counted)
            alive.add(picture)
            writer.save(tmp_path / f"{i}.png", picture)
            assert len(writer._jobs) <= 6
    assert 1 <= most[0] <= 8  # six that wait, the one in the caller's hand, the one whose thread lets go of it
    assert sum(counts) == 200


def test_a_note_is_read_back(tmp_path):
    want = image(3, 5, 3)
    for note in ("made by a test", None):
        save_png(tmp_path / "a.png", want, note)
        assert read_note(tmp_path / "a.png") == note
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.info.get("Comment") == note
        assert np.array_equal(read_png(tmp_path / "a.png"), want)
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"text"):
        (tmp_path / "b.png").write_bytes(content)
        assert read_note(tmp_path / "b.png") is None


def test_an_error_stops_the_next_save_and_drops_what_waits(tmp_path, monkeypatch):
    begun = []

    def save(path, picture, note):
        begun.append(path.name)
        raise SignFastError(f"cannot write {path.name}")

    monkeypatch.setattr(pictures, "save_png", save)
    with pytest.raises(SignFastError, match=r"cannot write 0\.png"), PngWriter(1, waiting=3) as writer:
        for i in range(100):
            writer.save(tmp_path / f"{i}.png", image(2, 2, 1))
    assert len(begun) <= 4 and not any(thread.name.startswith("png") for thread in threading.enumerate())


def test_an_error_of_the_last_image_is_told_on_leaving(tmp_path):
    with pytest.raises(SignFastError, match="cannot write"), PngWriter(2) as writer:
        writer.save(tmp_path / "no folder" / "0.png", image(2, 2, 1))
