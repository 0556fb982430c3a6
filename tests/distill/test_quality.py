"""Quality, score gap, idempotence: known cases, and images that follow a student in training."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from torch import nn

from sign_fast import models
from sign_fast.data import open_dataset
from sign_fast.distill import quality
from sign_fast.distill.quality import (
    FeatureDistance,
    idempotence_and_reconstruction,
    no_quality,
    quality_for,
    sample_grid,
    sample_images,
    score_gap,
)
from sign_fast.errors import SignFastError
from sign_fast.metrics.digits_classifier import digits_distance
from sign_fast.models import IdempotentPrecond
from sign_fast.sampling import ImageGenerator
from sign_fast.sampling.pictures import read_png


def student(name="digits-uncond"):
    return copy.deepcopy(models.load(name, "cpu"))


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def real():
    data = open_dataset("digits")
    return torch.from_numpy(np.stack([data.image(i) for i in range(len(data))]))


def noise_images(count=200, seed=0):
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def channel_means(images):
    return images.flatten(2).mean(2)


# ---- quality ----


def test_quality_of_digits_is_the_metric_of_evaluate():
    measure = quality_for((1, 8, 8))
    assert no_quality((1, 8, 8)) is None
    images = noise_images(700)
    assert measure(images) == digits_distance(images) > 200
    assert measure(real()) == pytest.approx(0, abs=1e-2)


def test_other_images_have_no_quality_and_a_reason():
    assert quality_for((3, 32, 32)) is None
    assert no_quality((3, 32, 32)).startswith("no quality is logged: no features are bundled for 3×32×32")


def test_distance_of_features_of_ones_own():
    images = torch.cat([noise_images(seed=1), noise_images(seed=2), noise_images(seed=3)], 1) // 2
    measure = FeatureDistance.to_images(channel_means, images)
    assert measure(images) == pytest.approx(0, abs=1e-9)
    # a mean shifted by 51 levels in each of three channels, the covariance as it was
    assert measure(images + 51) == pytest.approx(3 * 0.4**2, rel=1e-4)
    in_parts = FeatureDistance.to_images(channel_means, images, batch=7)
    assert in_parts(images + 51) == pytest.approx(measure(images + 51), rel=1e-9)


def test_unusable_features_and_images_are_refused():
    measure = FeatureDistance(channel_means, np.zeros(1), np.eye(1))
    with pytest.raises(SignFastError, match=r"uint8 images, not \(3, 1, 8, 8\) torch.float32"):
        measure(torch.zeros(3, 1, 8, 8))
    with pytest.raises(SignFastError, match="at least 2 images, not 1"):
        measure(noise_images(1))
    with pytest.raises(SignFastError, match="features have 3 values an image, the real ones' mean 1"):
        measure(noise_images(4).expand(4, 3, 8, 8))
    with pytest.raises(SignFastError, match="not finite"):
        FeatureDistance(lambda x: channel_means(x) * float("nan"), np.zeros(1), np.eye(1))(noise_images(4))
    with pytest.raises(SignFastError, match=r"must be \(D,\) and \(D, D\)"):
        FeatureDistance(channel_means, np.zeros(2), np.eye(3))


# ---- images ----


@pytest.mark.parametrize("kind, steps", [("one_step", 1), ("few_step", 3)])
def test_images_are_those_that_generate_makes(kind, steps):
    net = student()
    want = ImageGenerator(net)(range(20), steps, sampler=kind).permute(0, 3, 1, 2)
    got = sample_images(net, kind, 20, steps=steps)
    assert got.dtype == torch.uint8 and got.shape == (20, 1, 8, 8)
    assert torch.equal(got, want)
    assert torch.equal(sample_images(net, kind, seeds=[5, 3], steps=steps), want[[5, 3]])
    in_parts = sample_images(net, kind, 20, steps=steps, batch=7)
    assert (in_parts.int() - want.int()).abs().max() <= 1  # other batch sizes round differently


def test_images_of_a_time_free_student_and_of_classes():
    net = IdempotentPrecond.from_teacher(student("digits-cond"))
    labels = [i % 10 for i in range(12)]
    want = ImageGenerator(net)(range(12), 2, labels).permute(0, 3, 1, 2)
    assert torch.equal(sample_images(net, "recursive", 12, labels=labels, steps=2), want)
    in_parts = sample_images(net, "recursive", 12, labels=labels, steps=2, batch=5)
    assert (in_parts.int() - want.int()).abs().max() <= 1
    drawn = sample_images(net, "recursive", 12, steps=2)  # labels come from the seeds
    assert torch.equal(drawn, ImageGenerator(net)(range(12), 2).permute(0, 3, 1, 2))
    assert not torch.equal(drawn, want)


@pytest.mark.parametrize("kind", ["one_step", "recursive"])
def test_one_inference_copy_follows_the_weights(kind, monkeypatch):
    made = []

    class Counted(ImageGenerator):
        def __init__(self, net):
            made.append(net)
            super().__init__(net)

    monkeypatch.setattr(quality, "ImageGenerator", Counted)
    net = student() if kind == "one_step" else IdempotentPrecond.from_teacher(student())
    before = sample_images(net, kind, 8)
    for step in range(3):
        with torch.no_grad():
            for i, parameter in enumerate(net.parameters()):
                parameter.mul_(1.05).add_(normal(100 * step + i, *parameter.shape), alpha=0.02)
        now = sample_images(net, kind, 8)
        assert not torch.equal(now, before)
        assert torch.equal(now, ImageGenerator(net)(range(8), 1, sampler=kind).permute(0, 3, 1, 2))
        before = now
    assert len(made) == 1


def test_the_copy_goes_with_the_student():
    net = student()
    sample_images(net, "one_step", 2)
    held = len(quality._generators)
    del net
    gc.collect()
    assert len(quality._generators) == held - 1


def test_sampling_leaves_student_and_random_state_alone():
    net = student().train().requires_grad_(True)
    weights = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    sample_images(net, "few_step", 4, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_wrong_arguments_are_told():
    net = student()
    with pytest.raises(SignFastError, match="takes a noise level"):
        sample_images(net, "recursive", 4)
    with pytest.raises(SignFastError, match="unconditional"):
        sample_images(net, "one_step", 4, labels=[0, 1, 2, 3])
    with pytest.raises(SignFastError, match="makes 1 step, not 2"):
        sample_images(net, "one_step", 4, steps=2)


def test_grid_is_written_and_returned(tmp_path):
    images = noise_images(10)
    grid = sample_grid(tmp_path, 1200, images)
    assert [p.name for p in tmp_path.iterdir()] == ["samples-00001200.png"]
    assert np.array_equal(read_png(tmp_path / "samples-00001200.png"), grid)
    zoom = 512 // (4 * 8)
    gap = zoom // 2
    first = grid[gap : gap + 8 * zoom : zoom, gap : gap + 8 * zoom : zoom, 0]
    assert np.array_equal(first, images[0, 0].numpy())
    left = 2 * (8 * zoom + gap) + gap  # the third column
    seventh = grid[8 * zoom + 2 * gap : 16 * zoom + 2 * gap : zoom, left : left + 8 * zoom : zoom, 0]
    assert np.array_equal(seventh, images[6, 0].numpy())


# ---- idempotence and reconstruction ----


class Linear(nn.Module):
    """f(u) = scale·u + shift."""

    time_free, img_resolution, img_channels = True, 8, 1

    def __init__(self, scale, shift=0.0):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, u, labels=None):
        return self.scale * u + self.shift


def test_controls_of_idempotence():
    x, z = normal(0, 30, 1, 8, 8).clamp(-1, 1), normal(1, 20, 1, 8, 8)
    assert set(idempotence_and_reconstruction(Linear(1.0), x, z).values()) == {0.0}  # the identity
    constant = idempotence_and_reconstruction(Linear(0.0, 0.25), x, z)
    assert constant["idempotence_noise"] == constant["idempotence_data"] == 0
    assert constant["reconstruction"] == pytest.approx((x - 0.25).square().mean().sqrt().item(), rel=1e-6)


def test_idempotence_by_formula():
    x, z = normal(0, 30, 1, 8, 8), normal(1, 20, 1, 8, 8)
    got = idempotence_and_reconstruction(Linear(0.5), x, z)
    size = {"z": z.square().mean().sqrt().item(), "x": x.square().mean().sqrt().item()}
    assert got["idempotence_noise"] == pytest.approx(0.25 * size["z"], rel=1e-6)
    assert got["idempotence_data"] == pytest.approx(0.25 * size["x"], rel=1e-6)
    assert got["reconstruction"] == pytest.approx(0.5 * size["x"], rel=1e-6)


def test_idempotence_of_a_student_with_classes():
    f = IdempotentPrecond.from_teacher(student("digits-cond"))
    x, z = real()[:30].float() / 127.5 - 1, normal(1, 20, 1, 8, 8)
    labels = torch.eye(10)[torch.arange(30) % 10]
    got = idempotence_and_reconstruction(f, x, z, labels)
    with torch.no_grad():
        g, y = f(z, labels[:20]), f(x, labels)
        want = [f(g, labels[:20]) - g, f(y, labels) - y, y - x]
    assert list(got.values()) == pytest.approx([d.square().mean().sqrt().item() for d in want], rel=1e-4)
    assert idempotence_and_reconstruction(f, x, z, labels.flip(0)) != got


def test_idempotence_of_a_denoiser_is_refused():
    with pytest.raises(SignFastError, match="this one takes a noise level"):
        idempotence_and_reconstruction(student(), normal(0, 2, 1, 8, 8), normal(1, 2, 1, 8, 8))


# ---- score gap ----


class Shifted(nn.Module):
    """D(x; σ) = x/(1 + σ) + shift(σ)."""

    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x, sigma, labels=None):
        return x / (1 + sigma) + self.shift(sigma)


def test_score_gap_tells_the_level():
    x, n = normal(0, 6, 1, 8, 8), normal(1, 6, 1, 8, 8)
    gaps = score_gap(Shifted(lambda s: 0), Shifted(lambda s: 0.25 * s), x, n, (0.5, 2.0, 16.0))
    assert list(gaps) == ["score_gap_0.5", "score_gap_2", "score_gap_16"] == quality.score_gap_columns((0.5, 2.0, 16.0))
    assert list(gaps.values()) == pytest.approx([0.125, 0.5, 4.0], rel=1e-5)


def test_score_gap_by_formula_on_networks():
    teacher, fake = student("digits-cond"), student("digits-cond")
    with torch.no_grad():
        fake.model.out_conv.weight.mul_(1.1) if hasattr(fake.model, "out_conv") else [
            p.mul_(1.01) for p in fake.parameters()
        ]
    x, n, labels = normal(0, 5, 1, 8, 8), normal(1, 5, 1, 8, 8), torch.eye(10)[:5]
    got = score_gap(teacher, fake, x, n, labels=labels)
    with torch.no_grad():
        for sigma, gap in zip(quality.SCORE_GAP_SIGMAS, got.values(), strict=True):
            level = torch.full((5,), sigma)
            u = x + sigma * n
            difference = teacher(u, level, labels) - fake(u, level, labels)
            assert gap == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-4)
            assert gap > 0
    assert score_gap(teacher, fake, x, n, labels=labels.flip(0)) != got


def test_score_gap_of_equals_is_zero_though_the_fake_trains_with_dropout():
    teacher = student()
    fake = copy.deepcopy(teacher).train()
    for module in fake.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    frozen = next(m for m in fake.modules() if isinstance(m, nn.Module) and m is not fake)
    frozen.training = False  # a part that was in another mode stays in it
    state = torch.get_rng_state()
    x, n = normal(0, 4, 1, 8, 8), normal(1, 4, 1, 8, 8)
    assert set(score_gap(teacher, fake, x, n).values()) == {0.0}
    assert torch.equal(torch.get_rng_state(), state)
    assert fake.training and not frozen.training and not teacher.training
    assert all(p.grad is None for p in fake.parameters())
