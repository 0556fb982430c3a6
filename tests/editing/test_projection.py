"""Projection: SPEC's formula in plain torch, whatever the batch, the way through the engine or the kind of student."""

from __future__ import annotations

import pytest
import torch

from sign_fast import ImageGenerator, models, optimize
from sign_fast.editing import KnownPixels, Luma, PatchMeans, noise_levels, project
from sign_fast.editing.tasks import centre_unknown
from sign_fast.errors import SignFastError
from sign_fast.kernels import extension
from sign_fast.models import IdempotentPrecond
from sign_fast.sampling import SeededNoise, engine
from sign_fast.sampling.engine import Engine
from sign_fast.sampling.graphs import Graphs
from sign_fast.sampling.students import projection_plan
from tests.network_cases import network
from tests.stand_in_capture import StandIn

SEEDS = [3, 12345678901, 0]
CONSTRAINTS = {
    "free": None,
    "pixels": KnownPixels(centre_unknown(16)),
    "luma": Luma(),
    "means": PatchMeans(4),
}
constraints = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)


@pytest.fixture(scope="module")
def student():
    return IdempotentPrecond.from_teacher(network("ddpmpp"), sigma=2.5)


@pytest.fixture(scope="module")
def generator(student):
    return ImageGenerator(student)


def images(batch=3, seed=0, size=16, channels=3):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def plainly(student, y, taus, constraint, seeds=SEEDS, labels=None):
    """SPEC section 7: u = (1 − τ0)·y + τ0·ε, x = f(u), then the multi-step loop; what is known is put back."""
    noise = SeededNoise("cpu", seeds)
    x = y
    for tau in taus:
        x = student((1 - tau) * x + tau * noise.randn(y.shape), labels)
        x = x if constraint is None else constraint.restore(x, y, *constraint.tensors)
    return x


def test_levels_fall_to_zero():
    assert noise_levels(0.6, 2) == pytest.approx((0.6, 0.4, 0.2)) and noise_levels(1, 0) == (1.0,)
    assert noise_levels(0, 1) == (0, 0)


@constraints
@pytest.mark.parametrize("rounds", [0, 2])
def test_is_the_formula(student, generator, constraint, rounds):
    y = images()
    got = project(generator, y, noise_level=0.6, rounds=rounds, constraint=constraint, seeds=SEEDS)
    want = plainly(student, y, noise_levels(0.6, rounds), constraint)
    assert got.dtype == torch.float32 and got.shape == y.shape
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    levels = project(generator, y, noise_level=0.6, rounds=rounds, constraint=constraint, seeds=SEEDS, output="uint8")
    assert levels.shape == (3, 16, 16, 3)
    assert (levels.int() - (got.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).int()).abs().max() <= 1


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_ends_of_the_noise_level(student, generator, tau):
    y = images()
    got = project(generator, y, noise_level=tau, rounds=1, seeds=SEEDS)
    torch.testing.assert_close(got, plainly(student, y, (tau, tau / 2), None), rtol=0, atol=2e-4)
    assert torch.equal(got, project(generator, images(seed=9), noise_level=tau, rounds=1, seeds=SEEDS)) == (tau == 1)


def test_without_the_extension(student, generator, monkeypatch):
    y = images()
    want = project(generator, y, rounds=1, seeds=SEEDS)
    monkeypatch.setattr(extension, "module", lambda: None)
    own = Engine(student)
    assert own.net.native is None
    torch.testing.assert_close(project(own, y, rounds=1, seeds=SEEDS), want, rtol=0, atol=2e-4)


@constraints
def test_an_image_depends_neither_on_its_batch_nor_on_the_order(generator, constraint):
    y, seeds = images(7), [5, 1, 5, 900, 2, 77, 8]
    options = {"noise_level": 0.7, "rounds": 2, "constraint": constraint, "output": "uint8"}
    whole = project(generator, y, seeds=seeds, **options)
    for part in ([0], [6, 1, 3], [2, 4, 5, 0]):
        alone = project(generator, y[part], seeds=[seeds[i] for i in part], **options)
        assert (alone.int() - whole[part].int()).abs().max() <= 1
    others = project(generator, y, seeds=[seed + 1 for seed in seeds], **options)
    assert all(not torch.equal(a, b) for a, b in zip(whole, others, strict=True))


def test_a_mask_an_image_and_large_batches_in_parts(generator, monkeypatch):
    y = images(5)
    known = torch.stack([centre_unknown(16).roll(i, 0) for i in range(5)])[:, None]
    options = {"noise_level": 0.7, "rounds": 1, "constraint": KnownPixels(known), "seeds": range(5)}
    want = project(generator, y, **options)
    monkeypatch.setattr(engine, "LARGEST_BUCKET", 2)
    torch.testing.assert_close(project(generator, y, **options), want, rtol=0, atol=2e-4)
    inside = known.expand_as(y)
    assert torch.equal(project(generator, y, **options)[inside], y[inside])


@pytest.mark.parametrize("constraint", [None, Luma()])
def test_any_layout(generator, constraint):
    y = images()
    want = project(generator, y, constraint=constraint, seeds=SEEDS)
    for other in (y.to(memory_format=torch.channels_last), y.mT.contiguous().mT):
        assert torch.equal(project(generator, other, constraint=constraint, seeds=SEEDS), want)


def test_classes():
    student = IdempotentPrecond.from_teacher(network("ddpmpp-cond"), sigma=2.5)
    own, y = Engine(student), images()
    one_hot = torch.eye(3)[[2, 0, 1]]
    got = project(own, y, rounds=1, labels=[2, 0, 1], seeds=SEEDS)
    torch.testing.assert_close(got, plainly(student, y, noise_levels(0.5, 1), None, labels=one_hot), rtol=0, atol=2e-4)
    same = project(own, y, rounds=1, labels=2, seeds=SEEDS)
    torch.testing.assert_close(same[0], got[0], rtol=0, atol=2e-4)
    assert (same[1] - got[1]).abs().max() > 0.01
    with pytest.raises(SignFastError, match="this network has classes 0 to 2: say which"):
        project(own, y)
    with pytest.raises(SignFastError, match="class label 3 is out of range"):
        project(own, y, labels=3)


def test_philox_noise_and_float64_images(student):
    own = Engine(student, noise="philox")
    a = project(own, images().double(), seeds=SEEDS)
    b = project(own, images()[[2]], seeds=[0])
    torch.testing.assert_close(a[[2]], b, rtol=0, atol=2e-4)


class OwnStudent:
    """A student that is no module, and counts its calls."""

    time_free = True
    img_resolution, img_channels = 16, 3

    def __init__(self):
        self.calls = []

    def __call__(self, u):
        self.calls.append(u.clone())
        return u.tanh()


def test_students_of_ones_own():
    own, y = OwnStudent(), images()
    got = project(own, y, noise_level=0.4, rounds=3, constraint=PatchMeans(2), seeds=SEEDS)
    assert len(own.calls) == 4
    torch.testing.assert_close(got, plainly(lambda u, _: u.tanh(), y, noise_levels(0.4, 3), PatchMeans(2)))


class Captured(Engine):
    """An engine that takes the way of CUDA, with a stand-in for the capture."""

    _is_captured = True

    def __init__(self, net):
        super().__init__(net)
        self._graphs = Graphs("cpu", capture=StandIn)


@constraints
def test_captured_edits_wait_for_nothing_and_read_inputs_alone(student, constraint):
    """The stand-in fails where a value is brought to the host, and replays with what was captured as constants."""
    net = optimize(student)
    net.native = None
    own, plain = Captured(net), Engine(net)
    masks = [centre_unknown(16), centre_unknown(16).roll(3, 1)] if isinstance(constraint, KnownPixels) else [None] * 2
    for i, mask in enumerate(masks):
        c = constraint if mask is None else KnownPixels(mask)
        for level, seeds in ((0.6, SEEDS), (0.3, [9, 8, 7])):
            y = images(seed=i)
            options = {"noise_level": level, "rounds": 1, "constraint": c, "seeds": seeds}
            assert torch.equal(project(own, y, **options), project(plain, y, **options))
    assert own.graphs.statistics()["captures"] == 1


def test_constraints_do_not_share_graphs(student):
    net = optimize(student)
    net.native = None
    own, plain, y = Captured(net), Engine(net), images()
    for constraint in (*CONSTRAINTS.values(), PatchMeans(2)):
        got = project(own, y, constraint=constraint, seeds=SEEDS)
        assert torch.equal(got, project(plain, y, constraint=constraint, seeds=SEEDS))
    assert own.graphs.statistics()["captures"] == 5


def test_plans_are_made_once():
    assert projection_plan((0.5, 0.25)) is projection_plan((0.5, 0.25))
    for wrong in ((), (1.5,), (0.5, -0.1), (float("nan"),)):
        with pytest.raises(ValueError, match="noise levels must be in"):
            projection_plan(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": 1.01}, "noise level must be a number from 0 to 1, not 1.01"),
        ({"noise_level": float("nan")}, "from 0 to 1, not nan"),
        ({"noise_level": "0.5"}, "from 0 to 1, not '0.5'"),
        ({"rounds": -1}, "rounds must be 0 or more, not -1"),
        ({"rounds": 1.5}, "rounds 1.5 is not a whole number"),
        ({"images": images(size=8)}, r"images of shape \(3, 3, 8, 8\) do not fit: this network edits \(B, 3, 16, 16\)"),
        ({"images": images(channels=1)}, "do not fit"),
        ({"images": images()[:0]}, "do not fit"),
        ({"images": images()[0]}, r"must be a floating tensor \(B, C, H, W\)"),
        ({"images": images().byte()}, "must be a floating tensor"),
        ({"images": images() / 0}, "NaN or Inf"),
        ({"seeds": [1, 2]}, "2 seeds for 3 images"),
        ({"seeds": [1, 2, -3]}, "seed -3 is out of range"),
        ({"labels": 1}, "unconditional"),
        ({"output": "pil"}, "output must be uint8 or float"),
        ({"constraint": KnownPixels(centre_unknown(8))}, "the mask is 8×8, the images are 16×16"),
        ({"constraint": PatchMeans(3)}, "no patches of 3×3"),
    ],
)
def test_refused(generator, changes, message):
    arguments = {"images": images(), **changes}
    with pytest.raises(SignFastError, match=message):
        project(generator, arguments.pop("images"), **arguments)


def test_refused_networks():
    with pytest.raises(SignFastError, match="needs a network without a noise level"):
        project(models.load("digits-uncond", "cpu"), images(size=8, channels=1))
