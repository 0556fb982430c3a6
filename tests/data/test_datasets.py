"""Data sets: digits, folders and zips with labels, and everything that can be wrong with them."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sign_fast.data import BatchLoader, ImageFolderDataset, indices_at, open_dataset
from sign_fast.errors import SignFastError


def write(folder, count=6, size=8, mode="RGB", labels=True):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    entries = []
    for i in range(count):
        shape = (size, size, 3) if mode == "RGB" else (size, size)
        (folder / "00000").mkdir(exist_ok=True)
        name = f"00000/img{i:08d}.png"
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
        entries.append([name, i % 3])
    if labels:
        (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return path


def test_digits():
    data = open_dataset("digits")
    assert len(data) == 1797 and data.shape == (1, 8, 8) and data.num_classes == 10
    assert data.image(0).max() == 239 and data.label(3) == 3  # 15 of 16 grey levels


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_folder_and_zip_are_the_same(tmp_path, mode, channels):
    folder = write(tmp_path / "data", mode=mode)
    a, b = ImageFolderDataset(folder), ImageFolderDataset(zipped(folder))
    assert a.shape == b.shape == (channels, 8, 8) and a.num_classes == b.num_classes == 3
    for i in range(6):
        assert np.array_equal(a.image(i), b.image(i)) and a.label(i) == b.label(i) == i % 3


def test_without_labels(tmp_path):
    data = ImageFolderDataset(write(tmp_path / "data", labels=False))
    assert data.num_classes == 0 and data.label(0) == 0


def test_order_is_permutations_by_position():
    whole = indices_at(0, 30, 10, seed=1)
    assert all(sorted(whole[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert np.array_equal(indices_at(7, 12, 10, seed=1), whole[7:19])


def test_loader_parts_make_the_whole_batch():
    data = open_dataset("digits")
    images, labels = next(BatchLoader(data, 8, 3, label_dim=10, xflip=True).batches(5))
    parts = [next(BatchLoader(data, 8, 3, 10, True, rank, 2).batches(5)) for rank in range(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), images)
    assert torch.equal(torch.cat([p[1] for p in parts]), labels)
    assert images.min() >= -1 and images.max() <= 1 and labels.sum(1).eq(1).all()


def damage_json(text):
    def change(folder):
        (folder / "dataset.json").write_text(text)

    return change


def cut_image(folder):
    file = folder / "00000" / "img00000000.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    "change, message",
    [
        (cut_image, "img00000000.png is not a readable image"),
        (damage_json("{"), "dataset.json must be"),
        (damage_json('{"labels": [["00000/img00000000.png", 1]]}'), "no label for 00000/img00000001.png"),
        (damage_json(json.dumps({"labels": [[f"00000/img{i:08d}.png", -1] for i in range(6)]})), "labels are whole"),
    ],
)
def test_bad_folder(tmp_path, change, message):
    folder = write(tmp_path / "data")
    change(folder)
    with pytest.raises(SignFastError, match=message):
        ImageFolderDataset(folder)


def test_bad_image_in_the_middle(tmp_path):
    folder = write(tmp_path / "data")
    Image.new("RGB", (9, 9)).save(folder / "00000" / "img00000003.png")
    (folder / "00000" / "img00000004.png").write_bytes(b"not an image")
    data = ImageFolderDataset(folder)
    with pytest.raises(SignFastError, match=r"all images must have one size"):
        data.image(3)
    with pytest.raises(SignFastError, match="mend or remove it"):
        data.image(4)


def test_bad_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04")
    for path, message in [("nowhere", "no data set at"), ("empty", "holds no image"), ("cut.zip", "not a whole zip")]:
        with pytest.raises(SignFastError, match=message):
            open_dataset(tmp_path / path)
