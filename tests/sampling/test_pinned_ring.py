"""`PinnedRing` against a stand-in for CUDA whose streams run nothing until somebody waits for them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from sign_fast.sampling.transfer import PinnedRing, begin_transfer


class Stream:
    """Work in order; `run` does what has been queued up to a position."""

    def __init__(self, device=None):
        self.queue, self.done = [], 0

    def run(self, position):
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, other):
        position = len(other.queue)
        self.queue.append(lambda: other.run(position))


class Event:
    def record(self, stream):
        self.stream, self.position = stream, len(stream.queue)

    def synchronize(self):
        self.stream.run(self.position)


class Cuda:
    Stream, Event = Stream, Event

    def __init__(self):
        self.current = Stream()
        self.buffers = []

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def allocate(self, size):
        cuda = self

        class Pinned(torch.Tensor):
            def copy_(self, source, non_blocking=False):
                assert non_blocking
                target = self.as_subclass(torch.Tensor)
                cuda.current.queue.append(lambda: target.copy_(source))

        self.buffers.append(torch.zeros(size, dtype=torch.uint8).as_subclass(Pinned))
        return self.buffers[-1]

    def images(self, value, shape=(2, 4, 4, 3), dtype=torch.uint8):
        """A tensor that the current stream will fill."""

        class OnDevice(torch.Tensor):
            streams = ()

            def record_stream(self, stream):
                self.streams = (*self.streams, stream)

        images = torch.zeros(shape, dtype=dtype)
        self.current.queue.append(lambda: images.fill_(value))
        return images.as_subclass(OnDevice)


@pytest.fixture
def cuda():
    return Cuda()


def ring_of(cuda, slots=2):
    return PinnedRing(torch.device("cuda"), slots, cuda=cuda, allocate=cuda.allocate)


def test_push_waits_for_nothing_and_the_copy_for_what_made_the_images(cuda):
    ring = ring_of(cuda)
    first, second = cuda.images(7), cuda.images(9)
    transfers = [ring.push(first), ring.push(second)]
    assert cuda.current.done == 0 and not first.any() and not second.any()
    assert (transfers[0].result() == 7).all()
    assert (transfers[1].result() == 9).all()
    assert first.streams == second.streams == (ring._stream,) and ring._stream is not cuda.current


def test_any_number_of_open_transfers_in_two_buffers(cuda):
    ring = ring_of(cuda)
    transfers = [ring.push(cuda.images(i)) for i in range(7)]
    results = [transfer.result() for transfer in reversed(transfers)][::-1]
    assert [int(array[0, 0, 0, 0]) for array in results] == list(range(7))
    assert all((array == array.flat[0]).all() and array.shape == (2, 4, 4, 3) for array in results)
    assert len(cuda.buffers) == 2


def test_a_result_stays_as_it_is(cuda):
    ring = ring_of(cuda, slots=1)
    first = ring.push(cuda.images(1))
    array = first.result()
    ring.push(cuda.images(2)).result()
    assert (array == 1).all() and first.result() is array


def test_buffers_grow_and_serve_smaller_batches_and_other_dtypes(cuda):
    ring = ring_of(cuda, slots=1)
    assert ring.push(cuda.images(1, (1, 2, 2, 1))).result().shape == (1, 2, 2, 1)
    floats = ring.push(cuda.images(0.5, (3, 1, 4, 4), torch.float32)).result()
    assert floats.dtype == np.float32 and (floats == 0.5).all() and floats.shape == (3, 1, 4, 4)
    assert (ring.push(cuda.images(5)).result() == 5).all()
    assert [len(buffer) for buffer in cuda.buffers] == [4, 3 * 16 * 4]


def test_failed_copy_is_told_by_result(cuda):
    ring = ring_of(cuda)
    images = cuda.images(1)
    transfer = ring.push(images)

    def fail():
        raise RuntimeError("the GPU has fallen off the bus")

    cuda.current.queue[0] = fail
    with pytest.raises(RuntimeError, match="fallen off"):
        transfer.result()


def test_on_the_host_there_is_nothing_to_copy():
    images = torch.arange(6, dtype=torch.uint8)
    assert begin_transfer(images, None).result().ctypes.data == images.data_ptr()
