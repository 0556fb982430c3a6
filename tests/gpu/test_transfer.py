"""Copies to the host on a GPU: the bytes, in order, without a synchronisation before they are asked for."""

from __future__ import annotations

import pytest
import torch

from sign_fast import ImageGenerator
from sign_fast.sampling.transfer import PinnedRing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def no_synchronisation():
    """Raises where torch would wait for the GPU."""

    class Guard:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    return Guard()


def test_ring_copies_what_the_stream_makes(no_synchronisation):
    ring = PinnedRing(torch.device("cuda"))
    ring.push(torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")).result()
    ring.push(torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")).result()
    values = torch.arange(256, dtype=torch.uint8, device="cuda")
    with no_synchronisation:
        transfers = []
        for i in range(2):
            torch.cuda._sleep(20_000_000)  # the copy must wait for the kernel behind this
            transfers.append(ring.push((values + i).repeat(4096)))
    for i, transfer in enumerate(transfers):
        want = (values + i).repeat(4096).cpu().numpy()
        assert (transfer.result() == want).all()


def test_memory_of_a_pushed_tensor_is_not_given_away_early():
    ring = PinnedRing(torch.device("cuda"), slots=8)
    transfers = []
    for i in range(8):
        transfers.append(ring.push(torch.full([1 << 22], i, dtype=torch.uint8, device="cuda")))
        torch.full([1 << 22], 99, dtype=torch.uint8, device="cuda")  # would take the freed memory
    for i, transfer in enumerate(transfers):
        assert (transfer.result() == i).all()


@pytest.mark.parametrize("name", ["digits-uncond", "digits-cond"])
def test_stream_and_submit_give_what_a_call_gives(name):
    generator = ImageGenerator.from_pretrained(name, "cuda")
    batches = [range(i, i + 16) for i in range(0, 80, 16)]
    direct = [generator(seeds, 3).cpu().numpy() for seeds in batches]
    pending = [generator.submit(seeds, 3) for seeds in batches]
    for array, streamed, submitted in zip(direct, generator.stream(batches, 3), pending, strict=True):
        assert (array == streamed).all() and (array == submitted.result()).all()
