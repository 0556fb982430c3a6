"""The CPU attention of the C++ executor against float64."""

from __future__ import annotations

import pytest
import torch

from sign_fast.kernels import extension
from sign_fast.kernels.attention import reference
from tests.lesser_cpu import run_on
from tests.oracle import assert_close

pytestmark = pytest.mark.skipif(extension.module() is None, reason="needs the C++ extension")


def plain(qkv, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    return reference.attention(q, k, v).transpose(1, 2).flatten(2)


def draw(batch, tokens, channels, scale=1.0):
    return scale * torch.randn(batch, tokens, 3 * channels, generator=torch.Generator().manual_seed(tokens + channels))


def check(qkv, heads):
    assert_close(torch.ops.sign_fast.attention_cpu(qkv, heads), plain(qkv.double(), heads), plain(qkv, heads))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("channels", [2, 24, 40, 48, 256])
@pytest.mark.parametrize("tokens", [1, 7, 16, 64, 100])
def test_error(tokens, channels, heads):
    for batch in (0, 1, 3):
        check(draw(batch, tokens, channels), heads)


def test_long_and_steep():
    """More keys than one run of a sum, and logits whose exponentials would overflow without the maximum taken off."""
    check(draw(1, 1024, 48), 1)
    check(draw(2, 40, 64, scale=30.0), 1)


def test_an_image_depends_on_nothing_else():
    qkv, threads = draw(5, 100, 128), torch.get_num_threads()
    together = torch.ops.sign_fast.attention_cpu(qkv, 2)
    for i in range(5):
        assert torch.equal(torch.ops.sign_fast.attention_cpu(qkv[i : i + 1], 2)[0], together[i])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.sign_fast.attention_cpu(qkv, 2), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "qkv, heads, message",
    [
        (torch.ones(2, 4, 10), 1, "does not divide"),
        (torch.ones(2, 4, 12), 3, "does not divide"),
        (torch.ones(2, 4, 12), 0, "does not divide"),
        (torch.ones(4, 12), 1, "must be"),
        (torch.ones(2, 4, 12).double(), 1, "must be"),
    ],
)
def test_refuses_what_does_not_fit(qkv, heads, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sign_fast.attention_cpu(qkv, heads)


OTHER_CPU = """
from tests.kernels import test_attention_cpp as tests
from sign_fast.kernels import extension
assert extension.module().capability() == {name!r}
for tokens in (1, 16, 100):
    for channels in (24, 48, 80):
        tests.check(tests.draw(2, tokens, channels), 2)
"""


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_lesser_cpus(limit):
    run_on(limit, OTHER_CPU)
