"""`ImageGenerator`: shapes, seeds, labels, samplers, streams and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sign_fast import ImageGenerator, models
from sign_fast.errors import SignFastError
from sign_fast.sampling import multistep, parse_seeds, recursive
from sign_fast.sampling.engine import Engine
from sign_fast.sampling.noise import SeededNoise, check_seeds
from sign_fast.sampling.transfer import Transfer


@pytest.fixture(scope="module")
def digits():
    return ImageGenerator.from_pretrained("digits-uncond", "cpu")


@pytest.fixture(scope="module")
def labelled():
    return ImageGenerator.from_pretrained("digits-cond", "cpu")


class Half:
    """A denoiser that is no module, D = x/2, and nothing but what must be there."""

    img_resolution, img_channels = 4, 3

    def __call__(self, x, sigma, labels):
        return x / 2


class TimeFree(torch.nn.Module):
    """A student without a time input, f(x) = a·x."""

    img_resolution, img_channels, label_dim, time_free = 4, 1, 0, True

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.a * x


@pytest.fixture(scope="module")
def time_free():
    return ImageGenerator(TimeFree())


def latents(seeds, *shape):
    return SeededNoise("cpu", seeds).randn([len(seeds), *shape])


def test_images(digits):
    images = digits(range(4), 3)
    assert images.shape == (4, 8, 8, 1) and images.dtype == torch.uint8 and images.is_contiguous()
    floats = digits(range(4), 3, output="float")
    assert floats.shape == (4, 1, 8, 8) and floats.dtype == torch.float32
    assert torch.equal((floats * 127.5 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1), images)


def test_a_seed_is_an_image_whatever_the_batch(digits):
    whole = digits(range(9), 4).int()
    for part in ([8, 0, 3], [5]):
        assert (digits(part, 4).int() - whole[part]).abs().max() <= 1


def test_a_seed_is_an_image_whatever_the_default_dtype(digits, labelled):
    calls = [(digits, "edm"), (labelled, "few_step"), (labelled, "one_step")]
    want = [generator([1, 2], 1, sampler=sampler) for generator, sampler in calls]
    torch.set_default_dtype(torch.float64)
    try:
        for (generator, sampler), images in zip(calls, want, strict=True):
            assert torch.equal(generator([1, 2], 1, sampler=sampler), images)
    finally:
        torch.set_default_dtype(torch.float32)


def test_labels(labelled):
    threes = labelled([1, 2], 3, 3)
    for same in ([3], [3, 3], torch.tensor([3, 3]), np.array([3, 3]), np.int64(3)):
        assert torch.equal(labelled([1, 2], 3, same), threes)
    assert not torch.equal(labelled([1, 2], 3, [3, 4])[1], threes[1])
    assert torch.equal(labelled([1, 2], 3), labelled([1, 2], 3))  # drawn from the seeds


def test_low_precision_leaves_the_network_as_it_is(digits):
    net = models.load("digits-uncond", "cpu")
    other = ImageGenerator(net, "teacher", dtype=torch.bfloat16)
    assert 0 < (other(range(8), 18).float() - digits(range(8), 18).float()).abs().mean() < 8
    assert net.dtype is None


def test_further_training_is_taken_by_update(digits):
    net = models.load("digits-uncond", "cpu")
    generator = ImageGenerator(net, "teacher")
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.02)
    assert torch.equal(generator([1, 2], 3), digits([1, 2], 3))
    generator.net.update(net)
    assert torch.equal(generator([1, 2], 3), ImageGenerator(net, "teacher")([1, 2], 3))
    assert not torch.equal(generator([1, 2], 3), digits([1, 2], 3))


def test_samplers(digits):
    assert digits([0], 1, sampler="one_step").shape == digits([0], 4, sampler="few_step").shape == (1, 8, 8, 1)
    assert torch.equal(
        digits([0], 5, sampler=lambda net, z, labels, noise, num_steps: z)[0],
        digits([0], 9, sampler=lambda *a, **k: a[1])[0],
    )
    assert not torch.equal(digits([0], 4, sampler="edm", S_churn=10), digits([0], 4, sampler="edm"))


def test_philox_draws_other_images_that_are_the_seeds_own(labelled):
    philox = ImageGenerator.from_pretrained("digits-cond", "cpu", noise="philox")
    images = philox([3, 4, 5], 4, output="float")
    assert not torch.equal(images, labelled([3, 4, 5], 4, output="float"))
    assert (philox([5], 4, output="float") - images[2:]).abs().max() < 1e-4
    assert images.std() > 0.3 and len({int(image.sum() * 1e4) for image in images}) == 3


def test_any_denoiser():
    generate = ImageGenerator(Half())
    z = latents([1, 2], 3, 4, 4)
    assert torch.equal(generate([1, 2], output="float"), (z.double() * 2.5 / 2).float())
    assert torch.equal(
        generate([1, 2], sampler=lambda net, z, *rest, num_steps: net(z, None, None), output="float"), z / 2
    )


def test_student_without_time_input(time_free):
    z = latents([1, 2], 1, 4, 4)
    assert time_free.sampler == "recursive"
    assert torch.equal(time_free([1, 2], output="float"), z / 2)
    assert torch.equal(time_free([1, 2], 3, output="float"), z / 8)
    noise = SeededNoise("cpu", [1, 2])
    first = noise.randn([2, 1, 4, 4]) / 2
    want = 0.5 * (0.75 * first + 0.25 * noise.randn_like(first))
    torch.testing.assert_close(time_free([1, 2], None, None, "multistep", output="float", noise_levels=[0.25]), want)


def test_stream_and_submit(labelled):
    batches, labels = [range(5), [9], range(20, 23)], [0, 1, 2, 3, 4, 5, 6, 7, 8]
    streamed = list(labelled.stream(batches, 3, labels))
    assert [array.shape[0] for array in streamed] == [5, 1, 3] and all(
        isinstance(array, np.ndarray) for array in streamed
    )
    for batch, part, array in zip(batches, ([0, 1, 2, 3, 4], [5], [6, 7, 8]), streamed, strict=True):
        assert (labelled(batch, 3, part).numpy() == array).all()
    assert (labelled.submit(range(5), 3, labels[:5]).result() == streamed[0]).all()


@pytest.mark.parametrize(
    "device, order",
    [
        ("cpu", "made 0, used 0, made 1, used 1, made 2, used 2"),
        ("cuda", "made 0, made 1, used 0, made 2, used 1, used 2"),
    ],
)
def test_on_cuda_a_batch_is_launched_before_the_last_one_is_handed_out(digits, monkeypatch, device, order):
    events = []

    class Ring:
        def push(self, seed):
            return Transfer(lambda: seed)

    def generate(self, seeds, *rest, **options):
        events.append(f"made {seeds[0]}")
        return seeds[0]

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(Engine, "device", torch.device(device))
    generator = ImageGenerator(models.load("digits-uncond", "cpu"))
    generator._ring = Ring()
    for seed in generator.stream([[0], [1], [2]], 1):
        events.append(f"used {seed}")
    assert ", ".join(events) == order


@pytest.mark.parametrize("call", ["__call__", "submit", "stream", "check"])
@pytest.mark.parametrize(
    "words, options, message",
    [
        (([],), {}, "no seeds"),
        (([1.0],), {}, "seed 1.0 is not a whole number"),
        ((["1"],), {}, "seed '1' is not a whole number"),
        (([True],), {}, "seed True is not a whole number"),
        ((torch.zeros(3, 3),), {}, "is not a whole number"),
        (([-1],), {}, "seed -1 is out of range"),
        (([1 << 63],), {}, "seed 9223372036854775808 is out of range"),
        (([4, 5, 4],), {}, "seed 4 is there twice"),
        (([1], 0), {}, "steps must be at least 1, not 0"),
        (([1], 1.5), {}, "steps 1.5 is not a whole number"),
        (([1], 2, 3), {}, "unconditional"),
        (
            ([1], 2, None, "ddim"),
            {},
            "unknown sampler 'ddim': known: edm, ablation, one_step, few_step, recursive, multistep",
        ),
        (([1], 2, None, "one_step"), {}, "makes 1 step"),
        (([1], 2, None, "recursive"), {}, "this network takes a noise level: use edm or"),
        (([1], 2, None, "multistep"), {"noise_levels": [0.5]}, "this network takes a noise level"),
        (([1], 2, None, "few_step"), {"rho": 7, "S_churn": 1}, "few_step has no option rho, S_churn: it has sigma"),
        (([1], 2, None, "edm"), {"sigma": 7}, "edm has no option sigma: it has sigma_min,"),
        (([1], 2, None, "edm"), {"rho": "7"}, "rho of sampler edm must be a number, not '7'"),
        (([1], 2, None, "edm"), {"rho": None}, "rho of sampler edm must be a number, not None"),
        (([1], 2, None, "edm"), {"rho": 0}, "sampler edm cannot run with rho=0: division by zero"),
        (([1], 2, None, "edm"), {"sigma_min": 90}, "sigma_min 90 is above sigma_max 80"),
        (([1], 2, None, "few_step"), {"sigma": float("nan")}, "noise levels are not all finite"),
        (([1], 2, None, "ablation"), {"sigma_min": "7"}, "sigma_min of sampler ablation must be a number"),
        (([1], 2, None, "ablation"), {"solver": {}}, "solver of sampler ablation must be a word such as heun, not {}"),
        (([1], 2, None, "ablation"), {"solver": "rk4"}, "solver must be one of heun, euler, not 'rk4'"),
        (([1], 2, None, lambda net, z: z), {}, "cannot be called as <lambda>"),
        (([1], 2, None, lambda *a, num_steps: a[1]), {"rho": 7}, "unexpected keyword argument 'rho'"),
        (([1],), {"output": "png"}, "output must be uint8 or float, not 'png'"),
    ],
)
def test_refusals_come_before_any_work(digits, monkeypatch, call, words, options, message):
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: pytest.fail("work was begun"))
    if call == "stream":
        words = ([list(words[0])], *words[1:])
        message = "without seeds" if message == "no seeds" else message
    with pytest.raises(SignFastError) as caught:
        getattr(digits, call)(*words, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels, message",
    [
        (10, "class label 10 is out of range: this network has classes 0 to 9"),
        (-1, "class label -1 is out of range"),
        ([1, 2], "2 class labels for 3 images"),
        ([], "0 class labels for 3 images"),
        ([1.5, 1, 1], "class label 1.5 is not a whole number"),
        (torch.ones(3), "class label 1.0 is not a whole number"),
        ("abc", "class label 'a' is not a whole number"),
    ],
)
def test_bad_labels(labelled, labels, message):
    with pytest.raises(SignFastError, match=message):
        labelled([1, 2, 3], 2, labels)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ImageGenerator(Half(), "other"), "role must be teacher or student"),
        (lambda: ImageGenerator(Half(), noise="sobol"), "noise must be torch or philox, not 'sobol'"),
        (
            lambda: ImageGenerator(Half(), dtype=torch.int8),
            "dtype must be float32, bfloat16 or float16, not torch.int8",
        ),
        (lambda: ImageGenerator(Half(), dtype=torch.float16), "takes no dtype"),
        (lambda: ImageGenerator(lambda x, sigma, labels: x), "does not say its img_resolution and img_channels"),
        (lambda: ImageGenerator.from_pretrained("nowhere", noise="sobol"), "noise must be"),
        (lambda: ImageGenerator.from_pretrained("nowhere", dtype=torch.float64), "dtype must be"),
        (
            lambda: ImageGenerator(Half())([1], 4, sampler="edm"),
            "needs sigma_min, sigma_max, round_sigma of the network",
        ),
        (lambda: ImageGenerator(TimeFree())([1], sampler="edm"), "takes no noise level: use recursive or multistep"),
        (lambda: ImageGenerator(TimeFree())([1], sigma=2.5), "recursive has no option sigma: it has none"),
        (lambda: ImageGenerator(TimeFree())([1], sampler="multistep"), "needs noise_levels"),
        (
            lambda: ImageGenerator(TimeFree())([1], 3, sampler="multistep", noise_levels=[1]),
            "1 noise_levels for 3 steps",
        ),
        (lambda: ImageGenerator(TimeFree())([1], sampler="multistep", noise_levels=[2]), r"numbers in \[0, 1\]"),
        (lambda: ImageGenerator(Half()).stream([[1, 2], [2]]), "seed 2 is there twice"),
        (lambda: ImageGenerator(Half()).stream([]), "no seeds"),
        (lambda: check_seeds(5), "must be a list of whole numbers, not 5"),
    ],
)
def test_refusals_of_networks(make, message):
    with pytest.raises(SignFastError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_parse_and_check_seeds():
    assert parse_seeds("0-3,70, 5") == [0, 1, 2, 3, 70, 5]
    assert check_seeds(np.arange(3)) == check_seeds(torch.arange(3)) == check_seeds(iter([0, 1, 2])) == [0, 1, 2]
    assert check_seeds([(1 << 63) - 1]) == [(1 << 63) - 1]


def test_recursive_and_multistep_by_hand():
    z = torch.full((1, 1, 2, 2), 8.0)
    assert torch.equal(recursive(lambda x: x / 2, z, 3), z / 8)
    noise = torch.ones_like(z)
    got = multistep(lambda x: x + 1, z, [0.5], randn_like=lambda x: noise)
    assert torch.equal(got, 0.5 * (z + 1) + 0.5 * noise + 1)
    with pytest.raises(ValueError, match="at least 1"):
        recursive(lambda x: x, z, 0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        multistep(lambda x: x, z, [1.5])
