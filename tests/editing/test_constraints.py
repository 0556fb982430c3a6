"""What is known of an image is kept: exactly, within [-1, 1], and as bytes."""

from __future__ import annotations

import pytest
import torch

from sign_fast.editing import KnownPixels, Luma, PatchMeans
from sign_fast.editing.tasks import centre_unknown
from sign_fast.errors import SignFastError
from sign_fast.functional import to_uint8


def pictures(batch, channels, size=8, seed=0, spread=1.0):
    """Byte pictures in [-1, 1] (spread 1), or values that leave the range."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (batch, channels, size, size), generator=generator)
    return spread * (levels / 127.5 - 1)


def luma(images):
    return 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]


def means(images, factor):
    return torch.nn.functional.avg_pool2d(images, factor)


@pytest.mark.parametrize("each", [False, True])
def test_known_pixels(each):
    truth, result = pictures(3, 3), pictures(3, 3, seed=1, spread=1.4)
    known = centre_unknown(8)
    if each:
        known = torch.stack([known, ~known, known.roll(1, 0)])[:, None]
    constraint = KnownPixels(known)
    constraint.check(truth.shape)
    inside = constraint.known.expand(3, 3, 8, 8)
    observed = constraint.corrupt(truth)
    assert torch.equal(observed[inside], truth[inside])
    for i in range(3):
        here = constraint.known[i if each else 0, 0]
        for c in range(3):
            hidden = observed[i, c][~here]
            torch.testing.assert_close(hidden, truth[i, c][here].mean().expand_as(hidden))
    restored = constraint.restore(result, observed, *constraint.tensors)
    assert torch.equal(restored[inside], truth[inside]) and torch.equal(restored[~inside], result[~inside])
    kept = inside.permute(0, 2, 3, 1)
    assert torch.equal(to_uint8(restored)[kept], to_uint8(truth)[kept])
    assert torch.equal(constraint.corrupt(observed)[inside], truth[inside])  # an image that is corrupted already


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.6])
def test_luma(spread):
    truth, result = pictures(4, 3), pictures(4, 3, seed=1, spread=spread)
    constraint = Luma()
    constraint.check(truth.shape)
    observed = constraint.corrupt(truth)
    assert torch.equal(observed[:, 0], observed[:, 1]) and torch.equal(observed[:, 0], observed[:, 2])
    torch.testing.assert_close(observed[:, 0], luma(truth))
    restored = constraint.restore(result, observed)
    torch.testing.assert_close(luma(restored), luma(truth), rtol=0, atol=1e-6)
    assert restored.abs().max() <= 1 + 1e-6
    bytes_luma = luma(to_uint8(restored).permute(0, 3, 1, 2).double())
    assert (bytes_luma - (luma(truth).double() + 1) * 127.5).abs().max() <= 0.51  # half a level of rounding
    chroma = result.clamp(-1, 1) - luma(result.clamp(-1, 1))[:, None]
    kept = restored - luma(restored)[:, None]
    coloured = (chroma.norm(dim=1) > 0.01) & (kept.norm(dim=1) > 0.01)
    turned = torch.nn.functional.cosine_similarity(kept, chroma, dim=1)[coloured]
    assert coloured.float().mean() > 0.8
    assert turned.min() > 1 - 1e-3  # the hue is the result's


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [2, 4])
def test_patch_means(channels, factor):
    truth, result = pictures(4, channels), pictures(4, channels, seed=1, spread=1.6)
    truth[0] = -1  # a patch at the end of the range has no room for detail
    constraint = PatchMeans(factor)
    constraint.check(truth.shape)
    observed = constraint.corrupt(truth)
    assert torch.equal(observed, constraint.enlarge(observed[:, :, ::factor, ::factor]))
    torch.testing.assert_close(means(observed, factor), means(truth, factor), rtol=0, atol=1e-6)
    restored = constraint.restore(result, observed)
    torch.testing.assert_close(means(restored, factor), means(truth, factor), rtol=0, atol=1e-6)
    assert restored.abs().max() <= 1 + 1e-6 and torch.all(restored[0] == -1)
    kept = to_uint8(restored).permute(0, 3, 1, 2).double()
    assert means(kept, factor).sub((means(truth.double(), factor) + 1) * 127.5).abs().max() <= 0.51


def test_what_is_right_already_stays():
    truth = pictures(2, 3)
    for constraint in (KnownPixels(centre_unknown(8)), Luma(), PatchMeans(2)):
        restored = constraint.restore(truth, constraint.corrupt(truth), *constraint.tensors)
        torch.testing.assert_close(restored, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnownPixels(torch.ones(8, 8)), "a mask is a bool tensor"),
        (lambda: KnownPixels(torch.ones(2, 3, 8, 8, dtype=torch.bool)), r"not torch.bool \(2, 3, 8, 8\)"),
        (lambda: KnownPixels(torch.ones(8, 8, dtype=torch.bool)), "nothing to paint"),
        (lambda: KnownPixels(torch.zeros(8, 8, dtype=torch.bool)), "no pixel known"),
        (lambda: KnownPixels(centre_unknown(6)).check((2, 1, 8, 8)), "the mask is 6×6, the images are 8×8"),
        (lambda: KnownPixels(centre_unknown(8).expand(3, 1, 8, 8)).check((2, 1, 8, 8)), "3 masks for 2 images"),
        (lambda: Luma().check((2, 1, 8, 8)), "needs a network of RGB images"),
        (lambda: PatchMeans(1), "must be at least 2, not 1"),
        (lambda: PatchMeans(3).check((2, 1, 8, 8)), "8×8 pixels have no patches of 3×3"),
    ],
)
def test_refused(make, message):
    with pytest.raises(SignFastError, match=message):
        make()
