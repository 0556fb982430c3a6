"""The engine against the public samplers: images, noise, labels, threads, signals; its graphs with a stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from sign_fast import functional, models, optimize
from sign_fast.errors import SignFastError
from sign_fast.inference import conditioning
from sign_fast.kernels import extension
from sign_fast.sampling import ablation_sampler, edm_sampler, few_step, multistep, one_step, recursive
from sign_fast.sampling import engine as module
from sign_fast.sampling.engine import Engine
from sign_fast.sampling.loop import run_plan_reference
from sign_fast.sampling.noise import PhiloxNoise, SeededNoise
from tests.network_cases import network
from tests.oracle import assert_close

SEEDS = [7, 0, 123456789012]
SAMPLERS = {"edm": edm_sampler, "ablation": ablation_sampler, "one_step": one_step, "few_step": few_step}
EULER = {"solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp"}
CASES = [  # sampler, steps, options
    ("edm", 3, {}),
    ("edm", 3, {"S_churn": 2.0, "S_noise": 1.01, "rho": 5}),
    ("ablation", 3, EULER),
    ("ablation", 3, {"discretization": "iddpm", "schedule": "ve", "S_churn": 1.0, "alpha": 0.5}),
    ("one_step", 1, {"sigma": 3.0}),
    ("few_step", 3, {}),
]
STUDENT_CASES = [("recursive", 3, {}), ("multistep", 3, {"noise_levels": [0.5, 0.2]})]
NETWORKS = ["ddpmpp", "ddpmpp-cond", "ddpmpp-two-blocks", "skip-iddpm", "skip-fir"]  # EDM, VP, iDDPM and VE


def drawn(net, seeds=SEEDS, noise="torch"):
    """The noise of an engine, its latents and its labels, in the published order."""
    made = SeededNoise("cpu", seeds) if noise == "torch" else PhiloxNoise("cpu", seeds)
    latents = made.randn([len(seeds), net.img_channels, net.img_resolution, net.img_resolution])
    labels = made.randint(net.label_dim, size=[len(seeds)]) if net.label_dim else None
    return made, latents, labels


@torch.no_grad()
def publicly(net, sampler, steps, options, dtype=None, noise="torch", labels=None):
    """Images by the public samplers, with the network as it is."""
    made, latents, classes = drawn(net, noise=noise)
    classes = classes if labels is None else torch.tensor(labels)
    one_hot = None if classes is None else torch.eye(net.label_dim)[classes]
    keywords = {} if dtype is None else {"dtype": dtype}
    if sampler in ("recursive", "multistep"):
        student = (lambda x: net(x, one_hot, **keywords)) if net.label_dim else (lambda x: net(x, **keywords))
        if sampler == "recursive":
            return recursive(student, latents, steps)
        return multistep(student, latents, options["noise_levels"], made.randn_like)

    class Called:
        sigma_min, sigma_max, round_sigma = net.sigma_min, net.sigma_max, staticmethod(net.round_sigma)

        def __call__(self, x, sigma, labels):
            return net(x, sigma, labels, **keywords)

    arguments = {} if sampler == "one_step" else {"randn_like": made.randn_like, "num_steps": steps}
    return SAMPLERS[sampler](Called(), latents, one_hot, **arguments, **options)


def check_against_plain(net, sampler, steps, options, noise="torch"):
    """float: the engine's error is at most twice plain float32's; uint8: a level at most from plain's bytes."""
    engine = Engine(net, noise=noise)
    got = engine.generate(SEEDS, sampler, steps, None, "float", **options)
    want = publicly(net, sampler, steps, options, torch.float64, noise)
    plain = publicly(net, sampler, steps, options, torch.float32, noise)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert_close(got, want, plain, f"{sampler} {options}")
    images = engine.generate(SEEDS, sampler, steps, None, **options)
    assert images.dtype == torch.uint8 and images.is_contiguous() and images.shape == want.permute(0, 2, 3, 1).shape
    assert (images.int() - functional.to_uint8(want).int()).abs().max() <= 1
    assert (images == functional.to_uint8(got)).float().mean() > 0.99


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, table, monkeypatch):
    if not table:
        monkeypatch.setattr(conditioning, "_TABLE_BYTES", 0)
    net = network(name)
    for case in CASES if table else CASES[1:2]:
        check_against_plain(net, *case)


@pytest.mark.parametrize("name", ["ddpmpp", "ddpmpp-cond", "skip-iddpm"])
@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_students_without_a_time_input(name, noise):
    student = models.IdempotentPrecond.from_teacher(network(name), sigma=5.0).eval()
    for case in STUDENT_CASES:
        check_against_plain(student, *case, noise)


@pytest.mark.parametrize("name", ["ddpmpp-cond", "ddpmpp"])
def test_philox(name):
    for case in (CASES[1], CASES[3], CASES[5]):
        check_against_plain(network(name), *case, "philox")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddpmpp", "ddpmpp-cond"])
def test_16_bits(name, dtype):
    net = network(name)
    for sampler, steps, options in (CASES[0], CASES[5]):
        got = Engine(net, dtype=dtype).generate(SEEDS, sampler, steps, None, "float", **options)
        want = publicly(net, sampler, steps, options, torch.float64)
        plain = publicly(net, sampler, steps, options, dtype)
        assert_close(got.to(dtype), want, plain)


# ---- denoisers of one's own ----


class Module(nn.Module):
    """A denoiser that torch computes the same way whoever calls it."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 6, 3, 4, 0.01, 50.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.classes = nn.Linear(4, 3)
        self.seen = []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        self.seen.append(class_labels)
        y = self.layer((x / (1 + sigma**2).sqrt()).float()) + self.classes(class_labels)[:, :, None, None]
        return y.tanh()


def function(x, sigma, class_labels):
    return (x / (1 + sigma**2)).float().sin()


function.img_resolution, function.img_channels = 4, 2
function.sigma_min, function.sigma_max, function.round_sigma = 0.002, 80.0, torch.as_tensor


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("net", [Module(), function], ids=["module", "function"])
def test_own_denoisers_to_the_byte(net, case):
    sampler, steps, options = case
    if net is function:
        function.label_dim = 0
    want = publicly(net, *case)
    engine = Engine(net)
    assert torch.equal(engine.generate(SEEDS, sampler, steps, None, "float", **options), want.float())
    assert torch.equal(engine.generate(SEEDS, sampler, steps, None, **options), functional.to_uint8(want))


@torch.no_grad()
def test_philox_is_its_functional_and_the_loop_the_reference():
    net = Module()
    engine = Engine(net, noise="philox")
    for sampler, steps, options in CASES:
        plan = module.plan_of(net, sampler, steps, options)
        seeds = torch.tensor(SEEDS)
        draws = [functional.philox_normal(seeds, i, (3, 6, 6)) for i in range(plan.draws)]
        labels = torch.eye(4)[PhiloxNoise("cpu", SEEDS).randint(4, size=[3])]
        levels = torch.tensor(plan.levels, dtype=torch.float64)
        want = run_plan_reference(plan, lambda x, level, s=levels, y=labels: net(x, s[level], y), draws)
        assert torch.equal(engine.generate(SEEDS, sampler, steps, None, "float", **options), want.float())


@torch.no_grad()
def test_students_of_ones_own():
    class Student(nn.Module):
        img_resolution, img_channels, label_dim, time_free = 4, 1, 0, True

        def forward(self, x):
            return x.sin()

    engine = Engine(Student())
    for sampler, steps, options in STUDENT_CASES:
        want = publicly(Student(), sampler, steps, options)
        assert torch.equal(engine.generate(SEEDS, sampler, steps, None, "float", **options), want)


def test_a_denoiser_says_where_it_is():
    class Elsewhere:
        img_resolution, img_channels, device = 4, 1, "meta"

    assert Engine(Elsewhere()).device == torch.device("meta") and Engine(Module()).device == torch.device("cpu")


def test_the_callers_network_is_left_alone():
    net = network("ddpmpp")
    before = {name: p.clone() for name, p in net.state_dict().items()}
    want = publicly(net, *CASES[5])
    Engine(net, dtype=torch.bfloat16).generate(SEEDS, "few_step", 3, None)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert torch.equal(publicly(net, *CASES[5]), want) and net.dtype is None


# ---- seeds and labels ----


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_labels_are_drawn_after_the_latents(noise):
    net = Module()
    made, latents, labels = drawn(net, noise=noise)
    after = made.randn_like(latents)
    seen = []

    def sampler(net, z, class_labels, randn_like, num_steps):
        seen.extend([z, class_labels, randn_like(z)])
        return z

    Engine(net, noise=noise).generate(SEEDS, sampler, 1, None)
    for got, want in zip(seen, (latents, torch.eye(4)[labels], after), strict=True):
        assert torch.equal(got, want)
    Engine(net, noise=noise).generate(SEEDS, "few_step", 1, None)
    assert torch.equal(net.seen[-1], torch.eye(4)[labels])


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_labels_that_are_given_change_no_draw(noise):
    """The published programs draw a label of each seed even where one is given: the noise after it is the same."""
    for net in (Module(), network("ddpmpp-cond")):
        _, _, labels = drawn(net, noise=noise)
        engine = Engine(net, noise=noise)
        for sampler, steps, options in (CASES[1], CASES[5]):
            own = engine.generate(SEEDS, sampler, steps, None, **options)
            assert torch.equal(engine.generate(SEEDS, sampler, steps, labels.tolist(), **options), own)
            others = [(label + 1) % net.label_dim for label in labels.tolist()]
            assert not torch.equal(engine.generate(SEEDS, sampler, steps, others, **options), own)


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("name", ["ddpmpp-cond", "skip-iddpm"])
def test_an_image_depends_neither_on_its_batch_nor_on_the_order(name, noise):
    engine = Engine(network(name), noise=noise)
    seeds = [5, 3, 11, 1 << 40, 8]
    whole = engine.generate(seeds, "edm", 3, None, S_churn=2.0)
    for part in ([4, 2], [1], [3, 1, 0, 2, 4]):
        images = engine.generate([seeds[i] for i in part], "edm", 3, None, S_churn=2.0)
        assert (images.int() - whole[part].int()).abs().max() <= 1


def test_large_batches_are_made_in_parts(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BUCKET", 2)
    sizes = []

    class Counting(Module):
        def forward(self, x, sigma, class_labels=None):
            sizes.append(len(x))
            return super().forward(x, sigma, class_labels)

    for noise in ("torch", "philox"):
        engine = Engine(Counting(), noise=noise)
        images = engine.generate([1, 2, 3, 4, 5], "few_step", 1, None)
        assert sizes == [2, 2, 1] and images.shape == (5, 6, 6, 3)
        sizes.clear()
        for i in range(5):
            alone = engine.generate([i + 1], "few_step", 1, None)
            assert (images[i].int() - alone[0].int()).abs().max() <= 1
        sizes.clear()


# ---- what cannot be done is refused before anything is drawn ----


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("edm", {"sigma_min": 0}, "sigma_min must be positive, not 0"),
        ("edm", {"sigma_min": 90}, "sigma_min 90 is above sigma_max 80"),
        ("edm", {"rho": 0}, "cannot run with rho=0: division by zero"),
        ("edm", {"rho": float("nan")}, "not all finite"),
        ("ablation", {"solver": "rk4"}, "solver must be one of heun, euler, not 'rk4'"),
        ("ablation", {"alpha": 0}, "alpha=0: division by zero"),
        ("ablation", {"sigma_min": 90.0}, "is above sigma_max"),
        ("few_step", {"sigma": -1}, "noise levels must be positive, not -1"),
        ("few_step", {"sigma": float("inf")}, "not all finite"),
    ],
)
def test_options_that_make_no_plan(sampler, options, message, monkeypatch):
    monkeypatch.setattr(module, "SeededNoise", lambda *arguments: pytest.fail("work was begun"))
    engine = Engine(network("ddpmpp"))
    for call in (engine.check, lambda *a: engine.generate(SEEDS, a[0], a[1], None, **a[2])):
        with pytest.raises(SignFastError, match=message) as caught:
            call(sampler, 3, options)
        assert "\n" not in str(caught.value)


def test_refused_networks():
    with pytest.raises(SignFastError, match=r"is optimized for torch\.float32: optimize the original"):
        Engine(optimize(network("ddpmpp")), dtype=torch.bfloat16)
    with pytest.raises(SignFastError, match="takes no dtype"):
        Engine(function, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="CUDA graphs run on a CUDA device, not on cpu"):
        assert Engine(function).graphs


# ---- the extension, threads, signals ----

WITHOUT = """
import sys, torch
sys.path[:0] = {path!r}
from tests.sampling.test_engine import CASES, SEEDS, Engine, Module, extension, function, network
assert extension.module() is None
images = [
    Engine(net, noise=noise).generate(SEEDS, sampler, steps, None, output, **options)
    for net in (Module(), function, network("ddpmpp-cond"))
    for noise in ("torch", "philox")
    for output in ("uint8", "float")
    for sampler, steps, options in CASES
]
torch.save(images, sys.argv[1])
"""


def test_without_the_extension(tmp_path):
    """Own denoisers to the byte; a network's kernels are others, which may move a uint8 by a level."""
    tests = Path(__file__).parent
    code = WITHOUT.format(path=[str(tests), str(tests.parent), str(tests.parent.parent)])
    environment = {**os.environ, "SIGN_FAST_DISABLE_EXT": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "images.pt")], env=environment, check=True)
    others = iter(torch.load(tmp_path / "images.pt"))
    for net in (Module(), function, network("ddpmpp-cond")):
        for noise in ("torch", "philox"):
            for output in ("uint8", "float"):
                for sampler, steps, options in CASES:
                    images = Engine(net, noise=noise).generate(SEEDS, sampler, steps, None, output, **options)
                    other = next(others)
                    if not isinstance(net, models.EDMPrecond):
                        assert torch.equal(images, other), (sampler, options, noise, output)
                    elif output == "uint8":
                        assert (images.int() - other.int()).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(dtype):
    engine = Engine(network("ddpmpp-cond"), dtype=dtype)
    jobs = [(seeds, rho) for seeds in ([1], [2, 3], [4, 5, 6]) for rho in (5, 6, 7)]
    want = [engine.generate(seeds, "edm", 3, None, rho=rho, S_churn=1.0) for seeds, rho in jobs]

    def work(offset):
        for seeds, rho in jobs[offset:] + jobs[:offset]:
            yield jobs.index((seeds, rho)), engine.generate(seeds, "edm", 3, None, rho=rho, S_churn=1.0)

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda offset: list(work(offset)), range(4)):
            assert len(results) == len(jobs) and all(torch.equal(image, want[i]) for i, image in results)


def test_threads_that_crowd_the_plans_out(monkeypatch):
    monkeypatch.setattr(module, "_PLANS_KEPT", 2)
    engine = Engine(function)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda i: engine._prepare("few_step", 2, {"sigma": 1.0 + i % 5}).plan, range(400)))
    assert [plan.levels[0] for plan in plans] == [1.0 + i % 5 for i in range(400)] and len(engine._plans) == 2


def long_run():
    """Many short steps."""
    return Engine(models.load("digits-uncond", "cpu")).generate(range(128), "edm", 60, None)


@pytest.mark.skipif(extension.module() is None, reason="without the extension Python sees signals anyway")
def test_ctrl_c_arrives_between_two_steps():
    start = time.process_time()
    want = long_run()
    work = time.process_time() - start  # of this process alone, whatever else the machine does
    before = signal.signal(signal.SIGPROF, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, work / 10)
            long_run()
        done = time.process_time() - start
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert done < 0.7 * work  # a loop that sees no signal would do all of it
    assert torch.equal(long_run(), want)


@pytest.mark.skipif(extension.module() is None, reason="Python's own loop holds the lock in between")
def test_other_threads_run_meanwhile():
    done, counted = threading.Event(), []

    def count():
        while not done.is_set():
            counted.append(None)
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is asked to give the lock up: it has to be let go
    try:
        thread.start()
        begun = len(counted)
        long_run()
        meanwhile = len(counted) - begun
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert meanwhile > 10
