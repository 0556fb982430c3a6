"""SiDA's discriminator: the encoder's output out of one forward, through wrappers, and what NaN samples count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sign_fast import models
from sign_fast.distill.discriminator import (
    denoise_and_discriminate,
    discriminate,
    discriminator_loss,
    generator_adversarial_loss,
    pooled_logits,
)
from tests.golden_rules import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, fill, normal, relative_error, settings
from tests.network_cases import NETWORKS, inputs, network

OFFICIAL = settings("official_configs")
NAN = float("nan")


def official_at_small_size(name: str) -> models.Precond:
    entry = OFFICIAL[name]
    channels = 64 if entry["kwargs"]["model_type"] == "DhariwalUNet" else 16
    small: dict[str, Any] = {"img_resolution": 16, "model_channels": channels, "num_blocks": 1}
    net = getattr(models, entry["cls"])(**{**entry["kwargs"], **small})
    return fill(net, 3).eval().requires_grad_(False)


@pytest.fixture(params=[*OFFICIAL, *NETWORKS])
def net(request):
    return official_at_small_size(request.param) if request.param in OFFICIAL else network(request.param)


@torch.no_grad()
def test_logits_are_those_of_a_hook(net):
    """The encoder's end is what the decoder's first block reads."""
    x, sigma, labels = inputs(net)
    seen = []
    first = next(iter(net.model.dec.values()))
    hook = first.register_forward_pre_hook(lambda layer, args: seen.append(args[0].clone()))
    want = net(x, sigma, labels)
    denoised, logits = denoise_and_discriminate(net, x, sigma, labels)
    hook.remove()
    size = net.img_resolution >> len({name.split("x")[0] for name in net.model.enc}) - 1
    assert len(seen) == 2 and logits.shape == (2, 1, size, size) and logits.dtype == torch.float32
    assert torch.equal(denoised, want)
    assert torch.equal(logits, seen[0].mean(1, keepdim=True))
    ran = []
    hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in net.model.dec.values()]
    assert torch.equal(discriminate(net, x, sigma, labels), logits) and not ran
    for hook in hooks:
        hook.remove()


def test_the_last_block_is_the_end_of_the_published_encoders():
    for name in OFFICIAL:
        net = official_at_small_size(name)
        x, sigma, labels = inputs(net)
        seen = []
        last = list(net.model.enc.values())[-1]
        last.register_forward_hook(lambda layer, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            h = net(x, sigma, labels, encoder="only")
        assert h is seen[0]


def test_a_time_free_student_has_an_encoder_too():
    student = models.IdempotentPrecond.from_teacher(network("ddpmpp"))
    x = inputs(network("ddpmpp"))[0]
    denoised, h = student(x, encoder="also")
    assert torch.equal(denoised, student(x)) and torch.equal(h, student(x, encoder="only"))


@pytest.mark.parametrize("name", ["ddpmpp", "adm-cond"])
def test_unknown_choice(name):
    net = network(name)
    x, sigma, labels = inputs(net)
    with pytest.raises(ValueError, match="encoder must be one of also, only, not 'first'"):
        net(x, sigma, labels, encoder="first")


@pytest.mark.parametrize("name", ["ncsnpp", "adm-cond"])
@torch.no_grad()
def test_low_precision_inside_float32_outside(name):
    net = network(name)
    x, sigma, labels = inputs(net)
    h = net(x, sigma, labels, dtype=torch.bfloat16, encoder="only")
    denoised, logits = denoise_and_discriminate(net, x, sigma, labels, dtype=torch.bfloat16)
    assert h.dtype == torch.bfloat16 and denoised.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, h.float().mean(1, keepdim=True)) and torch.equal(logits, pooled_logits(h))
    exact = discriminate(net, x, sigma, labels, dtype=torch.float64)
    assert exact.dtype == torch.float64 and 1e-6 < relative_error(logits, exact) < 0.1


def losses_and_gradients(call, net, x, sigma, labels):
    """Of a loss that needs both outputs: value, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    for p in net.parameters():
        p.grad = None
    denoised, logits = denoise_and_discriminate(call, x, sigma, labels)
    ((denoised * normal(7, *denoised.shape)).sum() + (logits * normal(8, *logits.shape)).sum()).backward()
    return [denoised, logits, x.grad, *[p.grad for p in net.parameters() if p.grad is not None]]


def check_alike(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= GRADIENT_TOLERANCE if b.abs().max() > 1e-6 else a.abs().max() <= 1e-6


def trainable(name):
    net = network(name).requires_grad_(True)
    return net, *inputs(net)


@pytest.mark.parametrize("name", ["ddpmpp-no-blocks", "adm-iddpm"])
def test_compiled_without_a_break(name):
    net, x, sigma, labels = trainable(name)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    check_alike(losses_and_gradients(compiled, net, x, sigma, labels), losses_and_gradients(net, net, x, sigma, labels))


def test_checkpointed():
    net, x, sigma, labels = trainable("ncsnpp")

    def call(*args, **kwargs):
        return checkpoint(net, *args, use_reentrant=False, **kwargs)

    check_alike(losses_and_gradients(call, net, x, sigma, labels), losses_and_gradients(net, net, x, sigma, labels))


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "inner"])
def test_under_ddp(process_group, inner):
    """Decoder's and encoder's gradients in one backward pass, of a whole call and one without its decoder."""
    from torch.nn.parallel import DistributedDataParallel

    net, x, sigma, labels = trainable("adm-cond")

    def gradients(call):
        net.zero_grad(set_to_none=True)
        denoised, fake = denoise_and_discriminate(call, x, sigma, labels)
        real = discriminate(call, -x, sigma, labels)
        (denoised.square().sum() + discriminator_loss(real, fake, sigma).sum()).backward()
        return [p.grad.clone() for p in net.parameters()]

    want = gradients(net)
    if inner:
        net.model = DistributedDataParallel(net.model)
        check_alike(gradients(net), want)
    else:
        check_alike(gradients(DistributedDataParallel(net)), want)


def test_under_fsdp2(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, x, sigma, labels = trainable("adm-cond")
    want = losses_and_gradients(net, net, x, sigma, labels)
    mesh = init_device_mesh("cpu", (1,))
    for block in [*net.model.enc.values(), *net.model.dec.values()]:
        fully_shard(block, mesh=mesh)
    fully_shard(net.model, mesh=mesh)
    fully_shard(net, mesh=mesh)
    got = losses_and_gradients(net, net, x, sigma, labels)
    check_alike([t.full_tensor() if hasattr(t, "full_tensor") else t for t in got], want)


MAP = (4, 1, 2, 2)


def test_weights_of_the_whole_batch_make_its_parts_add_up():
    real, fake, sigma = normal(1, *MAP), normal(2, *MAP), normal(3, 4).exp()
    whole = discriminator_loss(real, fake, sigma)
    weight = (sigma**-2 + 4).mean()
    parts = [discriminator_loss(real[i], fake[i], sigma[i], weight=weight) for i in (slice(0, 1), slice(1, 4))]
    assert relative_error(torch.cat(parts), whole) <= OUTPUT_TOLERANCE
    images, y_real = normal(4, 4, 3, 8, 8), normal(5, 4, 3, 8, 8)
    whole = generator_adversarial_loss(fake, images, y_real)
    weight = (1 / (images - y_real).abs().mean((1, 2, 3))).mean()
    parts = [
        generator_adversarial_loss(fake[i], images[i], y_real[i], weight=weight) for i in (slice(0, 1), slice(1, 4))
    ]
    assert relative_error(torch.cat(parts), whole) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_sample_counts_nothing_for_the_discriminator_and_the_divisor_stays(which):
    logits = [normal(1, *MAP), normal(2, *MAP)]
    sigma = normal(3, 4).exp()
    keep = [0, 1, 3]
    weight = (sigma[keep] ** -2 + 4).sum() / 4
    want = discriminator_loss(logits[0][keep], logits[1][keep], sigma[keep], weight=weight)
    logits[which][2, 0, 1, 0] = NAN
    for t in logits:
        t.requires_grad_()
    got = discriminator_loss(*logits, sigma)
    got.sum().backward()
    assert got[2] == 0 and relative_error(got[keep], want) <= OUTPUT_TOLERANCE
    assert not any(t.grad[2].any() for t in logits) and all(torch.isfinite(t.grad).all() for t in logits)


@pytest.mark.parametrize("which", ["logits", "images", "y_real"])
def test_a_nan_sample_counts_nothing_for_the_student_and_the_divisor_stays(which):
    given = {"logits": normal(1, *MAP), "images": normal(2, 4, 3, 8, 8), "y_real": normal(3, 4, 3, 8, 8)}
    keep = [0, 1, 3]
    clean = {name: t[keep] for name, t in given.items()}
    weight = (1 / (clean["images"] - clean["y_real"]).abs().mean((1, 2, 3))).sum() / 4
    want = generator_adversarial_loss(**clean, weight=weight)
    given[which][2].view(-1)[0] = NAN
    given["logits"].requires_grad_()
    got = generator_adversarial_loss(**given)
    got.sum().backward()
    assert got[2] == 0 and relative_error(got[keep], want) <= OUTPUT_TOLERANCE
    assert not given["logits"].grad[2].any() and torch.isfinite(given["logits"].grad).all()


def test_omega_has_a_floor_and_no_gradient():
    images = normal(1, 2, 3, 4, 4).requires_grad_()
    y_real = images.detach().clone().requires_grad_()
    logits = torch.zeros(2, 1, 1, 1, requires_grad=True)
    loss = generator_adversarial_loss(logits, images, y_real)
    assert relative_error(loss, torch.full([2], 48 * torch.log(torch.tensor(2.0)) / 1e-5)) <= OUTPUT_TOLERANCE
    assert torch.autograd.grad(loss.sum(), [images, y_real], allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: discriminator_loss(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 4, 4), torch.ones(2)), "must agree"),
        (lambda: discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(3)), "must hold 2 values, not 3"),
        (lambda: generator_adversarial_loss(torch.zeros(2, 1), torch.zeros(2, 4), torch.zeros(2, 5)), "must agree"),
        (lambda: generator_adversarial_loss(torch.zeros(3, 1), torch.zeros(2, 4), torch.zeros(2, 4)), "of 3 samples"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
