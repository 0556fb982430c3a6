"""Metrics on a GPU: detector, kernel distance, precision and recall as on the CPU; generated images never leave it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast.metrics import GeneratedImages, InceptionDetector, collect, evaluate, kernel_distance, precision_recall
from sign_fast.metrics.features import Wanted, cut
from sign_fast.metrics.images import TensorImages
from sign_fast.sampling import ImageGenerator
from tests.metrics import stand_in
from tests.metrics.test_evaluation import ALL, pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_collected_as_on_the_cpu(tmp_path):
    network = stand_in.write(tmp_path / "inception.pt")
    wanted = Wanted(features=True, classes=True)
    cpu = collect(TensorImages(pixels(100)), InceptionDetector(network, "cpu"), wanted, batch=16)
    for images in (pixels(100), pixels(100).cuda()):
        gpu = collect(TensorImages(images), InceptionDetector(network, "cuda"), wanted, batch=16)
        assert np.allclose(gpu.features, cpu.features, rtol=1e-4, atol=1e-4)
        assert np.allclose(gpu.statistics.covariance, cpu.statistics.covariance, rtol=1e-3, atol=1e-3)
        assert gpu.score.score() == pytest.approx(cpu.score.score(), rel=1e-4)


def test_distances_as_on_the_cpu():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 32)).astype(np.float32), rng.standard_normal((250, 32)).astype(np.float32) + 0.2
    cpu, gpu = (kernel_distance(x, y, subsets=5, subset_size=100, device=device) for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-9)
    assert precision_recall(x, y, block=64, device="cuda") == precision_recall(x, y, device="cpu")


def test_generated_images_are_measured_where_they_are_made(tmp_path):
    generator = ImageGenerator.from_pretrained("digits-sid", "cuda")
    source = GeneratedImages(generator, range(64))
    assert all(images.is_cuda for images in source.batches([range(0, 32), range(32, 64)]))
    network = stand_in.write(tmp_path / "inception.pt")
    found = evaluate(source, ALL, reference="digits:test", inception=network, batch=16)
    images = torch.cat([part.cpu() for part in source.batches(cut(64, 16))])  # of the same batches, so the same bytes
    want = evaluate(images, ALL, reference="digits:test", inception=network, batch=16, device="cpu")
    assert found == pytest.approx(want, rel=1e-3, abs=1e-4)
