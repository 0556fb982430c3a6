"""All metrics together: each as its own function gives it, from any source, batch by batch in bounded memory."""

from __future__ import annotations

import shutil
import weakref
import zipfile

import numpy as np
import pytest
import torch

from sign_fast.data import open_dataset
from sign_fast.errors import SignFastError
from sign_fast.metrics import (
    FeatureStatistics,
    InceptionDetector,
    Protocol,
    check_metrics,
    collect,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    open_images,
    precision_recall,
    save_reference,
)
from sign_fast.metrics.digits_classifier import digits_distance
from sign_fast.metrics.features import Wanted
from sign_fast.metrics.images import DatasetImages, FirstImages, GeneratedImages, TensorImages
from sign_fast.sampling import ImageGenerator
from tests.data.test_datasets import write as write_folder
from tests.data.test_datasets import zipped
from tests.metrics import stand_in

ALL = ("fid", "kid", "is", "precision", "recall")


def pixels(count, seed=0, low=0, size=10):
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.rand(count, 3, 3, 3, generator=generator)
    images = torch.nn.functional.interpolate(blobs, size=(size, size), mode="bilinear")
    return (low + images * (255 - low)).to(torch.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("network") / "inception.pt")


def test_every_metric_is_its_function(network, tmp_path):
    fake, real = 225 - pixels(70, low=30), pixels(60, seed=1, low=30)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    protocol = Protocol(kid_subsets=5, kid_subset_size=20, seed=3, splits=7, neighbours=2)
    options = {"inception": network, "device": "cpu", "protocol": protocol}
    found = evaluate(fake, ALL, reference=tmp_path / "real.npz", batch=16, **options)

    net = torch.jit.load(str(network))
    x, y = (net(images, return_features=True).detach().numpy() for images in (fake, real))
    a, b = FeatureStatistics(x.shape[1]), FeatureStatistics(x.shape[1])
    a.append(x)
    b.append(y)
    want = {"fid": frechet_distance(a.mean, a.covariance, b.mean, b.covariance)}
    want["kid"], want["kid_std"] = kernel_distance(x, y, subsets=5, subset_size=20, seed=3)
    want["is"], want["is_std"] = inception_score(net(fake, no_output_bias=True).detach(), splits=7)
    want["precision"], want["recall"] = precision_recall(x, y, neighbours=2)
    assert list(found) == list(want)
    assert found == pytest.approx(want, rel=1e-4)
    assert 0 < want["precision"] < 1 and 0 < want["recall"] < 1 and want["is"] > 1.05 and want["fid"] > 0.1
    assert evaluate(fake, "recall", reference=tmp_path / "real.npz", **options) == pytest.approx(
        {"recall": want["recall"]}
    )


def test_one_s_own_reference_gives_the_same(network, tmp_path):
    fake, real = pixels(40), pixels(50, seed=1, low=30)
    detector = InceptionDetector(network, "cpu")
    save_reference(
        tmp_path / "ref.npz", collect(TensorImages(real), detector, Wanted(features=True)), detector, features=True
    )
    folder = tmp_path / "real"
    folder.mkdir()
    np.savez(tmp_path / "images.npz", images=real.numpy())
    options = {"inception": network, "device": "cpu"}
    metrics = ("fid", "kid", "precision", "recall")
    by_file = evaluate(fake, metrics, reference=tmp_path / "ref.npz", **options)
    assert by_file == pytest.approx(evaluate(fake, metrics, reference=tmp_path / "images.npz", **options), rel=1e-5)
    with pytest.raises(SignFastError, match="was made with another network"):
        other = stand_in.write(tmp_path / "other.pt", seed=1)
        evaluate(fake, reference=tmp_path / "ref.npz", inception=other, device="cpu")


def test_digits_need_no_file():
    images = pixels(300, size=8)[:, :1]
    found = evaluate(images, ALL, device="cpu")
    assert found["fid"] == pytest.approx(digits_distance(images), rel=1e-6)
    assert found["precision"] < 0.5 and found["kid"] > 0
    data = open_dataset("digits")
    real = torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))
    found = evaluate(real, "fid,precision,recall,is", device="cpu")
    assert found["fid"] == pytest.approx(0, abs=1e-2) and found["precision"] == found["recall"] == 1
    assert found["is"] > 6  # of at most 10, for a classifier that was trained never to be surer than 0.91


def test_every_source_gives_the_same_images(tmp_path):
    folder = write_folder(tmp_path / "a", count=23)
    data = open_dataset(folder)
    stack = np.stack([data.image(i) for i in range(23)])
    np.savez(tmp_path / "arr.npz", stack.transpose(0, 2, 3, 1))  # arr_0
    np.savez(tmp_path / "images.npz", images=stack)
    parts = [range(0, 7), range(14, 21), range(21, 23)]
    for source in (folder, zipped(folder), tmp_path / "arr.npz", tmp_path / "images.npz", torch.from_numpy(stack)):
        images = open_images(source)
        assert images.shape == (3, 8, 8) and len(images) == 23
        found = list(images.batches(parts))
        assert [len(part) for part in found] == [7, 7, 2]
        assert (torch.cat(found).numpy() == stack[[i for part in parts for i in part]]).all()
    assert len(FirstImages(images, 5)) == 5
    with pytest.raises(SignFastError, match="holds 23 images, not 24"):
        FirstImages(images, 24)


def test_generated_images_stay_on_the_device_and_are_those_of_their_seeds():
    generator = ImageGenerator.from_pretrained("digits-sid", "cpu")
    source = GeneratedImages(generator, list(range(100, 112)), "digits-sid", steps=1)
    found = list(source.batches([range(0, 5), range(10, 12)]))
    assert all(isinstance(part, torch.Tensor) and part.device == generator.device for part in found)
    want = generator([*range(100, 105), 110, 111], 1).permute(0, 3, 1, 2)
    assert (torch.cat(found).int() - want.int()).abs().max() <= 1
    with pytest.raises(SignFastError, match="steps"):
        GeneratedImages(generator, [0, 1], steps=0)


class Watched:
    """A source that counts how many of the batches it has handed out are still alive."""

    name, shape = "watched", (3, 8, 8)

    def __init__(self, count):
        self.count = count
        self.most = 0

    def __len__(self):
        return self.count

    def batches(self, parts):
        alive = []
        for i, part in enumerate(parts):
            images = pixels(len(part), seed=i, size=8)
            alive.append(weakref.ref(images))
            self.most = max(self.most, sum(ref() is not None for ref in alive))
            yield images
            del images


def test_images_are_dropped_once_they_have_been_through(network):
    source = Watched(400)
    found = collect(source, InceptionDetector(network, "cpu"), Wanted(classes=True), batch=8)
    assert found.statistics.count == 400 and found.features is None  # what is kept has no axis of the images
    assert source.most <= 3


def test_decoding_is_at_most_two_batches_ahead():
    class Counting:
        shape, decoded = (1, 8, 8), 0

        def __len__(self):
            return 1000

        def image(self, index):
            self.decoded += 1
            return np.zeros((1, 8, 8), np.uint8)

    data = Counting()
    batches = DatasetImages(data, "data", threads=2).batches([range(i, i + 10) for i in range(0, 1000, 10)])
    next(batches)
    assert data.decoded <= 21  # the first image was looked at before
    batches.close()


@pytest.mark.parametrize("batch", [1, 9, 64])
def test_batches_do_not_matter(network, batch):
    x = pixels(40)
    detector = InceptionDetector(network, "cpu")
    whole = collect(TensorImages(x), detector, Wanted(features=True, classes=True), batch=40)
    found = collect(TensorImages(x), detector, Wanted(features=True, classes=True), batch=batch)
    assert np.allclose(found.features, whole.features, rtol=1e-4, atol=1e-4)
    assert np.allclose(found.statistics.covariance, whole.statistics.covariance, rtol=1e-3, atol=1e-4)
    assert found.score.score() == pytest.approx(whole.score.score(), rel=1e-4)


def test_the_bar_is_told(network):
    seen = []
    evaluate(pixels(25), "is", inception=network, batch=10, device="cpu", seen=seen.append)
    assert seen == [10, 10, 5]


def test_names_of_metrics():
    assert check_metrics("KID, fid") == ["fid", "kid"] and check_metrics(["is", "is"]) == ["is"]
    for bad in ("fid,lpips", "", [], "fid,"):
        with pytest.raises(SignFastError, match="there are fid, kid, is, precision, recall"):
            check_metrics(bad)


def statistics(path, dim=stand_in.FEATURES):
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim))
    return path


@pytest.mark.parametrize(
    "metrics, options, message",
    [
        ("fid", {"inception": None}, r"the images has 3×10×10 images, and the bundled features know 1×8×8 digits"),
        ("fid,kid", {}, "fid, kid compare with real images: give --reference"),
        ("fid,kid,recall", {"reference": 24}, "kid, recall cannot be had from .* holds mu and sigma only"),
        ("fid", {"reference": 25}, "has 25 features an image, inception.pt gives 24"),
        ("is", {"protocol": Protocol(splits=31)}, "in 31 parts needs as many images, not 30"),
        (
            "kid",
            {"reference": "digits", "protocol": Protocol(kid_subset_size=31)},
            "kid in subsets of 31 needs that many images and as many of the reference, not 30",
        ),
        ("precision", {"reference": "digits", "protocol": Protocol(neighbours=30)}, "need more than 30 images, not 30"),
    ],
)
def test_what_does_not_fit_is_said_before_the_work(network, tmp_path, metrics, options, message):
    if isinstance(options.get("reference"), int):
        options = {**options, "reference": statistics(tmp_path / "ref.npz", options["reference"])}
    seen = []
    with pytest.raises(SignFastError, match=message) as error:
        evaluate(pixels(30), metrics, **{"inception": network, "device": "cpu", "seen": seen.append, **options})
    assert "\n" not in str(error.value) and not seen


@pytest.mark.parametrize(
    "images, message",
    [
        (pixels(1), "holds 1 image: quality needs at least 2"),
        (pixels(5).float(), "must be .* uint8, not"),
        (pixels(5)[0], "must be"),
    ],
    ids=["one", "float", "rank"],
)
def test_images_that_cannot_be_measured(network, tmp_path, images, message):
    with pytest.raises(SignFastError, match=message):
        evaluate(images, reference=statistics(tmp_path / "ref.npz"), inception=network, device="cpu")


def test_nan_names_the_image(tmp_path):
    x = pixels(30, low=20)
    x[17] = 0
    inception = stand_in.write(tmp_path / "net.pt", stand_in.DarkIsNaN)
    reference = statistics(tmp_path / "ref.npz", 12)
    with pytest.raises(SignFastError, match=r"net\.pt gives NaN or infinity for image 17 of the images"):
        evaluate(x, reference=reference, inception=inception, batch=8, device="cpu")


def spoil(folder, kind):
    """A folder, or zip, of which one file is no image as the others are."""
    file = sorted(folder.rglob("*.png"))[4]
    if kind == "size":
        shutil.copy(write_folder(folder.with_name("other"), count=1, size=16) / "00000" / "img00000000.png", file)
    elif kind == "mode":
        other = write_folder(folder.with_name("other"), count=1, mode="L")
        shutil.copy(other / "00000" / "img00000000.png", file)
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:60])
    elif kind == "member":
        archive = zipped(folder)
        with zipfile.ZipFile(archive) as opened:
            start = opened.getinfo("00000/img00000004.png").header_offset
        data = bytearray(archive.read_bytes())
        data[start + 70 : start + 100] = bytes(30)
        archive.write_bytes(data)
        return archive
    return folder


@pytest.mark.parametrize(
    "kind, message",
    [
        ("size", r"img00000004.png is \(3, 16, 16\)"),
        ("mode", r"img00000004.png is \(1, 8, 8\)"),
        ("truncated", "img00000004.png is not a readable image"),
        ("member", "img00000004.png is not a readable image"),
    ],
)
def test_one_bad_image_in_one_line(network, tmp_path, kind, message):
    source = spoil(write_folder(tmp_path / "a", count=8), kind)
    with pytest.raises(SignFastError, match=message) as error:
        evaluate(source, reference=statistics(tmp_path / "ref.npz"), inception=network, batch=3, device="cpu")
    assert "\n" not in str(error.value)


def test_nothing_of_a_zip_is_written(network, tmp_path):
    folder = write_folder(tmp_path / "in" / "a", count=4, labels=False)
    archive = zipped(folder)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.write(next(folder.rglob("*.png")), "../../outside.png")
        opened.write(next(folder.rglob("*.png")), "/outside.png")
    shutil.rmtree(folder)
    before = sorted(tmp_path.rglob("*"))
    evaluate(archive, reference=statistics(tmp_path / "ref.npz"), inception=network, device="cpu")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "ref.npz"])
    assert not (tmp_path.parent / "outside.png").exists()
