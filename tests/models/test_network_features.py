"""What users do with networks: presets, copies, pickles, compilers, dtypes, layouts, several processes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from sign_fast import models
from sign_fast.errors import SignFastError
from tests.golden_rules import OUTPUT_TOLERANCE, arrays, golden_net, normal, relative_error, settings

OFFICIAL = settings("official_configs")


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configuration(name):
    entry = OFFICIAL[name]
    with torch.device("meta"):
        net = models.create(name)
    state = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in net.state_dict().items()}
    assert type(net).__name__ == entry["cls"]
    assert list(state.items()) == list(entry["state_dict"].items())
    assert sum(p.numel() for p in net.parameters()) == entry["params"]


def test_built_by_name_as_published_programs_do():
    class_name, kwargs = "sign_fast.models.EDMPrecond", settings("networks")["nets"]["ddpmpp"]["kwargs"]
    module, attribute = class_name.rsplit(".", 1)
    net = getattr(__import__(module, fromlist=[attribute]), attribute)(**kwargs, use_fp16=True, sigma_data=0.5)
    net.train().requires_grad_(False)
    assert (net.img_resolution, net.img_channels, net.label_dim, net.use_fp16) == (16, 3, 0, True)
    assert net.sigma_min == 0 and net.sigma_max == float("inf")
    assert isinstance(net.model, models.SongUNet)
    assert torch.equal(net.round_sigma(torch.tensor(3.0)), torch.tensor(3.0))


def small(cond=False, **overrides):
    torch.manual_seed(0)
    net = models.create("digits-cond" if cond else "digits-uncond", **overrides).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))  # last layers start near zero
    return net


X, SIGMA = normal(1, 2, 1, 8, 8), torch.tensor([0.3, 2.0])


@torch.no_grad()
def test_deepcopy_and_pickle():
    net = small()
    want = net(X, SIGMA)
    assert torch.equal(copy.deepcopy(net)(X, SIGMA), want)
    assert torch.equal(pickle.load(io.BytesIO(pickle.dumps(net)))(X, SIGMA), want)


def test_compile_without_a_break_forward_and_backward():
    net = small(cond=True)
    labels = torch.eye(10)[[1, 4]]
    want = net(X, SIGMA, labels)
    grads = torch.autograd.grad(want.square().sum(), list(net.parameters()))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # tests/kernels/test_compile.py runs inductor
    got = compiled(X, SIGMA, labels)
    assert relative_error(got, want) <= OUTPUT_TOLERANCE
    for a, b in zip(torch.autograd.grad(got.square().sum(), list(net.parameters())), grads, strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-4 * float(b.abs().max()) + 1e-8)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp_cond", "ve_skip", "adm_cond"])
def test_channels_last_forward_and_backward(name):
    entry = settings("networks")["nets"][name]
    net = golden_net(name).to(memory_format=torch.channels_last)
    dim = entry["kwargs"].get("label_dim", 0)
    labels = torch.eye(dim)[[1, 4, 7]] if dim else None
    sigma = torch.tensor([0.02, 0.8, 2.5]).reshape(-1, 1, 1, 1)
    x = normal(entry["x_seed"], 3, 3, 16, 16) * sigma
    extra = {}
    if entry["kwargs"].get("augment_dim"):
        extra["augment_labels"] = normal(entry["aug_seed"], 3, entry["kwargs"]["augment_dim"])
    with torch.no_grad():
        assert relative_error(net(x, sigma, labels, **extra), arrays("networks")[f"{name}/y"]) <= OUTPUT_TOLERANCE
    x.requires_grad_()
    y = net(x, sigma, labels, **extra)
    (y * normal(entry["w_seed"], *y.shape)).sum().backward()
    assert relative_error(x.grad, arrays("networks")[f"{name}/dx"]) <= 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ddpmpp", "adm_cond"])
def test_half_precision_on_any_device(name, dtype):
    from benchmarks.plain import Plain

    net = golden_net(name)
    x, sigma = normal(1, 3, 3, 16, 16), torch.tensor([0.02, 0.8, 2.5])
    with torch.no_grad():
        exact = net(x, sigma, dtype=torch.float64)
        by_call = net(x, sigma, dtype=dtype)
        by_constructor = golden_net(name, dtype=dtype)(x, sigma)
        forced = golden_net(name, dtype=dtype)(x, sigma, force_fp32=True)
        single = net(x, sigma)
        plain = Plain(net, dtype)(x, sigma)
    assert by_call.dtype == torch.float32
    assert torch.equal(by_call, by_constructor)
    assert torch.equal(forced, single)
    error, base = ((t.double() - exact).abs().max() for t in (by_call, plain))
    assert 0 < error <= 2 * base


def test_half_precision_trains():
    net = small(dtype=torch.bfloat16).train()
    net(X, SIGMA).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in net.parameters())


def test_use_fp16_is_for_cuda_only():
    assert torch.equal(small(use_fp16=True)(X, SIGMA), small()(X, SIGMA))


def _ddp_worker(rank, path, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    net = torch.nn.parallel.DistributedDataParallel(small(cond=True).train())
    net(X[rank : rank + 1], SIGMA[rank : rank + 1], torch.eye(10)[rank : rank + 1]).square().sum().backward()
    queue.put((rank, [p.grad.clone().numpy() for p in net.parameters()]))
    dist.destroy_process_group()


def test_ddp(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_ddp_worker, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    net = small(cond=True).train()
    net(X, SIGMA, torch.eye(10)[:2]).square().sum().backward()
    for a, b, p in zip(results[0], results[1], net.parameters(), strict=True):
        assert (a == b).all()
        assert relative_error(a * 2, p.grad) <= 2e-4 if p.grad.abs().max() > 0 else not a.any()


def test_label_dropout_only_in_training():
    net = small(cond=True, label_dropout=0.999)
    labels = torch.eye(10)[[1, 4]]
    assert not torch.equal(net(X, SIGMA, labels), net(X, SIGMA, None))
    net.train()
    torch.manual_seed(0)
    assert torch.equal(net(X, SIGMA, labels), net(X, SIGMA, None))


def test_iddpm_rounds_to_its_levels():
    net = golden_net("adm_iddpm")
    assert net.u.shape == (1001,) and net.u[1000] == 0 and bool((net.u[:-1] > net.u[1:]).all())
    assert net.round_sigma(net.u[7] * 1.00001) == net.u[7]
    assert net.round_sigma(net.u[[3, 9]].reshape(2, 1), return_index=True).tolist() == [[3], [9]]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: models.create("cifar10-uncond-vq"), SignFastError, "did you mean 'cifar10-uncond-vp'"),
        (lambda: models.create("digits-uncond", model_type="VGG"), ValueError, "model_type must be one of"),
        (lambda: models.create("digits-uncond", encoder_type="odd"), ValueError, "encoder_type must be one of"),
        (lambda: models.create("digits-uncond", dtype=torch.int8), ValueError, "dtype must be"),
        (lambda: small(cond=True)(X, SIGMA, torch.eye(9)[:2]), ValueError, r"must be \(B, 10\)"),
        (lambda: models.Conv2d(1, 1, 3, up=True, down=True), ValueError, "up or down"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("up, down", [(True, False), (False, True)])
def test_box_resampling_is_the_filter(up, down):
    x = normal(1, 2, 6, 8, 8)
    layer = models.Conv2d(6, 6, 0, up=up, down=down)
    f = layer.resample_filter.tile([6, 1, 1, 1])
    assert layer.box
    if up:
        want = torch.nn.functional.conv_transpose2d(x, f * 4, stride=2, groups=6)
    else:
        want = torch.nn.functional.conv2d(x, f, stride=2, groups=6)
    assert relative_error(layer(x), want) <= 1e-6


def test_forward_mode_derivatives_of_a_network():
    """What training by consistency or mean flows takes: torch.func.jvp through every operation."""
    torch.manual_seed(0)
    net = models.create("digits-uncond").eval().requires_grad_(False)
    for p in net.parameters():
        p.copy_(p + 0.1 * torch.randn_like(p))  # the published initialisation leaves some layers at 0
    x, t, sigma = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    _, tangent = torch.func.jvp(lambda x: net(x, sigma), (x,), (t,))
    leaf, weight = x.clone().requires_grad_(), torch.randn_like(x)
    (gradient,) = torch.autograd.grad(net(leaf, sigma), leaf, weight)
    want = (gradient * t).sum()  # wᵀ(J t) = (Jᵀw)ᵀt
    assert tangent.abs().max() > 0.01
    assert ((tangent * weight).sum() - want).abs() <= 1e-5 * (tangent.abs() * weight.abs()).sum()
