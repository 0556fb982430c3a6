"""Seeds and their draws: bit for bit those of torch.Generator, whatever draws them; and what seeds are refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sign_fast import functional
from sign_fast.errors import SignFastError
from sign_fast.kernels import extension
from sign_fast.sampling import SeededNoise, parse_seeds
from sign_fast.sampling.loop import draw_ahead
from sign_fast.sampling.noise import PhiloxNoise, check_seeds
from sign_fast.sampling.students import few_step_plan

SEEDS = [0, 1, 2, 3, 10, 12345, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 5, 2**63 - 1, 99]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Published:
    """The published programs' generators."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed % (1 << 32)) for seed in seeds]

    def randn(self, size, **kwargs):
        return torch.stack([torch.randn(size[1:], generator=g, **kwargs) for g in self.generators])

    def randint(self, *limits, size, **kwargs):
        return torch.stack([torch.randint(*limits, size=size[1:], generator=g, **kwargs) for g in self.generators])


def test_the_extension_draws():
    assert (SeededNoise("cpu", [1])._native is None) == (extension.module() is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*range(1, 21), 64, 623, 624, 625, 3072])
def test_normals_of_any_size(size, dtype):
    got, want = SeededNoise("cpu", SEEDS), Published(SEEDS)
    for _ in range(3):  # each draw goes on where the last one stopped
        a, b = (noise.randn([len(SEEDS), size], dtype=dtype) for noise in (got, want))
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_many_seeds():
    seeds = list(range(1000))
    assert torch.equal(SeededNoise("cpu", seeds).randn([1000, 20]), Published(seeds).randn([1000, 20]))
    for count in range(1, 18):  # whatever is left over of eight at a time
        size = [count, 3]
        assert torch.equal(SeededNoise("cpu", seeds[:count]).randn(size), Published(seeds[:count]).randn(size))


def test_any_sequence_of_draws():
    # odd numbers of normals leave one for the next draw, and labels lie between latents and noise
    got, want = SeededNoise("cpu", SEEDS), Published(SEEDS)
    rng = np.random.RandomState(0)
    n = len(SEEDS)
    for _ in range(60):
        kind, size = rng.randint(4), int(rng.choice([1, 2, 3, 7, 15, 16, 17, 33, 700]))
        draw = {
            0: lambda noise, size=size: noise.randn([n, size]),
            1: lambda noise, size=size: noise.randn([n, size], dtype=torch.float64),
            2: lambda noise, size=size: noise.randint(1000, size=[n]),
            3: lambda noise, size=size: noise.randint(-5, 2**40, size=[n, size]),
        }[kind]
        a, b = draw(got), draw(want)
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_other_kinds_of_draws():
    got, want = SeededNoise("cpu", SEEDS), Published(SEEDS)
    size = [len(SEEDS), 2, 3]
    assert got.randn([len(SEEDS), 0]).shape == (len(SEEDS), 0)
    for dtype in (torch.int32, torch.uint8, torch.float32):
        assert torch.equal(got.randint(7, size=size, dtype=dtype), want.randint(7, size=size, dtype=dtype))
    x = torch.empty(size, dtype=torch.float64)
    assert torch.equal(got.randn_like(x), want.randn(size, dtype=torch.float64))
    assert SeededNoise("cpu", []).randn([0, 3]).shape == (0, 3)


def test_sizes_that_do_not_fit():
    noise = SeededNoise("cpu", [1, 2])
    for call in (lambda: noise.randn([3, 4]), lambda: noise.randn([]), lambda: noise.randint(3, size=[1])):
        with pytest.raises(ValueError, match="must be the number of seeds, 2"):
            call()
    with pytest.raises(RuntimeError):
        noise.randint(5, 5, size=[2])
    with pytest.raises((RuntimeError, ValueError)):
        noise.randn([2, 3], device="meta")


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    SeededNoise("cpu", SEEDS).randn([len(SEEDS), 100])
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_share_a_noise():
    # the draws of each image come in some order, none is lost or made twice
    noise, want = SeededNoise("cpu", SEEDS), Published(SEEDS)
    size, drawn = [len(SEEDS), 500], []
    threads = [threading.Thread(target=lambda: drawn.append(noise.randn(size))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {want.randn(size).numpy().tobytes() for _ in threads}
    assert {t.numpy().tobytes() for t in drawn} == expected


def test_philox_draws():
    seeds = torch.tensor([3, 2**63 - 1, 2**32 + 3])
    noise = PhiloxNoise("cpu", seeds.tolist())
    latents = noise.randn([3, 2, 4, 4])
    labels = noise.randint(10, size=[3])
    draws = draw_ahead(few_step_plan(3, noise_dtype=torch.float64), latents, noise.randn_like)
    assert len(draws) == 3 and draws[1].dtype == torch.float64
    for k, draw in enumerate(draws):
        assert torch.equal(draw.float(), functional.philox_normal(seeds, k, (2, 4, 4)))
    assert not torch.equal(draws[0][0], draws[0][2])  # all bits of a seed count
    assert torch.equal(PhiloxNoise("cpu", seeds.tolist()).randint(10, size=[3]), labels)
    with pytest.raises(ValueError, match=r"must be \(3, C, H, W\)"):
        noise.randn([2, 2, 4, 4])
    with pytest.raises(ValueError, match=r"must be \(3,\)"):
        noise.randint(10, size=[4])


def test_philox_labels_are_uniform():
    count = 20_000
    labels = PhiloxNoise("cpu", range(count)).randint(10, size=[count])
    share = torch.bincount(labels, minlength=10) / count
    assert labels.dtype == torch.int64 and share.shape == (10,)
    assert (share - 0.1).abs().max() < 6 * (0.09 / count) ** 0.5


def test_seeds():
    want = [0, 1, 2]
    for seeds in (range(3), iter([0, 1, 2]), np.arange(3), torch.arange(3), [np.int64(0), True + 0, 2]):
        assert check_seeds(seeds) == want
        assert all(type(seed) is int for seed in check_seeds(want))
    assert check_seeds([2**63 - 1]) == [2**63 - 1]
    assert check_seeds([5, 5], allow_duplicates=True) == [5, 5]
    assert check_seeds([5, 2**32 + 5], noise="philox") == [5, 2**32 + 5]


@pytest.mark.parametrize(
    "seeds, message",
    [
        ([], "no seeds: give at least one"),
        (5, "must be a list of whole numbers, not 5"),
        ([1, 2.0], "seed 2.0 is not a whole number"),
        (["1"], "seed '1' is not a whole number"),
        ([None], "seed None is not a whole number"),
        ([True], "seed True is not a whole number"),
        ([0, -1], "seed -1 is out of range"),
        ([2**63], "seed 9223372036854775808 is out of range"),
        ([4, 7, 3, 7, 4], "seed 7 is there twice"),
        ([9, 5, 2**32 + 5], "seeds 5 and 4294967301 are one image: .* modulo 2.32; leave one away"),
    ],
)
def test_bad_seeds(seeds, message):
    with pytest.raises(SignFastError, match=message) as caught:
        check_seeds(seeds)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", [[1, 2.0], [0, -1], [2**63], []])
def test_duplicates_are_all_that_is_allowed(seeds):
    with pytest.raises(SignFastError):
        check_seeds(seeds, allow_duplicates=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "neither a number nor a range"),
        ("1,,2", "neither a number nor a range"),
        ("-5", "neither a number nor a range"),
        ("1.5", "neither a number nor a range"),
        ("٣", "neither a number nor a range"),
        ("9-3", "runs backwards: write 3-9"),
        ("0-9223372036854775807", "more than 100,000,000 images"),
    ],
)
def test_bad_lists(text, message):
    with pytest.raises(SignFastError, match=message) as caught:
        parse_seeds(text)
    assert "\n" not in str(caught.value)


def test_lists():
    assert parse_seeds("0-3,70, 5") == [0, 1, 2, 3, 70, 5]
    assert parse_seeds("9223372036854775808") == [2**63]  # check_seeds says what is wrong with it
