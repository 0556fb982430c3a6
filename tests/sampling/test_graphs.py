"""Graphs over generations: everything that is decided on the host, with a stand-in for the capture."""

from __future__ import annotations

import os
import signal
import threading
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from sign_fast.errors import SignFastError
from sign_fast.sampling import graphs as module
from sign_fast.sampling.buckets import bucket_of, pad
from sign_fast.sampling.graphs import (
    BucketTooLarge,
    GraphKey,
    GraphMemoryWarning,
    GraphRecaptureWarning,
    Graphs,
    captured,
    generate_in_buckets,
)
from tests.stand_in_capture import StandIn

KEY = GraphKey(0, 4, ("heun", 2), torch.float32, False, "torch", "float")


class Network:
    """Two steps of a small network; counts how often Python runs it."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.layer = nn.Linear(3, 3)
        self.runs = 0

    def __call__(self, inputs):
        self.runs += 1
        x = inputs["x"] * inputs["scale"]
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))

    def watched(self):
        return self.layer.parameters()


def inputs_of(bucket, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(bucket, 3, generator=generator), "scale": torch.tensor(1.5)}


def make(**options):
    graphs = Graphs("cpu", capture=StandIn, **options)
    return graphs, graphs._capture


def run(graphs, network, bucket=4, seed=0, key=KEY, **options):
    return graphs.run(replace(key, bucket=bucket), inputs_of(bucket, seed), network, network.watched, **options)


def plainly(network, bucket=4, seed=0):
    return plainly_with(network, inputs_of(bucket, seed))


@torch.no_grad()
def plainly_with(network, inputs):
    return network(inputs)


def test_a_replay_reads_its_inputs_and_runs_no_python():
    graphs, _ = make()
    network = Network()
    assert torch.equal(run(graphs, network), plainly(network))
    runs = network.runs
    images = [run(graphs, network, seed=seed) for seed in range(3)]
    assert network.runs == runs
    for seed, image in enumerate(images):  # each the caller's own: later replays left it alone
        assert torch.equal(image, plainly(network, seed=seed))
    assert torch.equal(run(graphs, network, seed=5, rows=3), plainly(network, seed=5)[:3])
    assert not images[0].requires_grad
    assert graphs.statistics() | {"bytes": None} == {
        "device": "cpu",
        "graphs": 1,
        "replays": 5,
        "captures": 1,
        "evictions": 0,
        "bytes": None,
    }


def test_a_graph_made_in_inference_mode_serves_outside_of_it():
    graphs, _ = make()
    network = Network()
    with torch.inference_mode():
        inside = run(graphs, network)
    assert torch.equal(run(graphs, network), inside)
    assert torch.equal(run(graphs, network, seed=1), plainly(network, seed=1))


@pytest.mark.parametrize(
    "change",
    [
        {"network": 1},
        {"plan": ("heun", 3)},
        {"dtype": torch.bfloat16},
        {"conditional": True},
        {"noise": "philox"},
        {"output": "uint8"},
    ],
)
def test_every_part_of_the_key_counts(change):
    graphs, _ = make()
    network = Network()
    run(graphs, network)
    run(graphs, network, key=replace(KEY, **change))
    assert graphs.statistics()["captures"] == 2
    run(graphs, network)
    run(graphs, network, key=replace(KEY, **change))
    assert graphs.statistics()["captures"] == 2


def test_shapes_dtypes_and_settings_of_torch_belong_to_a_graph():
    graphs, _ = make()
    network = Network()
    run(graphs, network)
    wider = {**inputs_of(4), "scale": torch.full((4, 3), 1.5)}
    graphs.run(KEY, wider, network, network.watched)
    assert graphs.statistics()["captures"] == 2
    torch.backends.cudnn.deterministic = True
    try:
        run(graphs, network)
    finally:
        torch.backends.cudnn.deterministic = False
    assert graphs.statistics()["captures"] == 3
    run(graphs, network)
    assert graphs.statistics()["captures"] == 3
    sizes = graphs.statistics()["bytes"]  # per key: output and inputs of all three
    assert sizes == {KEY: 3 * 48 + 2 * (48 + 4) + (48 + 48)}
    assert graphs.captured_bytes == sizes[KEY]


def test_the_function_gets_contiguous_inputs_graphs_or_not(monkeypatch):
    seen = []

    def function(inputs):
        seen.append(inputs["x"].is_contiguous())
        return inputs["x"] + 1

    transposed = torch.randn(3, 4).t()
    for switch in ("0", "1"):
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", switch)
        assert torch.equal(make()[0].run(KEY, {"x": transposed}, function, list), transposed + 1)
    assert len(seen) > 3 and all(seen)


def test_the_least_recently_used_graph_gives_way():
    graphs, capture = make(max_graphs=2)
    network = Network()
    for bucket in (1, 2, 1, 4):  # 2 goes
        run(graphs, network, bucket)
    assert graphs.statistics()["captures"] == 3 and graphs.statistics()["evictions"] == 1
    assert [key.bucket for key in graphs.statistics()["bytes"]] == [1, 4]
    run(graphs, network, 1)
    assert graphs.statistics()["captures"] == 3
    assert torch.equal(run(graphs, network, 2), plainly(network, 2))  # 4 goes
    assert graphs.statistics()["captures"] == 4 and graphs.statistics()["evictions"] == 2
    assert len(capture.live) == 2
    assert graphs.captured_bytes == sum(12 * b + 12 * b + 4 for b in (1, 2))


def test_clear_gives_up_everything():
    graphs, capture = make()
    run(graphs, Network())
    graphs.clear()
    assert not capture.live and capture.releases == 1 and graphs.captured_bytes == 0
    graphs.clear()  # nothing left to do


def test_constant_inputs_are_copied_when_they_changed():
    graphs, _ = make()
    network, inputs = Network(), inputs_of(4)

    def replay(inputs):
        return graphs.run(KEY, inputs, network, network.watched, constant=("scale",))

    first = replay(inputs)
    inputs["scale"].data.fill_(7.0)  # past the count of writes, which is how the test sees that nothing is copied
    assert torch.equal(replay(inputs), first)
    changed = replay({**inputs, "scale": torch.tensor(7.0)})
    assert not torch.equal(changed, first) and torch.equal(changed, plainly_with(network, inputs))
    inputs["scale"].fill_(3.0)
    assert torch.equal(replay(inputs), plainly_with(network, inputs))
    inputs["scale"].fill_(5.0)
    assert torch.equal(replay(inputs), plainly_with(network, inputs))
    assert graphs.statistics()["captures"] == 1


def test_constant_inputs_made_in_inference_mode():
    graphs, _ = make()
    network = Network()
    with torch.inference_mode():
        inputs = inputs_of(4)
        for _ in range(2):
            image = graphs.run(KEY, inputs, network, network.watched, constant=("scale",))
    assert torch.equal(image, plainly_with(network, inputs))


def test_parameters_written_in_place_count():
    graphs, _ = make()
    network = Network()
    run(graphs, network)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        network.layer.weight.mul_(2)
        network.layer.load_state_dict({name: 2 * t for name, t in network.layer.state_dict().items()})
        image = run(graphs, network)
    assert torch.equal(image, plainly(network))
    assert graphs.statistics()["captures"] == 1


def test_replaced_parameters_are_captured_again_with_one_warning():
    graphs, capture = make()
    network = Network()
    before = run(graphs, network)
    network.layer.weight = nn.Parameter(2 * network.layer.weight.detach())
    with pytest.warns(GraphRecaptureWarning, match="replaced") as record:
        image = run(graphs, network)
        network.layer.bias.data = network.layer.bias.data + 1
        again = run(graphs, network)
    assert len(record) == 1
    assert torch.equal(again, plainly(network))
    assert not torch.equal(before, image) and not torch.equal(image, again)
    assert graphs.statistics()["captures"] == 3 and len(capture.live) == 1


@pytest.mark.parametrize("how", ["switch", "inside a capture of the caller's"])
def test_without_graphs_the_images_are_the_same(how, monkeypatch):
    graphs, capture = make()
    network = Network()
    want = run(graphs, network, rows=3)
    if how == "switch":
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")  # read at the call
    else:
        capture.in_callers_capture = True
    runs = network.runs
    assert torch.equal(run(graphs, network, rows=3), want)
    assert network.runs == runs + 1
    assert graphs.statistics()["replays"] == 1


def out_of_memory(inputs, most):
    if inputs["x"].shape[0] > most:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


class Hungry(Network):
    """Runs out of memory above a batch of `most`, in warm-up, or only in the capture."""

    def __init__(self, most, capture=None):
        super().__init__()
        self.most, self.capture = most, capture
        self.seen = []

    def __call__(self, inputs):
        if self.capture is None or self.capture.recording:
            self.seen.append(inputs["x"].shape[0])
            taken = torch.empty(8)
            self.taken = weakref.ref(taken), weakref.ref(inputs["x"])
            out_of_memory(inputs, self.most)
        return super().__call__(inputs)


@pytest.mark.parametrize("where", ["warm-up", "capture", "no graphs"])
def test_out_of_memory_falls_to_the_next_smaller_bucket(where, monkeypatch):
    graphs, capture = make()
    if where == "no graphs":
        monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
    network = Hungry(2, capture if where == "capture" else None)
    alive = []
    capture.on_release = lambda: alive.append([ref() is not None for ref in network.taken])
    with pytest.warns(GraphMemoryWarning) as record:
        image = generate(graphs, network, 8)
    assert [str(w.message).split(":")[0] for w in record] == [
        "not enough GPU memory for batches of 8",
        "not enough GPU memory for batches of 4",
    ]
    assert "going on with 4 (" in str(record[0].message) and "more" not in str(record[0].message)
    assert alive == [[False, False]] * 2  # what the attempt took was free when it was handed back
    assert torch.equal(image, generate_plainly(network, 8, 2))
    assert network.seen[:2] == [8, 4] and set(network.seen[2:]) == {2}
    network.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(graphs, network, 8)  # remembered
        with pytest.raises(BucketTooLarge):
            run(graphs, network, 4)
    assert set(network.seen) <= {2} and graphs.largest(KEY) == 2
    assert graphs.largest(replace(KEY, network=1)) == 512
    assert len(capture.live) == (where != "no graphs")
    graphs.clear()
    assert graphs.largest(KEY) == 512


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory\nmore", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_other_names_of_an_exhausted_memory(text):
    def function(inputs):
        raise RuntimeError(text)

    with pytest.warns(GraphMemoryWarning, match="going on with 2"), pytest.raises(BucketTooLarge):
        make()[0].run(KEY, inputs_of(4), function, list)


def test_not_even_one_image_fits():
    graphs, _ = make()
    with pytest.warns(GraphMemoryWarning), pytest.raises(SignFastError, match="bfloat16") as error:
        generate(graphs, Hungry(0), 2)
    assert "\n" not in str(error.value)
    with pytest.raises(SignFastError, match="one image at a time"):
        generate(graphs, Hungry(0), 2)


def test_errors_of_the_function_are_its_own():
    def function(inputs):
        raise RuntimeError("shapes do not match")

    graphs, capture = make()
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        graphs.run(KEY, inputs_of(4), function, list)
    assert not capture.live
    assert torch.equal(run(graphs, network := Network()), plainly(network))  # the turn is over


def test_a_network_that_synchronises_is_told_where():
    def function(inputs):
        x = inputs["x"] + 1
        return x * x.sum().item()  # here

    graphs, capture = make()
    line = function.__code__.co_firstlineno + 2
    with pytest.raises(SignFastError) as error:
        graphs.run(KEY, inputs_of(4), function, list)
    assert str(error.value) == (
        "the network cannot be captured: aten::_local_scalar_dense (.item(), or the truth value of a tensor) "
        f"synchronises at {__file__}:{line}; remove it or set SIGN_FAST_DISABLE_GRAPHS=1"
    )
    assert capture.attempts == 2 and not capture.live
    assert graphs.largest(KEY) == 512


def test_a_capture_that_fails_for_no_known_reason_says_what_torch_said():
    class Refusing(StandIn):
        def record(self, function):
            raise RuntimeError("CUDA error: operation not permitted\nmore")

    graphs = Graphs("cpu", capture=Refusing)
    with pytest.raises(SignFastError, match=r"captured: CUDA error: operation not permitted; mend it or set SIGN_FAST"):
        run(graphs, Network())


def generate(graphs, network, count):
    x = inputs_of(count)["x"]

    def make_inputs(start, stop, bucket):
        return {"x": pad(x[start:stop], bucket), "scale": torch.tensor(1.5)}

    return generate_in_buckets(graphs, count, KEY, make_inputs, network, network.watched)


def generate_plainly(network, count, bucket):
    x, parts = inputs_of(count)["x"], []
    with torch.no_grad():
        for start in range(0, count, bucket):
            part = x[start : start + bucket]
            part = torch.cat([part] + [part[-1:]] * (bucket - len(part)))
            parts.append(Network.__call__(network, {"x": part, "scale": torch.tensor(1.5)}))
    return torch.cat(parts)[:count]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_batches_in_buckets(count):
    graphs, _ = make(largest_bucket=4)
    network = Network()
    buckets = [bucket_of(min(4, count - start), 4) for start in range(0, count, 4)]
    images = generate(graphs, network, count)
    assert images.shape == (count, 3)
    assert sorted(key.bucket for key in graphs.statistics()["bytes"]) == sorted(set(buckets))
    assert torch.equal(
        images, torch.cat([generate_plainly(network, count, 4)[: count // 4 * 4], images[count // 4 * 4 :]])
    )
    assert torch.allclose(images, plainly(network, count), atol=1e-6)


def test_padding_changes_no_image_of_its_bucket():
    graphs, _ = make()
    network = Network()
    x = inputs_of(4)["x"]
    full = graphs.run(KEY, {"x": x, "scale": torch.tensor(1.5)}, network, network.watched)
    padded = graphs.run(KEY, {"x": pad(x[:3], 4), "scale": torch.tensor(1.5)}, network, network.watched, rows=3)
    assert torch.equal(padded, full[:3])
    assert graphs.statistics()["captures"] == 1


def test_many_threads_get_what_one_gets():
    graphs, capture = make(max_graphs=3)  # fewer than the buckets: evictions in between
    network = Network()
    jobs = [(bucket, seed) for seed in range(6) for bucket in (1, 2, 4, 8)]
    want = {job: plainly(network, *job) for job in jobs}
    barrier = threading.Barrier(8)
    wrong, errors = [], []

    def work(index):
        barrier.wait()
        try:
            for job in jobs[index % 4 :] + jobs[: index % 4]:
                if not torch.equal(run(graphs, network, *job), want[job]):
                    wrong.append(job)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not wrong
    statistics = graphs.statistics()
    assert statistics["replays"] == 8 * len(jobs) and statistics["graphs"] == 3 == len(capture.live)
    assert statistics["captures"] - statistics["evictions"] == 3


def test_one_capture_for_threads_that_come_together():
    graphs, _ = make()
    network = Network()
    barrier = threading.Barrier(6)

    def work():
        barrier.wait()
        run(graphs, network)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graphs.statistics()["captures"] == 1 and graphs.statistics()["replays"] == 6


def in_child(function):
    """What `function` returns in a forked process, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = str(function())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_a_forked_process_does_not_use_the_parents_graphs():
    graphs, _ = make()
    network = Network()
    run(graphs, network)
    assert in_child(lambda: run(graphs, network)).startswith("SignFastError: this process was forked")
    assert in_child(graphs.clear).startswith("SignFastError: this process was forked")
    assert in_child(lambda: (graphs.captured_bytes, graphs.statistics()["graphs"])) == "(0, 0)"


def test_a_forked_process_may_start_its_own():
    graphs, _ = make()
    network = Network()
    held, done = threading.Event(), threading.Event()

    def work():
        with graphs._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=work)  # which the child does not have, but its lock
    thread.start()
    held.wait()
    answer = in_child(lambda: signal.alarm(20) or torch.equal(run(graphs, network), plainly(network)))
    done.set()
    thread.join()
    assert answer == "True"


def test_what_is_captured_in_the_process():
    graphs, _ = make()
    run(graphs, Network())
    mine = [entry for entry in captured() if entry["bytes"] == graphs.statistics()["bytes"] and entry["graphs"]]
    assert mine and mine[0]["captured_bytes"] == graphs.captured_bytes == 2 * 48 + 4
    count = len(module._all)
    del graphs
    assert len(module._all) == count - 1  # it went at once: nothing holds it in a cycle


def test_buckets():
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 511, 512, 513, 5000)] == [1, 2, 4, 4, 8, 512, 512, 512, 512]
    assert bucket_of(9, 8) == 8
    with pytest.raises(ValueError, match="at least one image, not 0"):
        bucket_of(0)


def test_pad_repeats_the_last_row():
    x = torch.arange(6).reshape(3, 2)
    assert pad(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    assert pad(x, 4, dim=1).tolist() == [[0, 1, 1, 1], [2, 3, 3, 3], [4, 5, 5, 5]]
    assert pad(x, 3) is x


@pytest.mark.parametrize("options", [{"max_graphs": 0}, {"largest_bucket": 48}, {"largest_bucket": 0}])
def test_bad_limits(options):
    with pytest.raises(ValueError):
        make(**options)


def test_cuda_graphs_need_a_cuda_device():
    with pytest.raises(ValueError, match="not on cpu"):
        Graphs("cpu")
