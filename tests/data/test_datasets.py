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
    assert data.name(17) == "000017"


def arrays(name):
    data = open_dataset(name)
    return np.stack([data.image(i) for i in range(len(data))]), np.array([data.label(i) for i in range(len(data))])


def test_parts_of_the_digits():
    (images, labels), (train, train_labels), (test, test_labels) = map(
        arrays, ["digits", "digits:train", "digits:test"]
    )
    assert len(train) == 1438 and len(test) == 359
    for name in ("digits:train", "digits:test"):
        assert open_dataset(name).num_classes == 10 and open_dataset(name).shape == (1, 8, 8)
    for label in range(10):  # each class is its training images, then its held-out ones
        ours = np.concatenate([train[train_labels == label], test[test_labels == label]])
        assert np.array_equal(ours, images[labels == label])
        assert np.sum(test_labels == label) == round(np.sum(labels == label) / 5)
    assert {i.tobytes() for i in train}.isdisjoint(i.tobytes() for i in test)
    assert test_labels[-5:].tolist() == labels[-5:].tolist()  # in the file's order


def test_no_such_part():
    with pytest.raises(SignFastError, match="no data set 'digits:valid': the digits are digits, digits:train"):
        open_dataset("digits:valid")


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_folder_and_zip_are_the_same(tmp_path, mode, channels):
    folder = write(tmp_path / "data", mode=mode)
    a, b = ImageFolderDataset(folder), ImageFolderDataset(zipped(folder))
    assert a.shape == b.shape == (channels, 8, 8) and a.num_classes == b.num_classes == 3
    for i in range(6):
        assert np.array_equal(a.image(i), b.image(i)) and a.label(i) == b.label(i) == i % 3
        assert a.name(i) == b.name(i) == f"00000/img{i:08d}.png"


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


def test_floats_in_an_npz_are_read_as_they_are(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (6, 1, 8, 8))
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 1, 2, 0, 1, 2]))
    data = open_dataset(tmp_path / "d.npz")
    assert data.shape == (1, 8, 8) and data.num_classes == 3 and len(data) == 6
    batch, labels = next(BatchLoader(data, 6, seed=0, label_dim=3).batches(0))
    order = indices_at(0, 6, 6, 0)
    assert torch.equal(batch, torch.from_numpy(images[order]).float())
    assert labels.argmax(1).tolist() == [i % 3 for i in order]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.full((2, 1, 4, 4), np.nan)}, "image 0 holds NaN or Inf, 2 of 2 do"),
        (
            {"images": np.stack([np.zeros((1, 4, 4)), np.full((1, 4, 4), np.inf)])},
            "image 1 holds NaN or Inf, 1 of 2 do",
        ),
        ({"images": np.full((2, 1, 4, 4), 200.0)}, r"image 0 goes beyond \[-1, 1\]"),
        ({"images": np.zeros((2, 1, 4, 4), np.int64)}, "write uint8, or floats"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"must hold .images. \(N, C, H, W\)"),
        ({"labels": np.zeros(2, np.uint8)}, "must hold"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.array([0, -1])}, "2 whole numbers from 0"),
    ],
)
def test_bad_npz(tmp_path, change, message):
    np.savez(tmp_path / "d.npz", **change)
    with pytest.raises(SignFastError, match=message):
        open_dataset(tmp_path / "d.npz")
    for size in (0, 50):
        (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:size])
        with pytest.raises(SignFastError, match=r"not a whole .npz file"):
            open_dataset(tmp_path / "cut.npz")


def test_an_npz_that_is_none(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((2, 1, 4, 4), np.uint8))
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    with pytest.raises(SignFastError, match=r"d\.npz holds one array .* write it with np\.savez"):
        open_dataset(tmp_path / "d.npz")
    with pytest.raises(SignFastError, match=r"no data set at .*missing\.npz: there is no file"):
        open_dataset(tmp_path / "missing.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(SignFastError, match=r"not a whole \.npz file"):
        open_dataset(tmp_path / "folder.npz")
