"""TorchScript networks: both interfaces, bytes, floats, grey images; files that are none, networks that misbehave."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.metrics import DigitsDetector, InceptionDetector, detectors
from sign_fast.metrics.digits_classifier import bundled
from tests.metrics import stand_in

CPU = torch.device("cpu")


def images(count=5, shape=(3, 12, 12), seed=0):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return stand_in.write(tmp_path_factory.mktemp("network") / "inception.pt")


def test_published_interface(network):
    detector = InceptionDetector(network, "cpu")
    net = torch.jit.load(str(network))
    x = images()
    assert detector.prepare((3, 12, 12), "x", classes=True) == stand_in.FEATURES
    assert torch.equal(detector.features(x), net(x, return_features=True))
    # the published score is without the last layer's bias, which here matters
    assert torch.allclose(detector.probabilities(x), net(x, no_output_bias=True))
    assert not torch.allclose(detector.probabilities(x), net(x), atol=1e-3)
    assert detector.name == "inception.pt"
    assert detector.sha256 == hashlib.sha256(network.read_bytes()).hexdigest()[:12]


def test_logits_become_probabilities(tmp_path):
    path = stand_in.write(tmp_path / "logits.pt", stand_in.Logits)
    detector = InceptionDetector(path, "cpu")
    assert detector.prepare((3, 12, 12), "x", classes=True) == stand_in.FEATURES
    assert torch.allclose(detector.probabilities(images()), torch.jit.load(str(path))(images()).softmax(1))


def test_plain_network_of_floats(tmp_path):
    detector = InceptionDetector(stand_in.write(tmp_path / "plain.pt", stand_in.Plain), "cpu")
    assert detector.prepare((3, 8, 8), "x") == 12
    want = torch.nn.functional.adaptive_avg_pool2d(images(shape=(3, 8, 8)).float() / 255, 2).flatten(1)
    assert torch.allclose(detector.features(images(shape=(3, 8, 8))), want)
    with pytest.raises(SignFastError, match="gives features and no classes, which the Inception score needs"):
        detector.prepare((3, 8, 8), "x", classes=True)


def test_grey_is_repeated(network):
    detector = InceptionDetector(network, "cpu")
    grey = images(shape=(1, 12, 12))
    assert detector.prepare((1, 12, 12), "x") == stand_in.FEATURES
    assert torch.equal(detector.features(grey), detector.features(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(SignFastError, match="more than 67,108,864 pixels: make them smaller"):
        detector.prepare((3, 30_000, 30_000), "x")  # the trial alone would take 43 GB
    with pytest.raises(SignFastError, match="images of 4 channels: an Inception network takes 1 or 3"):
        detector.prepare((4, 12, 12), "x")


def test_settings_are_as_before(network):
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    optimizing = torch._C._get_graph_executor_optimize()
    with detectors._true_float32():
        # of these `flags` would otherwise turn cuDNN itself off
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (*before[:3], False)
    InceptionDetector(network, "cpu").features(images())
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before
    assert torch._C._get_graph_executor_optimize() == optimizing


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def write_bad(path, kind, good):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:3000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit()))
    elif kind == "checkpoint":
        torch.save({"weight": torch.zeros(3), "x": Exploit()}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inception.txt", "")
    elif kind == "pickled constants":  # what TorchScript reads is a pickle too, read by another reader
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as archive:
            for name in source.namelist():
                data = pickle.dumps(Exploit(), 2) if name.endswith(("constants.pkl", "data.pkl")) else source.read(name)
                archive.writestr(name, data)
    return path


@pytest.mark.parametrize("kind", ["empty", "truncated", "pickle", "checkpoint", "zip", "pickled constants"])
def test_files_that_are_no_torchscript(tmp_path, monkeypatch, network, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SignFastError, match="is not a whole TorchScript file") as error:
        InceptionDetector(write_bad(tmp_path / "inception.pt", kind, network), "cpu")
    assert "\n" not in str(error.value) and "inception-2015-12-05.pt" in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_missing_file_and_pickle_of_the_same_network(tmp_path):
    with pytest.raises(SignFastError, match="no Inception file"):
        InceptionDetector(tmp_path / "nowhere.pt", "cpu")
    (tmp_path / "inception-2015-12-05.pkl").write_bytes(b"")
    with pytest.raises(SignFastError, match="is named as a pickle, which can hold a program and is not read"):
        InceptionDetector(tmp_path / "inception-2015-12-05.pkl", "cpu")


@pytest.mark.parametrize(
    "cls, message",
    [
        (stand_in.Broken, r"fails on 3×12×12 images \(RuntimeError: shape '\[1, 1, 1, 7\]' is invalid"),
        (stand_in.Maps, r"gives \(2, 3, 12, 12\) for 2 images instead of \(N, D\)"),
        (stand_in.Text, r"gives str for 2 images"),
    ],
    ids=["fails", "rank", "type"],
)
def test_networks_that_misbehave(tmp_path, cls, message):
    detector = InceptionDetector(stand_in.write(tmp_path / "net.pt", cls), "cpu")
    with pytest.raises(SignFastError, match=message) as error:
        detector.prepare((3, 12, 12), "x")
    assert "\n" not in str(error.value)


def test_digits():
    detector = DigitsDetector()
    x = images(shape=(1, 8, 8))
    assert detector.prepare((1, 8, 8), "x", classes=True) == 64
    assert torch.equal(detector.features(x), bundled()[0].features(x.float() / 127.5 - 1))
    assert torch.allclose(detector.probabilities(x).sum(1), torch.ones(5))
    with pytest.raises(
        SignFastError, match=r"x has 3×32×32 images, .* give --inception FILE, .*inception-2015-12-05.pt"
    ):
        detector.prepare((3, 32, 32), "x")
