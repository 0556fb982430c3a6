"""Graphs over generations on a GPU: the same bytes as without, from any stream and thread, in bounded memory."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from sign_fast import functional, models
from sign_fast.errors import SignFastError
from sign_fast.sampling.buckets import pad
from sign_fast.sampling.graphs import (
    GraphKey,
    GraphMemoryWarning,
    GraphRecaptureWarning,
    Graphs,
    generate_in_buckets,
)

if not torch.cuda.is_available():
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

STEPS = 3
MIB = 2**20


class Generation:
    """Three steps of a network of random weights, re-noising in between, to uint8."""

    def __init__(self, dtype=torch.float32, output="uint8", device="cuda"):
        torch.manual_seed(0)
        self.net = models.create("digits-uncond", dtype=dtype).eval().to(device)
        self.device = torch.device(device)
        with torch.no_grad():  # layers that start at zero would hide the others
            for parameter in self.net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        self.key = GraphKey(id(self), 0, ("recursive", STEPS), dtype, False, "torch", output)
        self.parameters = list(self.net.parameters())

    def watched(self):
        return self.net.parameters()

    def inputs(self, bucket, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (bucket, STEPS, self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
        draws = torch.randn(shape, generator=generator).to(self.device)
        return {"draws": draws, "sigmas": torch.tensor([2.5, 1.0, 0.3], device=self.device)}

    def __call__(self, inputs):
        draws, sigmas = inputs["draws"], inputs["sigmas"]
        x = torch.zeros_like(draws[:, 0])
        for step in range(STEPS):
            x = self.net(x + sigmas[step] * draws[:, step], sigmas[step])
        return functional.to_uint8(x) if self.key.output == "uint8" else x

    def run(self, graphs, bucket, seed=0, inputs=None):
        inputs = inputs if inputs is not None else self.inputs(bucket, seed)
        return graphs.run(replace(self.key, bucket=bucket), inputs, self, self.watched)

    def plainly(self, bucket, seed=0):
        with torch.no_grad():
            return self(self.inputs(bucket, seed))


@pytest.fixture
def graphs():
    made = Graphs("cuda")
    yield made
    torch.cuda.synchronize()
    made.clear()


@contextmanager
def nothing_synchronises():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("output", ["uint8", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bucket", [1, 4, 16])
def test_byte_identical_with_and_without(graphs, bucket, dtype, output, monkeypatch):
    generation = Generation(dtype, output)
    replays = [generation.run(graphs, bucket, seed) for seed in (0, 1, 0)]
    assert graphs.statistics()["captures"] == 1 and graphs.statistics()["replays"] == 3
    monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
    for seed, image in zip((0, 1, 0), replays, strict=True):
        assert torch.equal(image, generation.run(graphs, bucket, seed))
        assert torch.equal(image, generation.plainly(bucket, seed))
    assert graphs.statistics()["replays"] == 3
    assert not torch.equal(replays[0], replays[1])


@pytest.mark.parametrize("place", ["pageable", "pinned", "expanded"])
def test_inputs_from_elsewhere(graphs, place):
    generation = Generation()
    inputs = generation.inputs(4)
    if place == "expanded":
        inputs["draws"] = inputs["draws"][:1].expand_as(inputs["draws"])
    else:
        inputs = {name: t.cpu().pin_memory() if place == "pinned" else t.cpu() for name, t in inputs.items()}
    want = generation({name: t.cuda() for name, t in inputs.items()})
    for _ in range(2):
        assert torch.equal(generation.run(graphs, 4, inputs=inputs), want)


def test_padding_changes_no_image(graphs):
    generation = Generation()
    inputs = generation.inputs(8)
    full = generation.run(graphs, 8, inputs=inputs)
    part = generation.run(graphs, 8, inputs={**inputs, "draws": pad(inputs["draws"][:5], 8)})
    assert torch.equal(part[:5], full[:5])


def test_buckets_differ_by_a_level_at_most(graphs):
    generation = Generation()
    inputs = generation.inputs(16)
    full = generation.run(graphs, 16, inputs=inputs)
    for bucket in (1, 2, 4, 8):
        part = generation.run(graphs, bucket, inputs={**inputs, "draws": inputs["draws"][:bucket]})
        assert (part.int() - full[:bucket].int()).abs().max() <= 1


def test_streams_in_turn_without_the_host_waiting(graphs):
    generation = Generation()
    other = Graphs("cuda")  # shares the pool
    jobs = [(bucket, seed) for seed in range(8) for bucket in (1, 4, 16)]
    want = [generation.plainly(*job) for job in jobs]
    inputs = [generation.inputs(*job) for job in jobs]
    for made in (graphs, other):
        for bucket in (1, 4, 16):
            generation.run(made, bucket)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    got = []
    with nothing_synchronises():
        for index, ((bucket, _), tensors) in enumerate(zip(jobs, inputs, strict=True)):
            with torch.cuda.stream(streams[index % 4]):
                torch.cuda._sleep(200_000 * (index % 3))  # streams that would overtake each other
                got.append(generation.run((graphs, other)[index % 2], bucket, inputs=tensors))
    torch.cuda.synchronize()
    for image, expected in zip(got, want, strict=True):
        assert torch.equal(image, expected)
    other.clear()


def test_threads_with_streams_of_their_own():
    graphs = Graphs("cuda", max_graphs=2)  # captures and evictions while others replay
    generation = Generation()
    jobs = [(bucket, seed) for seed in range(3) for bucket in (1, 2, 4)]
    want = {job: generation.plainly(*job) for job in jobs}
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)
    wrong, errors = [], []

    def work(index):
        barrier.wait()
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for job in jobs[index:] + jobs[:index]:
                    if not torch.equal(generation.run(graphs, *job), want[job]):
                        wrong.append(job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong
    assert graphs.statistics()["replays"] == 4 * len(jobs)
    graphs.clear()


def test_a_thread_may_synchronise_while_another_captures(graphs):
    generation = Generation()
    done = threading.Event()
    errors = []

    def work():
        try:
            x = torch.ones(1000, device="cuda")
            while not done.is_set():
                assert (x * 2).sum().item() == 2000
                torch.empty(MIB, device="cuda")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for bucket in (1, 2, 4, 8):
            assert torch.equal(generation.run(graphs, bucket), generation.plainly(bucket))
    finally:
        done.set()
        thread.join()
    assert not errors


def test_no_synchronisation_and_no_allocation_from_launch_to_result(graphs):
    generation = Generation()
    inputs = generation.inputs(16)
    for _ in range(2):
        generation.run(graphs, 16, inputs=inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.ones(1, device="cuda")  # the profiler's own start
        torch.cuda.synchronize()
        with nothing_synchronises(), torch.profiler.record_function("generation"):
            image = generation.run(graphs, 16, inputs=inputs)
        torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for count in ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_sync_all_streams"):
        assert after.get(count, 0) == before.get(count, 0), count
    events = profile.events()
    region = next(e.time_range for e in events if e.name == "generation" and e.device_type.name == "CPU")
    calls = [e.name for e in events if region.start <= e.time_range.start and e.time_range.end <= region.end]
    assert sum(name.startswith("cudaGraphLaunch") for name in calls) == 1
    waiting = [name for name in calls if name.startswith("cuda") and ("Synchronize" in name or "Malloc" in name)]
    waiting += [name for name in calls if name.startswith(("cudaFree", "cudaHostAlloc")) or name == "cudaMemcpy"]
    assert not waiting
    assert torch.equal(image, generation.plainly(16))


def test_parameters_in_place_and_replaced(graphs):
    generation = Generation()
    first = generation.run(graphs, 4)
    with torch.no_grad():
        for parameter in generation.net.parameters():
            parameter.mul_(1.1)
    second = generation.run(graphs, 4)
    assert torch.equal(second, generation.plainly(4)) and not torch.equal(first, second)
    assert graphs.statistics()["captures"] == 1
    for parameter in generation.net.parameters():
        parameter.data = parameter.data.clone()
    with pytest.warns(GraphRecaptureWarning):
        assert torch.equal(generation.run(graphs, 4), second)
    assert graphs.statistics()["captures"] == 2 and graphs.statistics()["graphs"] == 1


def pools():
    """Bytes of all private pools on the GPU."""
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))


def test_clear_frees_the_memory(graphs):
    generation = Generation()
    generation.run(graphs, 256)  # cuBLAS takes its workspace for good
    torch.cuda.synchronize()
    graphs.clear()
    gc.collect()
    allocated, before = torch.cuda.memory_allocated(), pools()
    image = generation.run(graphs, 256)
    held = graphs.captured_bytes
    assert held == pools() - before + sum(t.nbytes for t in generation.inputs(256).values())
    assert held > image.nbytes
    del image
    torch.cuda.synchronize()
    graphs.clear()
    assert torch.cuda.memory_allocated() == allocated and pools() == before
    assert graphs.captured_bytes == 0


def test_eviction_bounds_the_memory():
    generation = Generation()
    graphs = Graphs("cuda", max_graphs=2)
    for bucket in (64, 32, 16, 8, 4, 2, 1):
        generation.run(graphs, bucket)
    torch.cuda.synchronize()
    assert graphs.statistics()["graphs"] == 2 and graphs.statistics()["evictions"] == 5
    held = graphs.captured_bytes
    for _ in range(3):  # what smaller graphs need lies in the pool already
        for bucket in (32, 16, 8, 4, 2, 1):
            assert torch.equal(generation.run(graphs, bucket), generation.plainly(bucket))
    assert graphs.statistics()["captures"] == 7 + 18
    assert graphs.captured_bytes <= held + 20 * MIB  # a segment of torch's allocator
    graphs.clear()


def test_graphs_that_go_while_they_run_harm_nobody():
    generation = Generation()
    want = generation.plainly(16)
    inputs = generation.inputs(16)
    for _ in range(5):
        graphs = Graphs("cuda")
        generation.run(graphs, 16, inputs=inputs)
        torch.cuda._sleep(5_000_000)
        image = generation.run(graphs, 16, inputs=inputs)
        del graphs
        torch.cuda.empty_cache()
        assert torch.equal(image, want)


class Hungry:
    """Takes 64 MiB an image; with `late`, in the capture only."""

    def __init__(self, late):
        self.late = late
        self.key = GraphKey(id(self), 0, "hungry", torch.float32, False, "torch", "float")

    def __call__(self, inputs):
        x = inputs["x"]
        if not self.late or torch.cuda.is_current_stream_capturing():
            x = x + torch.ones(x.shape[0], 16 * MIB, device=x.device)[:, :1]
        return x + 1


@pytest.mark.parametrize("late", [False, True])
def test_out_of_memory_falls_to_a_smaller_bucket(graphs, late):
    generation = Generation()
    generation.run(graphs, 4)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    function = Hungry(late)
    x = torch.randn(16, 1, device="cuda")

    def make_inputs(start, stop, bucket):
        return {"x": pad(x[start:stop], bucket)}

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 420 * MIB) / total)
    try:
        with pytest.warns(GraphMemoryWarning) as record:
            got = generate_in_buckets(graphs, 16, function.key, make_inputs, function, list)
        texts = [str(w.message).split(":")[0] for w in record if w.category is GraphMemoryWarning]
        assert texts == [f"not enough GPU memory for batches of {bucket}" for bucket in (16, 8)]
        assert graphs.largest(function.key) == 4
        again = generate_in_buckets(graphs, 16, function.key, make_inputs, function, list)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    want = (x + 1) + 1
    assert torch.equal(got, want) and torch.equal(again, want)
    assert torch.equal(generation.run(graphs, 4), generation.plainly(4))  # graphs from before still serve


def test_not_even_one_image_fits(graphs):
    graphs.run(replace(Hungry(True).key, bucket=1), {"x": torch.ones(1, 1, device="cuda")}, lambda i: i["x"] + 1, list)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    function = Hungry(False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 16 * MIB) / total)
    try:
        with pytest.raises(SignFastError, match="one image at a time"):
            graphs.run(replace(function.key, bucket=1), {"x": torch.ones(1, 1, device="cuda")}, function, list)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    ("named", "wait"),
    [
        ("aten::_local_scalar_dense (.item(), or the truth value of a tensor) synchronises", lambda x: x.sum().item()),
        ("aten::nonzero ", lambda x: x.nonzero().shape[0]),
        ("aten::_to_copy (a copy from cuda to cpu) synchronises", lambda x: x.cpu().numel()),
        ("torch.cuda.synchronize is not allowed in a CUDA graph", lambda x: torch.cuda.synchronize() or 1),
    ],
)
def test_a_network_that_synchronises_is_told_where(graphs, named, wait):
    generation = Generation()
    generation.run(graphs, 4)
    x = torch.ones(4, 8, device="cuda")
    key = replace(generation.key, plan="waits", bucket=4)
    current = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(SignFastError) as error:
            graphs.run(key, {"x": x}, lambda inputs: inputs["x"] * wait(inputs["x"] + 1), list)
        assert str(error.value).startswith(f"the network cannot be captured: {named}")
        assert f"{__file__}:" in str(error.value) and "SIGN_FAST_DISABLE_GRAPHS=1" in str(error.value)
    assert torch.cuda.current_stream() == current
    # neither the allocator nor other graphs noticed
    assert torch.equal(generation.run(graphs, 4), generation.plainly(4))
    assert torch.equal(generation.run(graphs, 8), generation.plainly(8))


def test_inside_a_capture_of_the_callers(graphs):
    generation = Generation()
    want = generation.run(graphs, 4)
    inputs = generation.inputs(4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image = generation.run(graphs, 4, inputs=inputs)
    graph.replay()
    assert torch.equal(image, want)
    assert graphs.statistics()["replays"] == 1


def test_a_forked_process_is_refused(graphs):
    generation = Generation()
    inputs = generation.inputs(1)
    generation.run(graphs, 1, inputs=inputs)
    torch.cuda.synchronize()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            generation.run(graphs, 1, inputs=inputs)
            os.write(writing, b"it ran")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().startswith("SignFastError: this process was forked")
    os.waitpid(child, 0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_graphs_each_gpu():
    both = [(Graphs(device), Generation(device=device)) for device in ("cuda:0", "cuda:1")]
    got = [generation.run(graphs, 4) for graphs, generation in both for _ in range(2)]
    assert [image.device.index for image in got] == [0, 0, 1, 1]
    for image, (_, generation) in zip(got[::2], both, strict=True):
        assert torch.equal(image, generation.plainly(4))
