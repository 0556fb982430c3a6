"""The engine of latent students: golden numbers by both loops, and its way through graphs with a stand-in capture."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from sign_fast.errors import SignFastError
from sign_fast.integrations.diffusers.parts import LatentScale, Predictor
from sign_fast.integrations.diffusers.state import python_state
from sign_fast.sampling.buckets import thrifty_bucket_of
from sign_fast.sampling.graphs import GraphMemoryWarning, GraphRecaptureWarning, Graphs
from sign_fast.sampling.latent_engine import LatentEngine
from sign_fast.sampling.plan import Plan
from sign_fast.sampling.students import few_step_latent
from sign_fast.sampling.synchronising import find_synchronising
from sign_fast.sampling.text import TextConditioning
from tests.golden_rules import OUTPUT_TOLERANCE, arrays, filled, normal, relative_error, settings
from tests.integrations.diffusers import tiny
from tests.stand_in_capture import StandIn, TapeStandIn

TEXT = TextConditioning(normal(1, 3, 8, 16))
LATENTS = normal(21, 3, 4, 8, 8)


def counted(first):
    """The i-th call draws N(first + i)."""
    calls = iter(range(first, first + 100))
    next(calls)
    return lambda x: normal(next(calls), *x.shape)


class Captured(LatentEngine):
    """An engine that takes the way of CUDA."""

    _is_captured = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._graphs = Graphs("cpu", capture=StandIn)

    @property
    def counts(self):
        return {name: self.graphs.statistics()[name] for name in ("captures", "replays", "graphs")}


class Network(nn.Module):
    """A network small enough to capture often, that reads all that it is given."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.words = nn.Linear(16, 4)
        self.calls = []

    def forward(self, x, t, text):
        self.calls.append((tuple(x.shape), t.dtype))
        y = self.layer(x) + self.words(text.states.mean(1))[:, :, None, None] + (t / 1000).float()[:, None, None, None]
        if text.pooled is not None:
            y = y + text.pooled.mean(1)[:, None, None, None] + text.time_ids.sum(1)[:, None, None, None] / 1000
        return self.scale * y.tanh()


def decode(latents):
    return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3) / 2


def pair(**options):
    """An engine that captures and one that does not, of one network."""
    net = Network()
    return net, Captured(net, [net], decode, **options), LatentEngine(net, [net], decode, **options)


def same(engine, plain, latents=LATENTS, text=TEXT, steps=2, noise="fresh", output="uint8"):
    got, want = (e.generate(latents, text, steps, noise, counted(21), output) for e in (engine, plain))
    assert torch.equal(got, want)
    return got


@pytest.fixture(scope="module")
def golden_unet():
    from diffusers import UNet2DConditionModel

    info = settings("latent")
    unet = UNet2DConditionModel(**info["unet"]).eval()
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(filled(info["weights"]["generator"], name, p))
    return unet


@pytest.mark.parametrize("loop", ["native", "reference"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_golden_generation(golden_unet, steps, loop, monkeypatch):
    if loop == "reference":
        monkeypatch.setattr(Plan, "native", None)
    info = settings("latent")
    text = TextConditioning(normal(info["emb_seed"], 4, 8, 16)[:3])
    engine = LatentEngine(Predictor(golden_unet), [golden_unet])
    assert loop == "reference" or engine.plan(steps).native is not None
    got = engine.generate(LATENTS, text, steps, randn_like=counted(21), output="latent")
    assert relative_error(got, arrays("latent")[f"gen/K{steps}"]) <= OUTPUT_TOLERANCE


def test_golden_generation_by_a_graph(golden_unet):
    info = settings("latent")
    text = TextConditioning(normal(info["emb_seed"], 4, 8, 16)[:3])
    engine = Captured(Predictor(golden_unet), [golden_unet])
    engine._graphs = Graphs("cpu", capture=TapeStandIn)  # traces a large network faster
    for _ in range(2):
        got = engine.generate(LATENTS, text, 2, randn_like=counted(21), output="latent")
        assert relative_error(got, arrays("latent")["gen/K2"]) <= OUTPUT_TOLERANCE
    assert engine.counts == {"captures": 1, "replays": 2, "graphs": 1}


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_every_prediction_and_noise(prediction, noise):
    net, engine, plain = pair(prediction=prediction)
    for steps in (1, 3):
        want = few_step_latent(lambda x, t: net(x, t, TEXT), LATENTS, counted(21), steps, prediction, noise)
        got = same(engine, plain, steps=steps, noise=noise, output="latent")
        assert relative_error(got, want) <= OUTPUT_TOLERANCE
    assert engine.counts == {"captures": 2, "replays": 2, "graphs": 2}


def test_every_output():
    _, engine, plain = pair()
    shapes = {"latent": (3, 4, 8, 8), "float": (3, 3, 16, 16), "uint8": (3, 16, 16, 3)}
    for output in (*shapes, "latent"):
        got = same(engine, plain, output=output)
        assert got.shape == shapes[output] and got.dtype == (torch.uint8 if output == "uint8" else torch.float32)
    assert engine.counts == {"captures": 3, "replays": 4, "graphs": 3}


def test_the_pipelines_own_schedule():
    bars = tuple((1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0).tolist())
    net, engine, plain = pair(bars=bars)
    got = same(engine, plain, output="latent")
    want = few_step_latent(lambda x, t: net(x, t, TEXT), LATENTS, counted(21), 2, bars=bars)
    assert relative_error(got, want) <= OUTPUT_TOLERANCE
    assert relative_error(got, few_step_latent(lambda x, t: net(x, t, TEXT), LATENTS, counted(21), 2)) > 1e-2


def test_embeddings_latents_and_noise_are_inputs_and_a_replay_calls_no_network():
    net, engine, plain = pair()
    first = same(engine, plain)
    calls = len(net.calls)
    others = TextConditioning(normal(5, 3, 8, 16))
    second = engine.generate(normal(6, 3, 4, 8, 8), others, 2, "fresh", counted(60))
    assert len(net.calls) == calls and engine.counts["captures"] == 1
    assert torch.equal(second, plain.generate(normal(6, 3, 4, 8, 8), others, 2, "fresh", counted(60)))
    assert not torch.equal(first, second)


def test_a_graph_for_each_shape_number_of_steps_and_embedding():
    _, engine, plain = pair()
    same(engine, plain)
    same(engine, plain, steps=3)
    same(engine, plain, noise="fixed")
    same(engine, plain, latents=normal(21, 3, 4, 8, 16))
    same(engine, plain, text=TextConditioning(normal(1, 3, 6, 16)))
    pooled = TextConditioning(normal(1, 3, 8, 16), normal(2, 3, 5), torch.ones(3, 6))
    same(engine, plain, text=pooled)
    assert engine.counts["captures"] == 6
    same(engine, plain, text=TextConditioning(pooled.states, pooled.pooled + 1, pooled.time_ids * 2))
    assert engine.counts["captures"] == 6


def test_batches_in_buckets_that_waste_a_quarter_at_most():
    _, engine, plain = pair()
    text = TextConditioning(normal(1, 7, 8, 16))
    engine._graphs = Graphs("cpu", capture=StandIn, largest_bucket=4)
    latents = normal(21, 7, 4, 8, 8)
    got = engine.generate(latents, text, 2, "fixed")
    want = plain.generate(latents, text, 2, "fixed")
    assert (got.int() - want.int()).abs().max() <= 1  # other batches round otherwise
    assert engine.counts == {"captures": 1, "replays": 2, "graphs": 1}  # 4 and 3 of 4
    assert [thrifty_bucket_of(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12)] == [1, 2, 4, 4, 4, 8, 8, 8, 8, 8, 16]
    assert thrifty_bucket_of(700) == 512 and thrifty_bucket_of(3, 2) == 2


def test_what_is_read_is_watched():
    _, engine, plain = pair()
    same(engine, plain)
    (recording,) = engine.graphs._capture.live
    trace = recording.trace
    read = {getattr(trace, node.target) for node in trace.graph.nodes if node.op == "get_attr"}
    inputs = {t.data_ptr() for graph in engine.graphs._graphs.values() for t in graph.inputs.values()}
    constants = {t.data_ptr() for t in read} - inputs
    assert constants and constants <= {t.data_ptr() for t in engine._watched()}


def test_values_in_place_keep_the_graph_and_a_replaced_parameter_does_not():
    net, engine, plain = pair()
    first = same(engine, plain)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        net.layer.weight.mul_(2)
        second = same(engine, plain)
    assert engine.counts["captures"] == 1 and not torch.equal(first, second)
    net.layer.weight = nn.Parameter(torch.randn_like(net.layer.weight))
    with pytest.warns(GraphRecaptureWarning, match="captured again"):
        third = same(engine, plain)
    assert engine.counts == {"captures": 2, "replays": 3, "graphs": 1} and not torch.equal(second, third)


def test_another_state_is_captured_again_with_one_warning():
    net = Network()
    engine = Captured(net, [net], decode, state=lambda: net.scale)
    plain = LatentEngine(net, [net], decode)
    first = same(engine, plain)
    net.scale = -1.0
    with pytest.warns(GraphRecaptureWarning) as record:
        second = same(engine, plain)
        net.scale = -2.0  # Python's hash of it is that of −1.0
        same(engine, plain)
        net.scale = 1.0
        assert torch.equal(same(engine, plain), first)
    assert len(record) == 1 and not torch.equal(first, second)
    assert engine.counts == {"captures": 4, "replays": 4, "graphs": 1}


def test_states_are_not_kept_for_good():
    net = Network()
    engine = Captured(net, [net], decode, state=lambda: net.scale)
    marks = []
    for i in range(300):  # as many as a slider of a LoRA's scale gives
        net.scale = i / 100
        *_, mark = engine._watched()
        marks.append((mark.data_ptr(), mark.shape, mark.dtype))
    *_, again = engine._watched()
    assert len(set(marks)) == 300 and again.shape == marks[-1][1]
    assert len(engine._states) == 64 and mark.untyped_storage().nbytes() == 4


def test_out_of_memory_falls_to_smaller_buckets():
    class Hungry(Network):
        def forward(self, x, t, text):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.\nmore")
            return super().forward(x, t, text)

    net = Hungry()
    engine = Captured(net, [net], decode)
    with pytest.warns(GraphMemoryWarning, match="batches of 4: going on with 2"):
        got = engine.generate(LATENTS, TEXT, 2, "fixed")
    plain = LatentEngine(Network(), [net], decode)
    want = [plain.generate(LATENTS[rows], TEXT[rows], 2, "fixed") for rows in (slice(0, 2), slice(2, 3))]
    assert torch.equal(got, torch.cat(want))


def test_a_network_that_synchronises_is_told_where():
    class Waits(Network):
        def forward(self, x, t, text):
            return super().forward(x, t, text) * (1 if t[0].item() > 0 else 2)

    net = Waits()
    with pytest.raises(SignFastError, match=r"_local_scalar_dense.*test_latent_engine\.py:"):
        Captured(net, [net]).generate(LATENTS, TEXT, 1, output="latent")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_of_diffusers_synchronises(kind):
    torch.manual_seed(0)
    unet, vae = tiny.unet(kind), tiny.vae()
    prediction = {"sd2-v": "v", "flow": "flow"}.get(kind, "epsilon")
    width = unet.config.cross_attention_dim
    extra = (normal(2, 2, 12), torch.full((2, 6), 64.0)) if kind == "sdxl" else ()
    text = TextConditioning(normal(1, 2, 16, width), *extra)
    scale = LatentScale(0.18215)

    def decoded(latents):
        return vae.decode(scale.to_vae(latents), return_dict=False)[0]

    engine = LatentEngine(Predictor(unet, prediction), [unet, vae], decoded, prediction=prediction)
    prepared = engine._prepared(engine.plan(2))
    inputs = {"draw0": normal(3, 2, 4, 8, 8), "draw1": normal(4, 2, 4, 8, 8), **text.tensors()}
    inputs["levels"] = prepared.levels
    with torch.no_grad():
        found = find_synchronising(
            lambda: engine._run(prepared, inputs, "uint8", prepared.coefficients), lambda watched: watched()
        )
    assert found is None


def test_modules_are_put_in_eval_mode():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)).train()
    LatentEngine(lambda x, t, text: net(x), [net])
    assert not net.training and not net[1].training


def test_refusals():
    net, _, plain = pair()
    with pytest.raises(ValueError, match="2 rows of embeddings for 3 latents"):
        plain.generate(LATENTS, TEXT[:2], 1)
    with pytest.raises(ValueError, match="output must be latent, float or uint8"):
        plain.generate(LATENTS, TEXT, 1, output="png")
    with pytest.raises(ValueError, match='without a decoder the output is "latent"'):
        LatentEngine(net, [net]).generate(LATENTS, TEXT, 1)
    with pytest.raises(ValueError, match="at least 1"):
        plain.generate(LATENTS, TEXT, 0)


class Adapter(nn.Linear):
    """What peft's layers look like."""

    def __init__(self):
        super().__init__(2, 2)
        self._disable_adapters, self._active_adapter, self.scaling, self.merged_adapters = False, ["a"], {"a": 1.0}, []


def test_the_state_of_networks_is_equal_until_something_changes():
    torch.manual_seed(0)
    vae, net, unet = tiny.vae(), nn.Sequential(Adapter(), nn.ReLU()), tiny.unet("sd15")
    networks = [unet, vae, net]
    seen = [python_state(networks)]
    assert python_state(networks) == seen[0] and hash(seen[0]) == hash(python_state(networks))

    def changed():
        seen.append(python_state(networks))
        return seen.count(seen[-1]) == 1

    net[0].scaling["a"] = -1.0
    assert changed()
    net[0]._active_adapter = ["b"]
    assert changed()
    net[0].merged_adapters.append("b")
    assert changed()
    net[0]._disable_adapters = True
    assert changed()
    net[1] = nn.Tanh()
    assert changed()
    vae.enable_slicing()
    assert changed()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert changed()
    unet.set_attention_slice("max")
    assert changed()
