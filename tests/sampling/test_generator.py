"""`ImageGenerator`: shapes, seeds, labels, samplers and refusals."""

from __future__ import annotations

import pytest
import torch

from sign_fast import ImageGenerator
from sign_fast.errors import SignFastError
from sign_fast.sampling import multistep, parse_seeds, recursive


@pytest.fixture(scope="module")
def digits():
    return ImageGenerator.from_pretrained("digits-uncond", "cpu")


@pytest.fixture(scope="module")
def labelled():
    return ImageGenerator.from_pretrained("digits-cond", "cpu")


def test_images(digits):
    images = digits(range(4), 3)
    assert images.shape == (4, 8, 8, 1) and images.dtype == torch.uint8 and images.is_contiguous()


def test_a_seed_is_an_image_whatever_the_batch(digits):
    whole = digits(range(9), 4).int()
    for part in ([8, 0, 3], [5]):
        assert (digits(part, 4).int() - whole[part]).abs().max() <= 1


def test_labels(labelled):
    threes = labelled([1, 2], 3, 3)
    assert torch.equal(labelled([1, 2], 3, [3, 3]), threes)
    assert torch.equal(labelled([1, 2], 3, torch.tensor([3, 3])), threes)
    assert not torch.equal(labelled([1, 2], 3, [3, 4])[1], threes[1])
    assert torch.equal(labelled([1, 2], 3), labelled([1, 2], 3))  # drawn from the seeds


def test_low_precision(digits):
    other = ImageGenerator.from_pretrained("digits-uncond", "cpu", torch.bfloat16)
    assert (other(range(8), 18).float() - digits(range(8), 18).float()).abs().mean() < 8


def test_samplers(digits):
    assert digits([0], 1, sampler="one_step").shape == digits([0], 4, sampler="few_step").shape == (1, 8, 8, 1)
    assert torch.equal(
        digits([0], 5, sampler=lambda net, z, labels, noise, num_steps: z)[0],
        digits([0], 9, sampler=lambda *a, **k: a[1])[0],
    )
    assert digits([0], 4, sampler="edm", S_churn=10).shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d, c: d([]), "no seeds"),
        (lambda d, c: d([1], 0), "steps must be at least 1"),
        (lambda d, c: d([1], 2, 3), "unconditional"),
        (lambda d, c: c([1], 2, 10), "classes 0 to 9"),
        (lambda d, c: c([1, 2, 3], 2, [1, 2]), "2 class labels for 3 images"),
        (lambda d, c: c([1], 2, [1.5]), "out of range"),
        (lambda d, c: d([1], sampler="ddim"), "unknown sampler"),
        (lambda d, c: d([1], 2, sampler="one_step"), "makes 1 step"),
        (lambda d, c: ImageGenerator(d.net, "other"), "role must be"),
    ],
)
def test_refusals(digits, labelled, call, message):
    with pytest.raises(SignFastError, match=message):
        call(digits, labelled)


def test_parse_seeds():
    assert parse_seeds("0-3,70, 5") == [0, 1, 2, 3, 70, 5]


def test_recursive_and_multistep_by_hand():
    z = torch.full((1, 1, 2, 2), 8.0)
    assert torch.equal(recursive(lambda x: x / 2, z, 3), z / 8)
    noise = torch.ones_like(z)
    got = multistep(lambda x: x + 1, z, [0.5], randn_like=lambda x: noise)
    assert torch.equal(got, 0.5 * (z + 1) + 0.5 * noise + 1)
    with pytest.raises(ValueError, match="at least 1"):
        recursive(lambda x: x, z, 0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        multistep(lambda x: x, z, [1.5])
