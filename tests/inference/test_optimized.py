"""optimize: the values of the plain network, in every configuration, dtype and way to be called."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sign_fast import models, optimize
from sign_fast.errors import SignFastError
from sign_fast.inference import conditioning
from sign_fast.inference.fuse import fuse_joins
from sign_fast.inference.program import JoinNorm
from sign_fast.kernels import extension
from tests.golden_rules import OUTPUT_TOLERANCE, arrays, golden_net, normal, relative_error, settings
from tests.network_cases import NETWORKS, inputs, network
from tests.oracle import assert_close

TOLERANCE = 1e-5  # of the largest output, float32 (issue 4)


@pytest.fixture(scope="module", params=NETWORKS)
def net(request):
    return network(request.param)


@pytest.fixture(scope="module")
def cond():
    return network("ddpmpp-cond")


@torch.no_grad()
def test_float32(net):
    x, sigma, labels = inputs(net)
    optimized = optimize(net)
    for arguments in ((sigma, labels), (2.5, labels), (2.5, None), (sigma[:1].double(), None)):
        got = optimized(x, *arguments)
        assert got.dtype == torch.float32
        assert relative_error(got, net(x, *arguments)) <= TOLERANCE


@torch.no_grad()
def test_folding_is_exact_in_float64(net):
    x, sigma, labels = inputs(net)
    optimized = optimize(net, torch.float64)
    for arguments in ((sigma, labels), (2.5, None)):
        want = net(x, *arguments, dtype=torch.float64)
        assert relative_error(optimized(x, *arguments), want) <= 1e-12
    optimized.program = fuse_joins(optimized.program)
    assert any(isinstance(operation, JoinNorm) for operation in optimized.program.operations)
    assert relative_error(optimized(x, 2.5), want) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_16_bits(net, dtype, fused):
    x, sigma, labels = inputs(net, batch=4)
    optimized = optimize(net, dtype)
    if fused:
        optimized.program = fuse_joins(optimized.program)
    want = net(x, sigma, labels, dtype=torch.float64)
    plain = net(x, sigma, labels, dtype=dtype)
    got = optimized(x, sigma, labels)
    assert got.dtype == torch.float32
    scale = want.abs().amax((1, 2, 3), keepdim=True)  # noise levels of very different outputs
    assert_close((got / scale).to(dtype), want / scale, (plain / scale).to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("name", settings("networks")["nets"])
def test_golden_networks(name):
    entry = settings("networks")["nets"][name]
    kwargs = entry["kwargs"]
    optimized = optimize(golden_net(name))
    sigma = torch.tensor([0.02, 0.8, 2.5]).reshape(-1, 1, 1, 1)
    x = normal(entry["x_seed"], 3, kwargs["img_channels"], *[kwargs["img_resolution"]] * 2) * sigma
    assert relative_error(optimized(x, 0.5), arrays("networks")[f"{name}/y_none"]) <= OUTPUT_TOLERANCE
    if not kwargs.get("augment_dim"):
        label_dim = kwargs.get("label_dim", 0)
        labels = torch.eye(label_dim)[[i % label_dim for i in (1, 4, 7)]] if label_dim else None
        assert relative_error(optimized(x, sigma, labels), arrays("networks")[f"{name}/y"]) <= OUTPUT_TOLERANCE


@torch.no_grad()
def test_labels_of_any_kind(cond):
    x, sigma, labels = inputs(cond)
    optimized = optimize(cond)
    mixed = torch.tensor([[0.2, 0.5, 0.3]])
    for given in (labels.double(), labels.long(), labels[:1], mixed):
        assert relative_error(optimized(x, sigma, given), cond(x, sigma, given)) <= TOLERANCE


@torch.no_grad()
def test_attributes(net):
    optimized = optimize(net)
    for name in ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max"):
        assert getattr(optimized, name) == getattr(net, name)
    assert optimized.dtype == torch.float32 and optimized.device.type == "cpu"
    assert torch.equal(optimized.round_sigma(torch.tensor([0.37])), net.round_sigma(torch.tensor([0.37])))
    assert not optimized.training and not any(p.requires_grad for p in optimized.parameters())


def storages(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def test_shares_no_memory(net):
    before = {name: p.clone() for name, p in net.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        assert not storages(optimize(net, dtype)) & storages(net)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consume(net, dtype):
    x, sigma, labels = inputs(net)
    want = optimize(net, dtype)(x, sigma, labels)
    spent = copy.deepcopy(net)
    optimized = optimize(spent, dtype, consume=True)
    assert all(p.numel() == 0 for p in spent.parameters())
    assert torch.equal(optimized(x, sigma, labels), want)
    optimized.update(net)
    assert torch.equal(optimized(x, sigma, labels), want)


@torch.no_grad()
def test_lean(net):
    """Weights in the C++ program alone: the same images, further trained weights are taken, the rest is refused."""
    x, sigma, labels = inputs(net)
    want = optimize(net)(x, sigma, labels)
    lean = optimize(copy.deepcopy(net), consume=True, lean=True)
    assert torch.equal(lean(x, sigma, labels), want)
    further = copy.deepcopy(net)
    for p in further.parameters():
        p.mul_(1.1).add_(0.02)
    lean(x, 2.5)  # a table that has to be computed anew
    lean.update(further)
    assert torch.equal(lean(x, sigma, labels), optimize(further)(x, sigma, labels))
    assert torch.equal(lean(x, 2.5), optimize(further)(x, 2.5))


@pytest.mark.skipif(extension.module() is None, reason="nothing is packed without the extension")
def test_what_a_lean_network_cannot_do(cond):
    whole, lean = optimize(cond), optimize(cond, lean=True)
    convolutions = sum(c.nbytes for c in whole.program.constants if c.ndim == 4)
    assert sum(t.nbytes for t in lean.buffers()) < sum(t.nbytes for t in whole.buffers()) - 0.9 * convolutions
    refused = [
        ("copied", lambda: copy.deepcopy(lean)),
        ("copied", lambda: copy.copy(lean)),
        ("copied", lambda: pickle.dumps(lean)),
        ("moved", lambda: lean.to("cpu")),
        ("moved", lambda: lean.half()),
        ("saved", lambda: lean.state_dict()),
        ("loaded into", lambda: lean.load_state_dict(whole.state_dict())),
    ]
    for what, call in refused:
        with pytest.raises(SignFastError, match=f"a lean network cannot be {what}: optimize the original") as caught:
            call()
        assert "\n" not in str(caught.value)
    x, sigma, labels = inputs(cond)
    with torch.no_grad():
        assert torch.equal(lean(x, sigma, labels), whole(x, sigma, labels))
    # 16 bits are not packed: lean changes nothing
    assert copy.deepcopy(optimize(cond, torch.bfloat16, lean=True)).state_dict()


@torch.no_grad()
@pytest.mark.parametrize("table", [True, False])
def test_update_in_place(net, table, monkeypatch):
    if not table:
        monkeypatch.setattr(conditioning, "_TABLE_BYTES", 0)
    optimized = optimize(net)
    further = copy.deepcopy(net)
    for p in further.parameters():
        p.mul_(1.1).add_(0.02)
    x, sigma, labels = inputs(net)
    held = optimized.conditioning((2.5,))
    assert (held.table is not None) == table
    pointers = [b.data_ptr() for b in (*optimized.buffers(), held._held)]
    optimized.update(further)
    assert pointers == [b.data_ptr() for b in (*optimized.buffers(), held._held)]
    assert optimized.conditioning((2.5,)) is held
    for arguments in ((2.5, None), (sigma, labels)):
        assert relative_error(optimized(x, *arguments), further(x, *arguments)) <= TOLERANCE


def test_update_after_inference_mode(cond):
    """What was cached in inference mode can be computed anew outside of it."""
    x, sigma, labels = inputs(cond)
    with torch.inference_mode():
        optimized = optimize(cond)
        want = optimized(x, 2.5)
        optimized(x, sigma, labels)
    optimized.update(network("ddpmpp-cond", seed=2))
    optimized.update(cond)
    assert torch.equal(optimized(x, 2.5), want)


def test_update_refuses_another_structure(cond):
    with pytest.raises(SignFastError, match="same structure"):
        optimize(cond).update(network("ddpmpp"))


@torch.no_grad()
def test_copy_state_and_moves(cond):
    x, sigma, labels = inputs(cond)
    optimized = optimize(cond)
    want = optimized(x, sigma, labels)
    clone = copy.deepcopy(optimized).to("cpu").eval()
    assert torch.equal(clone(x, sigma, labels), want)
    assert not storages(clone) & storages(optimized)

    other = optimize(network("ddpmpp-cond", seed=2))
    other(x, 2.5)  # fills a table that has to be computed anew
    assert not torch.equal(other(x, sigma, labels), want)
    other.load_state_dict(optimized.state_dict())
    assert torch.equal(other(x, sigma, labels), want)
    assert torch.equal(other(x, 2.5), optimized(x, 2.5))
    assigned = optimize(network("ddpmpp-cond", seed=2))
    assigned(x, 2.5)
    assigned.load_state_dict(optimized.state_dict(), assign=True)
    assert torch.equal(assigned(x, sigma, labels), want)
    assert torch.equal(assigned(x, 2.5), optimized(x, 2.5))
    with pytest.raises(SignFastError, match="keeps its dtype"):
        optimized.half()
    assert torch.equal(optimized(x, sigma, labels), want)


def test_nothing_waits_for_the_device(net):
    """The meta device has no values: what asks for one raises."""
    optimized = optimize(net).to("meta")
    x, sigma, labels = (None if t is None else t.to("meta") for t in inputs(net))
    assert optimized(x, sigma, labels).shape == x.shape
    assert optimized(x, sigma[:1]).is_meta
    if isinstance(net, models.iDDPMPrecond):
        return  # for a level on the host it looks into its list, once
    rows = optimized.conditioning((0.5, 2.5)).rows(1, None if labels is None else labels.argmax(1))
    assert rows.shape == (1 if labels is None else 2, optimized.program.width)


@torch.no_grad()
def test_many_threads(cond):
    """Levels come and go in the cache while others are computed."""
    x, _, _ = inputs(cond)
    optimized = optimize(cond)
    levels = [1 + i / 100 for i in range(80)]
    want = [optimized(x, level) for level in levels]

    @torch.no_grad()
    def run(offset):
        return all(torch.equal(optimized(x, levels[i - offset]), want[i - offset]) for i in range(80))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_bad_calls(cond):
    x, sigma, labels = inputs(cond)
    optimized = optimize(cond)
    with pytest.raises(SignFastError, match="does not take augment_labels"):
        optimized(x, sigma, labels, augment_labels=torch.zeros(2, 9))
    with pytest.raises(SignFastError, match="no gradients"):
        optimized(x.clone().requires_grad_(), sigma, labels)
    with pytest.raises(ValueError, match="class_labels must be"):
        optimized(x, sigma, torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"network of sign_fast\.models"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"network of sign_fast\.models"):
        optimize(optimized)
    with pytest.raises(ValueError, match="dtype must be"):
        optimize(cond, torch.int32)


OFFICIAL = [name for name in models.preset_names() if not name.startswith("digits")]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_configurations(name):
    with torch.device("meta"):
        net = models.create(name).eval()
    optimized = optimize(net, torch.bfloat16)
    x = torch.empty(2, 3, net.img_resolution, net.img_resolution, device="meta")
    assert optimized(x, 2.5).shape == x.shape
    # every weight is there once: those of the convolutions, norms, affines and the embedding
    unused = sum(p.numel() for n, p in net.named_parameters() if n.startswith("model.map_augment"))
    assert sum(b.numel() for b in optimized.buffers()) <= sum(p.numel() for p in net.parameters()) * 1.002 - unused


def test_top_level_name():
    import sign_fast
    from sign_fast.inference import optimized

    assert sign_fast.optimize is optimized.optimize
