"""The engine's way through graphs, with a stand-in for the capture: what is captured, what are its inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from sign_fast import models, optimize
from sign_fast.errors import SignFastError
from sign_fast.inference import conditioning
from sign_fast.sampling.engine import Engine
from sign_fast.sampling.graphs import GraphMemoryWarning, GraphRecaptureWarning, Graphs
from tests.network_cases import network
from tests.stand_in_capture import StandIn

SEEDS = [7, 0, 123456789012, 5]
CHURN = {"S_churn": 2.0, "S_noise": 1.01}
EULER = {"solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp"}
CASES = [
    ("edm", 2, {}),
    ("edm", 2, CHURN),
    ("ablation", 2, {"S_churn": 1.0, "alpha": 0.5}),
    ("ablation", 2, EULER),
    ("one_step", 1, {}),
    ("few_step", 3, {}),
]
STUDENT_CASES = [("recursive", 3, {}), ("multistep", 3, {"noise_levels": [0.5, 0.2]})]


class Denoiser(nn.Module):
    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 6, 3, 4, 0.01, 50.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.classes = nn.Linear(4, 3)
        self.calls = 0

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        self.calls += 1
        y = self.layer((x / (1 + sigma**2).sqrt()).float()) + self.classes(class_labels)[:, :, None, None]
        return y.tanh()


def in_python(net):
    """An inference copy without its C++ program, whose kernels for float32 a stand-in cannot see."""
    net = optimize(net)
    net.native = None
    return net


MAKES = {
    "float32": lambda: in_python(network("ddpmpp")),
    "float32-labels": lambda: in_python(network("ddpmpp-cond")),
    "bfloat16": lambda: optimize(network("ddpmpp"), torch.bfloat16),
    "bfloat16-labels": lambda: optimize(network("ddpmpp-cond"), torch.bfloat16),
    "iddpm": lambda: in_python(network("skip-iddpm")),
    "own": Denoiser,
}


class Captured(Engine):
    """An engine that takes the way of CUDA."""

    _is_captured = True

    def __init__(self, net, noise="torch", **options):
        super().__init__(net, noise=noise)
        self._graphs = Graphs("cpu", capture=StandIn, **options)

    @property
    def captures(self):
        return self.graphs.statistics()["captures"]

    def constants(self):
        """What the graphs read besides their inputs, by address."""
        traces = [recording.trace for recording in self.graphs._capture.live]
        read = [getattr(t, node.target) for t in traces for node in t.graph.nodes if node.op == "get_attr"]
        inputs = {t.data_ptr() for graph in self.graphs._graphs.values() for t in graph.inputs.values()}
        return {t.untyped_storage().data_ptr() for t in read if t.data_ptr() not in inputs}


def check(engine, plain, case, seeds=SEEDS, labels=None, outputs=("uint8",)):
    sampler, steps, options = case
    for output in outputs:
        got = engine.generate(seeds, sampler, steps, labels, output, **options)
        assert torch.equal(got, plain.generate(seeds, sampler, steps, labels, output, **options)), (case, output)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_byte_identical_and_nothing_is_read_but_inputs_and_what_is_watched(make, noise, table, monkeypatch):
    if not table:
        monkeypatch.setattr(conditioning, "_TABLE_BYTES", 0)
    net = make()
    engine, plain = Captured(net, noise), Engine(net, noise=noise)
    if make is Denoiser:
        for case in CASES:
            check(engine, plain, case, outputs=("uint8", "float"))
    else:
        check(engine, plain, ("edm", 1, CHURN) if table else ("few_step", 2, {}))
    watched = {t.untyped_storage().data_ptr() for t in engine._watched()}
    assert engine.constants() and engine.constants() <= watched


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", ["ddpmpp", "ddpmpp-cond"])
def test_students_without_a_time_input(name, noise):
    student = models.IdempotentPrecond.from_teacher(network(name), sigma=5.0).eval()
    net = optimize(student, torch.bfloat16)
    engine, plain = Captured(net, noise), Engine(net, noise=noise)
    for case in STUDENT_CASES:
        check(engine, plain, case)
    assert engine.constants() <= {t.untyped_storage().data_ptr() for t in engine._watched()}


@pytest.mark.parametrize("make", [MAKES["bfloat16-labels"], MAKES["float32-labels"], Denoiser])
def test_seeds_labels_and_step_sizes_are_inputs(make):
    net = make()
    engine, plain = Captured(net), Engine(net)
    check(engine, plain, ("edm", 2, CHURN))
    for case in (("edm", 2, {**CHURN, "rho": 3}), ("edm", 2, {"S_churn": 1.0, "sigma_max": 20.0, "sigma_min": 0.1})):
        check(engine, plain, case)
        check(engine, plain, case, [1, 2, 3, 4])
        check(engine, plain, case, labels=[3 % net.label_dim, 0, 1, 1])
    check(engine, plain, ("edm", 2, CHURN))
    assert engine.captures == 1
    check(engine, plain, ("edm", 2, {}))  # without noise of its own: another structure
    assert engine.captures == 2
    check(engine, plain, ("few_step", 1, {}))
    check(engine, plain, ("one_step", 1, {"sigma": 1.0}))  # the same structure
    assert engine.captures == 3


def test_padded_batches(monkeypatch):
    net = MAKES["bfloat16-labels"]()
    engine, plain = Captured(net, largest_bucket=4), Engine(net)
    seeds = [3, 1, 4, 15, 9, 2, 6]
    whole = plain.generate(seeds[:4], "edm", 2, None, **CHURN)
    rest = plain.generate([*seeds[4:], 8], "edm", 2, None, **CHURN)
    images = engine.generate(seeds, "edm", 2, None, **CHURN)
    assert torch.equal(images, torch.cat([whole, rest[:3]]))
    assert engine.captures == 1  # three images fill a bucket of four
    monkeypatch.setenv("SIGN_FAST_DISABLE_GRAPHS", "1")
    replays = engine.graphs.statistics()["replays"]
    assert torch.equal(engine.generate(seeds, "edm", 2, None, **CHURN), images)
    assert engine.graphs.statistics()["replays"] == replays == 2


@pytest.mark.parametrize("table", [True, False])
def test_update_in_place_keeps_the_graph(table, monkeypatch):
    if not table:
        monkeypatch.setattr(conditioning, "_TABLE_BYTES", 0)
    engine = Captured(optimize(network("ddpmpp-cond"), torch.bfloat16))
    first = engine.generate(SEEDS, "edm", 2, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.net.update(network("ddpmpp-cond", seed=2))
        second = engine.generate(SEEDS, "edm", 2, None)
    want = Engine(network("ddpmpp-cond", seed=2), dtype=torch.bfloat16).generate(SEEDS, "edm", 2, None)
    assert torch.equal(second, want) and not torch.equal(second, first)
    engine.net.load_state_dict(optimize(network("ddpmpp-cond"), torch.bfloat16).state_dict())
    assert torch.equal(engine.generate(SEEDS, "edm", 2, None), first)
    assert engine.captures == 1


def test_conditioning_that_was_forgotten_and_made_again():
    net = optimize(network("ddpmpp-cond"), torch.bfloat16)
    engine, plain = Captured(net), Engine(net)
    for rho in (3, 4, 3, 4):
        check(engine, plain, ("edm", 2, {"rho": rho}))
        net._cache.clear()
        engine._plans.clear()
    assert engine.captures == 1


def test_replaced_parameters_are_captured_again_with_one_warning():
    net = Denoiser()
    engine = Captured(net)
    first = engine.generate(SEEDS, "few_step", 2, None)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        net.layer.weight.mul_(2)
        assert torch.equal(
            engine.generate(SEEDS, "few_step", 2, None), Engine(net).generate(SEEDS, "few_step", 2, None)
        )
    assert engine.captures == 1
    net.layer.weight = nn.Parameter(torch.randn_like(net.layer.weight))
    with pytest.warns(GraphRecaptureWarning, match="captured again"):
        second = engine.generate(SEEDS, "few_step", 2, None)
    assert torch.equal(second, Engine(net).generate(SEEDS, "few_step", 2, None)) and not torch.equal(second, first)
    net.layer = nn.Conv2d(3, 3, 3, padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        third = engine.generate(SEEDS, "few_step", 2, None)
    assert torch.equal(third, Engine(net).generate(SEEDS, "few_step", 2, None))
    assert engine.captures == 3 and engine.graphs.statistics()["graphs"] == 1


def test_weights_put_in_the_place_of_an_inference_copys():
    engine = Captured(optimize(network("ddpmpp-cond"), torch.bfloat16))
    engine.generate(SEEDS, "few_step", 2, None)
    other = optimize(network("ddpmpp-cond", seed=2), torch.bfloat16)
    engine.net.load_state_dict(other.state_dict(), assign=True)
    with pytest.warns(GraphRecaptureWarning):
        got = engine.generate(SEEDS, "few_step", 2, None)
    assert torch.equal(got, Engine(other).generate(SEEDS, "few_step", 2, None))


@pytest.mark.parametrize("make", [Denoiser, MAKES["bfloat16-labels"]])
def test_in_and_out_of_inference_mode(make):
    net = make()
    engine = Captured(net)
    want = Engine(net).generate(SEEDS, "edm", 2, None)
    with torch.inference_mode():
        inside = engine.generate(SEEDS, "edm", 2, None)
    assert torch.equal(inside, want) and torch.equal(engine.generate(SEEDS, "edm", 2, None), want)
    assert engine.captures == 1


def test_a_replay_calls_no_network():
    net = Denoiser()
    engine = Captured(net)
    engine.generate(SEEDS, "edm", 2, None)
    calls = net.calls
    for seed in range(3):
        engine.generate([seed + i for i in range(4)], "edm", 2, [1, 2, 3, 0])
    assert net.calls == calls


def test_out_of_memory_falls_to_smaller_buckets():
    class Hungry(Denoiser):
        def forward(self, x, sigma, class_labels=None):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.\nmore")
            return super().forward(x, sigma, class_labels)

    engine = Captured(Hungry())
    seeds = list(range(7))
    with pytest.warns(GraphMemoryWarning) as record:
        images = engine.generate(seeds, "few_step", 2, None)
    assert [str(w.message).split(":")[0] for w in record] == [
        f"not enough GPU memory for batches of {b}" for b in (8, 4)
    ]
    plain = Engine(Denoiser())
    want = [plain.generate(part, "few_step", 2, None) for part in ([0, 1], [2, 3], [4, 5], [6])]
    assert torch.equal(images[:6], torch.cat(want[:3])) and torch.equal(images[6:], want[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.generate(seeds, "few_step", 2, None), images)


def test_a_network_that_synchronises_is_told_where():
    class Waits(Denoiser):
        def forward(self, x, sigma, class_labels=None):
            return super().forward(x, sigma, class_labels) * (1 if x.sum().item() > 0 else 2)

    with pytest.raises(SignFastError, match=r"_local_scalar_dense.*test_engine_graphs\.py:"):
        Captured(Waits()).generate(SEEDS, "few_step", 1, None)


def test_engines_and_outputs_share_no_graph():
    nets = [MAKES["bfloat16"](), MAKES["float32"]()]
    graphs = Graphs("cpu", capture=StandIn)
    engines = [Captured(net, noise) for net in nets for noise in ("torch", "philox")]
    for engine in engines:
        engine._graphs = graphs
        for output in ("uint8", "float"):
            engine.generate(SEEDS, "few_step", 2, None, output)
    keys = [graph.key for graph in graphs._graphs.values()]
    assert len(keys) == len(set(keys)) == graphs.statistics()["captures"] == 8
    assert len({replace(key, output="") for key in keys}) == 4
