"""The CPU convolutions of the C++ executor against float64, by every algorithm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sign_fast.kernels import extension
from tests.lesser_cpu import run_on
from tests.oracle import assert_close

pytestmark = pytest.mark.skipif(extension.module() is None, reason="needs the C++ extension")

ALGORITHMS = ["direct", "phases", "winograd2", "winograd4", ""]


def resample(x: Tensor, resampling: str) -> Tensor:
    if resampling == "up":
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.avg_pool2d(x, 2) if resampling == "down" else x


class Case:
    """Inputs of one convolution; (height, width) are the output's, `channels` one or two inputs' and the output's."""

    def __init__(self, channels, k=3, size=(8, 8), batch=2, resampling="none", residual=None, bias=True, scale=1.0):
        generator = torch.Generator().manual_seed(sum(channels) * 1009 + batch * 101 + k * 11 + size[0])
        *inputs, out = channels
        divide, times = {"none": (1, 1), "up": (2, 1), "down": (1, 2)}[resampling]
        height, width = (side * times // divide for side in size)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.x = [normal(batch, c, height, width).contiguous(memory_format=torch.channels_last) for c in inputs]
        self.weight = normal(out, sum(inputs), k, k) / (sum(inputs) * k * k) ** 0.5
        self.bias = normal(out) if bias else None
        half = residual == "up"
        self.residual = normal(batch, out, size[0] >> half, size[1] >> half) if residual else None
        self.residual_up, self.resampling, self.scale = half, resampling, scale

    def plain(self, dtype: torch.dtype) -> Tensor:
        x = torch.cat([resample(x.to(dtype), self.resampling) for x in self.x], 1)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.conv2d(x, self.weight.to(dtype), bias, padding=self.weight.shape[2] // 2)
        if self.residual is not None:
            y = y + resample(self.residual.to(dtype), "up" if self.residual_up else "none")
        return y * self.scale

    def ours(self, algorithm: str = "", images: slice = slice(None)) -> Tensor:
        x = [x[images].contiguous(memory_format=torch.channels_last) for x in self.x]
        return torch.ops.sign_fast.convolution(
            x[0],
            x[1] if len(x) > 1 else None,
            self.weight,
            self.bias,
            self.resampling,
            None if self.residual is None else self.residual[images],
            self.residual_up,
            self.scale,
            algorithm,
        )

    def check(self, algorithm: str = "") -> None:
        got = self.ours(algorithm)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_close(got, self.plain(torch.float64), self.plain(torch.float32), algorithm)


def applies(algorithm: str, k: int, resampling: str, size: tuple[int, int] = (8, 8)) -> bool:
    """Whether the algorithm is one for such a convolution."""
    if resampling == "up" and (size[0] % 2 or size[1] % 2):
        return False
    if algorithm == "winograd4":  # an image that its tiles do not fit is never left to it: see `choose`
        return k == 3 and resampling != "up" and min(size) >= 4 and all(side % 4 == 0 or side > 12 for side in size)
    return algorithm in ("", "direct") or (k == 3 and (algorithm != "phases" or resampling == "up"))


COMBINATIONS = [
    pytest.param(algorithm, k, resampling, id=f"{algorithm or 'chosen'}-{k}x{k}-{resampling}")
    for algorithm in ALGORITHMS
    for k in (1, 3)
    for resampling in ("none", "up", "down")
    if applies(algorithm, k, resampling)
]


@pytest.mark.parametrize("algorithm, k, resampling", COMBINATIONS)
def test_error(algorithm, k, resampling):
    """Channels that are no whole vectors, sides that are no whole tiles, concatenation, epilogues and batches."""
    for channels in [(1, 24), (24, 24), (24, 48, 40), (3, 40), (72, 1), (5, 3, 72), (40, 3), (256, 3), (256, 64)]:
        Case(channels, k, (8, 8), 1, resampling).check(algorithm)
    for size in [(1, 1), (2, 2), (5, 7), (8, 8), (4, 6), (10, 2)]:
        if not applies(algorithm, k, resampling, size):
            continue
        for batch in (0, 1, 3):
            Case((24, 40), k, size, batch, resampling, bias=False).check(algorithm)
            Case((24, 3, 40), k, size, batch, resampling, residual="same", scale=0.5**0.5).check(algorithm)
    for channels in [(24, 24), (3, 5, 40), (40, 3)]:
        Case(channels, k, (6, 4), 3, resampling, residual="up", scale=-1.25).check(algorithm)


@pytest.mark.parametrize("algorithm, k, resampling", COMBINATIONS)
@pytest.mark.parametrize("channels, size, batch", [((40, 24, 72), (20, 20), 5), ((140, 100, 80), (12, 12), 3)], ids=str)
def test_an_image_depends_on_nothing_else(channels, size, batch, algorithm, k, resampling):
    """Neither on its batch nor on the number of threads, in any bit; the wider filters are transformed at each run."""
    case = Case(channels, k, size, batch, resampling, residual="up", scale=0.7)
    together, threads = case.ours(algorithm), torch.get_num_threads()
    for i in range(batch):
        assert torch.equal(case.ours(algorithm, slice(i, i + 1))[0], together[i])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(case.ours(algorithm), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x2=torch.ones(1, 4, 8, 8)), "x2 does not fit"),
        (dict(weight=torch.ones(4, 5, 3, 3)), "weight does not fit"),
        (dict(weight=torch.ones(4, 4, 5, 5)), "1×1 or 3×3"),
        (dict(bias=torch.ones(3)), "bias does not fit"),
        (dict(residual=torch.ones(2, 4, 4, 4)), "residual does not fit"),
        (dict(x=torch.ones(2, 4, 8, 8).double()), "x must be"),
        (dict(x=torch.ones(2, 4, 3, 3), resampling="down"), "even sides"),
        (dict(algorithm="phases"), "phases are those"),
        (dict(algorithm="winograd4", resampling="up"), "upsampled inputs take winograd2"),
        (dict(algorithm="winograd2", weight=torch.ones(4, 4, 1, 1)), "Winograd convolutions are 3×3"),
        (dict(algorithm="fastest"), "algorithm must be"),
        (dict(resampling="sideways"), "resampling must be"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    arguments = dict(
        x=torch.ones(2, 4, 8, 8), x2=None, weight=torch.ones(4, 4, 3, 3), bias=None, resampling="none", residual=None,
        residual_up=False, scale=1.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sign_fast.convolution(**(arguments | change))


OTHER_CPU = """
from tests.kernels import test_convolution as tests
from sign_fast.kernels import extension
assert extension.module().capability() == {name!r}
for algorithm in tests.ALGORITHMS:
    for k in (1, 3):
        for resampling in ("none", "up", "down"):
            if tests.applies(algorithm, k, resampling):
                for channels in [(1, 24), (24, 3, 40), (72, 1)]:
                    tests.Case(channels, k, (6, 10), 2, resampling, residual="up", scale=0.5).check(algorithm)
"""


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_lesser_cpus(limit):
    run_on(limit, OTHER_CPU)
