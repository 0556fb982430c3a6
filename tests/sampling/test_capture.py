"""In which order `CudaCapture` calls CUDA, and what it gives up where a capture fails; torch.cuda is a fake here."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from sign_fast.sampling import capture as module
from sign_fast.sampling.capture import CudaCapture


class Cuda:
    """The parts of torch.cuda that capture uses; `log` lists the calls in order."""

    def __init__(self):
        self.log = []
        self.stream_now = self.Stream("caller's")
        self.handles = 0
        self.ends_badly = False
        self.allocating = set()  # pools that the allocator serves a capture from

    class Stream:
        def __init__(self, name="side"):
            self.name = name

    def patch(self, monkeypatch):
        cuda = self

        class Stream(Cuda.Stream):
            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for {event.name}")

            def wait_stream(self, stream):
                cuda.log.append(f"{self.name} waits for {stream.name}")

        class Event:
            name = "free"

            def record(self, stream):
                cuda.log.append(f"{self.name} on {stream.name}")

            def synchronize(self):
                cuda.log.append(f"host waits for {self.name}")

        class CUDAGraph:
            def replay(self):
                cuda.log.append(f"replay on {cuda.stream_now.name}")

            def reset(self):
                cuda.log.append("reset")

            def pool(self):
                return self.handle

        class Graph:
            def __init__(self, graph, pool, stream, capture_error_mode):
                assert capture_error_mode == "thread_local" and cuda.stream_now is stream
                self.graph, self.pool = graph, pool

            def __enter__(self):
                assert self.pool not in cuda.allocating, "already recording to the pool"
                cuda.allocating.add(self.pool)
                self.graph.handle = self.pool
                cuda.log.append(f"capture into {self.pool[1]}")

            def __exit__(self, kind, value, traceback):
                if value is not None and cuda.ends_badly:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.allocating.discard(self.pool)

        @contextmanager
        def stream(stream):
            before, cuda.stream_now = cuda.stream_now, stream
            try:
                yield
            finally:
                cuda.stream_now = before

        @contextmanager
        def device(index):
            yield

        def graph_pool_handle():
            cuda.handles += 1
            return (0, cuda.handles)

        def end(index, pool):
            if pool not in cuda.allocating:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            cuda.allocating.discard(pool)

        self.stream_now = Stream("caller's")
        fakes = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": Graph,
            "stream": stream,
            "device": device,
            "graph_pool_handle": graph_pool_handle,
            "current_stream": lambda: cuda.stream_now,
            "current_device": lambda: 0,
            "memory_snapshot": lambda pool: [{"total_size": 10 ** pool[1]}],
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda index, pool: cuda.log.append(f"release {pool[1]}"), raising=False
        )
        monkeypatch.setattr(module, "_devices", {})
        return self


@pytest.fixture
def cuda(monkeypatch):
    return Cuda().patch(monkeypatch)


def record(capture, function=lambda: torch.zeros(1)):
    with capture.turn(), capture.aside():
        return capture.record(function)


def test_a_turn_waits_for_the_last_one_on_the_device(cuda):
    capture = CudaCapture(torch.device("cuda"))
    recording = record(capture)
    assert cuda.log == [
        "caller's waits for free",
        "side waits for caller's",
        "capture into 1",
        "caller's waits for side",
        "free on caller's",
        "side waits for free",
    ]
    cuda.log.clear()
    with capture.turn():
        recording.replay()
    assert cuda.log == ["caller's waits for free", "replay on caller's", "free on caller's", "side waits for free"]
    cuda.log.clear()
    with pytest.raises(KeyError), capture.turn():
        raise KeyError
    assert cuda.log[-2:] == ["free on caller's", "side waits for free"]


def test_a_graph_is_reset_when_it_no_longer_runs(cuda):
    recording = record(CudaCapture(torch.device("cuda:0")))
    cuda.log.clear()
    recording.reset()
    assert cuda.log == ["host waits for free", "reset"] and not hasattr(recording, "output")


def test_graphs_of_a_device_share_a_pool_that_is_in_use(cuda):
    one, other = CudaCapture(torch.device("cuda")), CudaCapture(torch.device("cuda:0"))
    assert one.reserved() == 0 and not cuda.log
    first, second = record(one), record(other)
    assert first.pool == second.pool == (0, 1)
    assert one.reserved() == other.reserved() == 10
    first.reset()
    assert record(one).pool == (0, 1)
    second.reset()  # and the last one is gone at once: nothing uses pool 1
    third = record(one)
    assert third.pool == (0, 2) and one.reserved() == 100
    assert record(CudaCapture(torch.device("cuda:1"))).pool == (0, 3)


def failing():
    raise RuntimeError("out of memory")


def test_a_failed_capture_that_could_be_ended(cuda):
    capture = CudaCapture(torch.device("cuda"))
    kept = record(capture)
    with pytest.raises(RuntimeError, match="out of memory"):
        record(capture, failing)
    assert cuda.log.count("reset") == 1 and not capture._device.failed
    assert cuda.stream_now.name == "caller's"
    assert record(capture).pool == kept.pool


def test_a_failed_capture_that_could_not_be_ended(cuda):
    capture = CudaCapture(torch.device("cuda"))
    kept = record(capture)
    cuda.ends_badly = True
    with pytest.raises(RuntimeError, match="previous error"):
        record(capture, failing)
    assert "release 1" in cuda.log and not cuda.allocating  # the allocator is out of the capture
    assert len(capture._device.failed) == 1
    assert cuda.stream_now.name == "caller's"
    cuda.ends_badly = False
    later = record(capture)
    assert later.pool == (0, 2) != kept.pool
    assert capture.reserved() == 10 + 100


def test_an_interrupted_capture_is_given_up(cuda):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(CudaCapture(torch.device("cuda")), interrupted)
    assert "reset" in cuda.log and not cuda.allocating


def test_turns_of_a_device_exclude_each_other(cuda):
    one, other = CudaCapture(torch.device("cuda:0")), CudaCapture(torch.device("cuda:0"))
    inside = []

    def work():
        with other.turn():
            inside.append(1)

    thread = threading.Thread(target=work)
    with one.turn():
        thread.start()
        thread.join(0.05)
        assert not inside
        with other.turn():  # the thread's own: a finaliser in the middle of a turn
            pass
    thread.join()
    assert inside
