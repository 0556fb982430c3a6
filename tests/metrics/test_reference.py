"""Reference files: EDM's, ADM's, safetensors, one's own; and everything that can be wrong with them."""

from __future__ import annotations

import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sign_fast.errors import SignFastError
from sign_fast.metrics import DigitsDetector, Reference, collect, open_images, read_reference, save_reference
from sign_fast.metrics.features import Wanted
from tests.data.test_datasets import write as write_folder
from tests.data.test_datasets import zipped

DIM = 6


def gaussian(seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((dim, 3 * dim))
    return {"mu": rng.standard_normal(dim), "sigma": a @ a.T / a.shape[1]}


def pixels(count=7, size=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_edm_statistics(tmp_path, dtype):
    want = {name: value.astype(dtype) for name, value in gaussian().items()}
    found = read_reference(npz(tmp_path / "ref.npz", **want))
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert (found.mu == want["mu"]).all() and (found.sigma == want["sigma"]).all()
    assert found.images is None and found.features is None and len(found.sha256) == 12


def test_safetensors(tmp_path):
    want = gaussian()
    save_file({name: torch.from_numpy(value) for name, value in want.items()}, tmp_path / "ref.safetensors")
    found = read_reference(tmp_path / "ref.safetensors")
    assert (found.mu == want["mu"]).all() and (found.sigma == want["sigma"]).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adm_files_hold_both(tmp_path, save):
    save(tmp_path / "ref.npz", arr_0=pixels(), **gaussian(), mu_s=np.zeros(3), sigma_s=np.eye(3))
    found = read_reference(tmp_path / "ref.npz")
    assert found.mu.shape == (DIM,) and found.images.shape == (3, 8, 8) and len(found.images) == 7
    parts = list(found.images.batches([range(0, 2), range(5, 7)]))  # another process has those between
    assert all(part.dtype == torch.uint8 for part in parts)
    assert (torch.cat(parts).permute(0, 2, 3, 1).numpy() == pixels()[[0, 1, 5, 6]]).all()


def test_folders_zips_and_our_own_arrays(tmp_path):
    folder = write_folder(tmp_path / "a", count=5)
    archive = zipped(folder)
    arrays = npz(tmp_path / "a.npz", images=pixels().transpose(0, 3, 1, 2))
    for path, count in ((folder, 5), (archive, 5), (arrays, 7)):
        found = read_reference(path)
        assert found.mu is None and len(found.images) == count and (found.sha256 is None) == (path == folder)


def test_what_is_saved_is_read_again(tmp_path):
    detector = DigitsDetector()
    found = collect(open_images("digits:test"), detector, Wanted(features=True))
    save_reference(tmp_path / "a.npz", found, detector)
    save_reference(tmp_path / "b.npz", found, detector, features=True)
    short, whole = read_reference(tmp_path / "a.npz"), read_reference(tmp_path / "b.npz")
    assert short.features is None and (whole.features == found.features).all()
    for reference in (short, whole):
        assert (reference.mu == found.statistics.mean).all() and (reference.sigma == found.statistics.covariance).all()
        assert reference.detector == detector.sha256
        reference.check(detector, 64)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:  # as EDM's programs read it
        assert file["mu"].shape == (64,) and file["sigma"].shape == (64, 64) and file["count"] == 359
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]
    with pytest.raises(SignFastError, match=r"written as \.npz: name it .*a\.npz"):
        save_reference(tmp_path / "a.pkl", found, detector)
    with pytest.raises(SignFastError, match="cannot write"):
        save_reference(tmp_path / "nowhere" / "a.npz", found, detector)
    with pytest.raises(SignFastError, match="needs moments"):
        save_reference(tmp_path / "c.npz", collect(open_images("digits:test"), detector), detector, features=True)


def test_references_of_other_networks():
    with pytest.raises(SignFastError, match=r"x was made with another network \(abc\) than the digits classifier"):
        Reference("x", detector="abc").check(DigitsDetector(), 64)
    with pytest.raises(SignFastError, match="x has 6 features an image, the digits classifier gives 64"):
        Reference("x", **gaussian()).check(DigitsDetector(), 64)
    with pytest.raises(SignFastError, match="x has 6 features an image"):
        Reference("x", features=np.zeros((9, 6), np.float32)).check(DigitsDetector(), 64)


def changed(**changes):
    return {**gaussian(), **changes}


def not_semi_definite():
    values = np.ones(DIM)
    values[0] = -1e-3
    return {"sigma": np.diag(values)}


def almost_semi_definite():
    values = np.ones(DIM)
    values[0] = -1e-8
    return {"sigma": np.diag(values)}


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "holds only one of mu and sigma"),
        ({"other": np.zeros(3)}, "holds other: a reference has mu and sigma, features, or images as arr_0"),
        ({}, "holds nothing"),
        (changed(mu=np.zeros(5)), r"mu \(5,\) and sigma \(6, 6\) must be \(D,\) and \(D, D\)"),
        (changed(sigma=np.zeros((6, 5))), "must be"),
        (changed(mu=np.zeros((6, 1))), "must be"),
        (changed(mu=np.zeros(0), sigma=np.zeros((0, 0))), "must be"),
        (changed(mu=np.full(6, np.nan)), "mu holds NaN or infinity"),
        (changed(sigma=np.full((6, 6), np.inf)), "sigma holds NaN or infinity"),
        (changed(mu=np.zeros(6, np.int64)), "mu is int64: statistics are floats"),
        (changed(sigma=np.triu(np.ones((6, 6)))), "sigma is not symmetric"),
        (changed(**not_semi_definite()), "sigma has the eigenvalue -0.001, below 0"),
        (changed(features=np.zeros((9, 5), np.float32)), "of different networks"),
        ({"features": np.zeros((1, 5), np.float32)}, "of at least 2 images"),
        ({"features": np.full((9, 5), np.nan, np.float32)}, "features holds NaN"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)}, r"arr_0 is \(4, 8, 8, 3\) float32: images must be"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, r"must be \(N, H, W, C\) uint8 with C 1 or 3"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "must be"),
        ({"arr_0": np.asfortranarray(pixels())}, "Fortran order"),
        ({"arr_0": np.array([{"a": 1}], dtype=object)}, "pickles are not read"),
        (changed(mu=np.array(["a"] * 6)), "statistics are floats"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_npz_files_that_are_no_reference(tmp_path, arrays, message):
    with pytest.raises(SignFastError, match=message) as error:
        read_reference(npz(tmp_path / "ref.npz", **arrays))
    assert "\n" not in str(error.value)


def test_rounded_statistics_are_taken(tmp_path):
    assert read_reference(npz(tmp_path / "ref.npz", **changed(**almost_semi_definite()))).sigma[0, 0] == -1e-8


def test_pickles_in_npz_files_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Exploit:
        def __reduce__(self):
            return (open, ("executed", "w"))

    np.savez(tmp_path / "a.npz", mu=np.array([Exploit()], dtype=object), sigma=np.eye(1))
    (tmp_path / "executed").unlink(missing_ok=True)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Exploit()))
    (tmp_path / "executed").unlink(missing_ok=True)
    for name, message in (("a.npz", "pickles are not read"), ("b.npz", "is not a whole .npz file")):
        with pytest.raises(SignFastError, match=message):
            read_reference(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "ref.pkl").write_bytes(b"")
    with pytest.raises(SignFastError, match=r"is a pickle, which is not read: take the \.npz"):
        read_reference(tmp_path / "ref.pkl")


def test_truncated_at_every_hundredth(tmp_path):
    whole = npz(tmp_path / "ref.npz", arr_0=pixels(), **gaussian()).read_bytes()
    for size in range(0, len(whole) - 1, max(1, len(whole) // 100)):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(SignFastError, match=r"is not a whole \.npz file") as error:
            read_reference(tmp_path / "cut.npz")
        assert "\n" not in str(error.value)


def header(shape, descr="<f8"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        (header((10**9,)), header((10**9, 10**9)), "not as large as"),  # refused before a byte of it is allocated
        (header((6,)), header((6, 6)), "is not a whole .npz file"),  # headers without data
        (b"\x93NUMPY\x03\x00" + header((6,))[8:], header((6, 6)), "unknown version"),
        (b"no array", header((6, 6)), "is not a whole .npz file"),
        (header("__import__('os').system('touch executed')"), header((6, 6)), "is not a whole .npz file"),
    ],
    ids=["huge", "empty", "version", "foreign", "code"],
)
def test_headers_that_lie(tmp_path, monkeypatch, mu, sigma, message):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("ref.npz", "w") as archive:
        archive.writestr("mu.npy", mu)
        archive.writestr("sigma.npy", sigma)
    with pytest.raises(SignFastError, match=message) as error:
        read_reference("ref.npz")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("shape", [(100, 8, 8, 3), (10**12, 8, 8, 3), (2, 10**7, 10**7, 3), (-1, 8, 8, 3)])
def test_images_that_are_fewer_than_they_say(tmp_path, shape):
    """Refused before batches are counted or a buffer is made."""
    with zipfile.ZipFile(tmp_path / "ref.npz", "w") as archive:
        archive.writestr("arr_0.npy", header(shape, "|u1") + bytes(500))
    for read in (read_reference, open_images):
        with pytest.raises(SignFastError, match=r"arr_0\.npy is not as large as") as error:
            read(tmp_path / "ref.npz")
        assert "\n" not in str(error.value)


def test_archives_that_unpack_without_end(tmp_path):
    for method, message in ((zipfile.ZIP_BZIP2, "packed otherwise than NumPy"), (zipfile.ZIP_DEFLATED, None)):
        with zipfile.ZipFile(tmp_path / "ref.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", header((1000, 8, 8, 3), "|u1") + bytes(192_000))
        if message is None:  # zeros, packed by a factor of hundreds
            assert len(open_images(tmp_path / "ref.npz")) == 1000
            continue
        with pytest.raises(SignFastError, match=message):
            open_images(tmp_path / "ref.npz")


def test_missing_files(tmp_path):
    for name in ("a.npz", "a.safetensors", "a"):
        with pytest.raises(SignFastError, match=r"no file|no data set"):
            read_reference(tmp_path / name)
    (tmp_path / "b.safetensors").write_bytes(b"{}")
    with pytest.raises(SignFastError, match="not a whole safetensors file"):
        read_reference(tmp_path / "b.safetensors")
