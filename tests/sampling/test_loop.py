"""The C++ sampler loop against its Python oracle; exceptions, signals, refusals, and life without the extension."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from sign_fast.kernels import extension
from sign_fast.sampling import (
    SeededNoise,
    ablation_sampler,
    edm_sampler,
    few_step,
    few_step_latent,
    multistep,
    one_step,
    recursive,
)
from sign_fast.sampling.ablation import ablation_plan
from sign_fast.sampling.edm import edm_plan
from sign_fast.sampling.loop import draw_ahead, run_plan, run_plan_reference
from sign_fast.sampling.plan import Call, Combine, Plan
from sign_fast.sampling.students import few_step_latent_plan, few_step_plan, multistep_plan, recursive_plan
from tests.golden_rules import normal

needs_extension = pytest.mark.skipif(extension.module() is None, reason=str(extension.missing()))
SHAPE = (3, 2, 5, 7)

PLANS = {
    "heun": edm_plan(5),
    "churn": edm_plan(5, S_churn=10),
    "general": ablation_plan(5, schedule="vp", scaling="vp", discretization="vp", S_churn=10, alpha=0.5),
    "few_step": few_step_plan(4),
    "latent": few_step_latent_plan(4),
    "latent_half": few_step_latent_plan(4, "flow", "ddim", torch.bfloat16),
    "recursive": recursive_plan(3),
    "multistep": multistep_plan([0.75, 0.5]),
}


def draws(plan, shape=SHAPE):
    return [normal(50, *shape), *(normal(50 + i, *shape).to(plan.noise_dtype) for i in range(1, plan.draws))]


DENOISERS = {
    "float32": lambda x, level: torch.tanh(x.float()) + level / 8,
    "float64": lambda x, level: torch.tanh(x.double()) + level / 8,
    "bfloat16": lambda x, level: torch.tanh(x.bfloat16()) + level / 8,
    "channels_last": lambda x, level: torch.tanh(x.float()).contiguous(memory_format=torch.channels_last),
    "its input": lambda x, level: x,
    "one image": lambda x, level: torch.tanh(x.float())[:1],  # broadcast, as torch does
}


@needs_extension
@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("name", PLANS)
def test_cpp_loop_equals_the_reference(name, denoiser):
    plan, net = PLANS[name], DENOISERS[denoiser]
    got, want = run_plan(plan, net, draws(plan)), run_plan_reference(plan, net, draws(plan))
    assert got.dtype == want.dtype
    if denoiser in ("float32", "float64", "its input") and plan.dtype != torch.bfloat16:
        assert torch.equal(got, want)  # one pass, the same bits
    else:  # torch may add a product without rounding it
        roundings = 4 * torch.finfo(plan.dtype).eps * 8 * len(plan.steps)
        assert (got.double() - want.double()).abs().max() <= roundings * want.double().abs().max()


@needs_extension
def test_many_elements_and_threads():
    plan, shape = PLANS["churn"], (2, 3, 160, 160)  # more than one thread's share
    net = DENOISERS["float32"]
    assert torch.equal(run_plan(plan, net, draws(plan, shape)), run_plan_reference(plan, net, draws(plan, shape)))


@needs_extension
@pytest.mark.parametrize("change", ["channels_last", "sliced", "transposed"])
def test_memory_formats(change):
    plan = PLANS["churn"]
    changed = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[change]
    net = DENOISERS["float32"]
    got = run_plan(plan, net, [changed(t) for t in draws(plan)])
    torch.testing.assert_close(got, run_plan_reference(plan, net, draws(plan)), rtol=1e-13, atol=1e-13)


def both(plan, denoiser, given):
    """The loop in use and its oracle."""
    return [lambda: run_plan(plan, denoiser, given), lambda: run_plan_reference(plan, denoiser, given)]


def test_what_the_denoiser_sees():
    for loop in range(2):
        seen = []

        def denoiser(x, level):
            seen.append((x.dtype, tuple(x.shape), level, torch.is_grad_enabled()))  # noqa: B023
            return x.float() / 2

        plan = few_step_plan(3)
        with torch.no_grad():
            result = both(plan, denoiser, draws(plan))[loop]()
        assert seen == [(torch.float64, SHAPE, i, False) for i in range(3)]
        assert result.dtype == torch.float32


def test_draws_and_kept_states_are_never_written():
    plan = PLANS["churn"]
    given = draws(plan)
    before = [t.clone() for t in given]
    kept, copies = [], []

    def denoiser(x, level):
        kept.append(x)
        copies.append(x.clone())
        return x

    run_plan(plan, denoiser, given)
    assert all(torch.equal(a, b) for a, b in zip(given + kept, before + copies, strict=True))


def test_exceptions_pass():
    class OfItsOwn(Exception):
        pass

    error = OfItsOwn("at the second call")

    def denoiser(x, level):
        if level == 1:
            raise error
        return x

    plan = few_step_plan(3)
    for loop in both(plan, denoiser, draws(plan)):
        with pytest.raises(OfItsOwn) as caught:
            loop()
        assert caught.value is error
        assert caught.traceback[-1].name == "denoiser"


def test_refusals():
    plan = few_step_plan(3)
    for loop in both(plan, lambda x, level: None, draws(plan)):
        with pytest.raises(TypeError, match="must give a tensor, not NoneType"):
            loop()
    with pytest.raises(ValueError, match="uses 3 draws, not 2"):
        run_plan(plan, lambda x, level: x, draws(plan)[:2])
    with pytest.raises(ValueError, match="all draws must be"):
        run_plan(plan, lambda x, level: x, [*draws(plan)[:2], torch.zeros(1)])


@needs_extension
@pytest.mark.parametrize(
    "step", [Combine(2, ((0, 1.0),)), Combine(0, ((2, 1.0),)), Combine(0, (), ((1, 1.0),)), Combine(0), Call(0, -1, 0)]
)
def test_plans_that_make_no_sense(step):
    with pytest.raises(IndexError):
        run_plan(Plan((step,), (1.0,), 1, 2, 0), lambda x, level: x, [torch.zeros(SHAPE)])
    with pytest.raises(IndexError, match="draws its latents"):
        extension.module().Plan(1, 0, 0, torch.float32)
    with pytest.raises(IndexError, match="register 3 of 2"):
        run_plan(Plan((), (), 1, 2, 3), lambda x, level: x, [torch.zeros(SHAPE)])


def interrupt(seen):
    def handler(number, frame):
        seen()
        raise KeyboardInterrupt

    return handler


@pytest.fixture
def timer():
    """Raises KeyboardInterrupt 20 ms after it is called, having called what it is given."""
    before = signal.getsignal(signal.SIGALRM)

    def start(seen):
        signal.signal(signal.SIGALRM, interrupt(seen))
        signal.setitimer(signal.ITIMER_REAL, 0.02)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@needs_extension
def test_a_signal_is_seen_between_two_calls(timer):
    # Tensor.add_ is C: without a check of its own the loop would go on to its end before Python runs a handler
    calls = 500_000
    plan = Plan((Combine(0, (), ((0, 1.0),)), *[Call(0, 0, 1)] * calls), (0.0, 1.0), 1, 1, 0)
    assert plan.native is not None  # made before the timer starts
    counter = torch.zeros((), dtype=torch.float64)
    done = []
    with pytest.raises(KeyboardInterrupt):
        timer(lambda: done.append(counter.item()))
        run_plan(plan, torch.Tensor.add_, [counter])
    assert counter.item() == done[0] < calls


def test_a_signal_during_a_slow_call(timer):
    plan = few_step_plan(4)
    levels = []
    waiting = threading.Event()

    def slow(x, level):
        levels.append(level)
        if level == 1:
            timer(lambda: None)
            waiting.wait(30)
        return x

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, slow, draws(plan))
    assert levels == [0, 1]


@needs_extension
def test_threads_run_side_by_side():
    # each waits inside its network for the other: one that held the GIL, or a common state, would stop both
    barrier = threading.Barrier(2, timeout=30)
    plan, results = edm_plan(3), {}

    def generate(seed):
        def denoiser(x, level):
            barrier.wait()
            return torch.tanh(x)

        results[seed] = run_plan(plan, denoiser, [normal(seed, *SHAPE)])

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        want = run_plan_reference(plan, lambda x, level: torch.tanh(x), [normal(seed, *SHAPE)])
        assert torch.equal(results[seed], want)


def test_noise_is_drawn_ahead_in_the_published_dtype():
    seen = []

    def randn_like(x):
        seen.append((x.dtype, tuple(x.shape)))
        return torch.full_like(x, len(seen))

    z = normal(1, *SHAPE)
    drawn = draw_ahead(edm_plan(3, S_churn=1), z, randn_like)
    assert drawn[0] is z and [float(t.mean()) for t in drawn[1:]] == [1, 2, 3]
    assert seen == [(torch.float64, SHAPE)] * 3
    seen.clear()
    draw_ahead(few_step_plan(3), z, randn_like)
    assert seen == [(torch.float32, SHAPE)] * 2
    seen.clear()
    draw_ahead(edm_plan(3), z, randn_like)
    assert seen == []


IMAGES = """
import torch
from tests.sampling.test_loop import all_samplers
torch.save(all_samplers(), {path!r})
"""


class Net(torch.nn.Module):
    """A denoiser of a line, with what a sampler asks of a network."""

    sigma_min, sigma_max = 0.0, float("inf")

    def forward(self, x, sigma, class_labels):
        return torch.tanh(x.float() / (1 + sigma.float())) * 0.7

    def round_sigma(self, sigma):
        return sigma


def all_samplers():
    z, net = normal(1, *SHAPE), Net()

    def noise(start=70):
        numbers = iter(range(start, start + 99))
        return lambda x: normal(next(numbers), *x.shape).to(x)

    seeded = SeededNoise("cpu", range(9))
    return {
        "seeds": seeded.randn([9, 1, 8, 8]),
        "labels": seeded.randint(10, size=[9]),
        "edm": edm_sampler(net, z),
        "churn": edm_sampler(net, z, randn_like=noise(), num_steps=6, S_churn=10),
        "ablation": ablation_sampler(net, z, num_steps=6, schedule="vp", scaling="vp", discretization="vp"),
        "one_step": one_step(net, z),
        "few_step": few_step(net, z, randn_like=noise()),
        "latent": few_step_latent(lambda x, t: torch.tanh(x) * t.float().mean() / 1000, z, noise()),
        "recursive": recursive(torch.tanh, z, 3),
        "multistep": multistep(torch.tanh, z, [0.75, 0.5], noise()),
    }


@needs_extension
def test_without_the_extension_the_images_are_the_same(tmp_path):
    path = str(tmp_path / "images.pt")
    env = {**os.environ, "SIGN_FAST_DISABLE_EXT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", IMAGES.format(path=path)], env=env, check=True)
    without = torch.load(path)
    for name, images in all_samplers().items():
        assert torch.equal(without[name], images), name
