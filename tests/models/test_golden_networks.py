"""Every network of the published programs: state, forward, input gradient and every parameter-gradient norm."""

from __future__ import annotations

import pytest
import torch

from tests.golden_rules import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    golden_net,
    normal,
    relative_error,
    settings,
)

NETS = list(settings("networks")["nets"])


@pytest.fixture(scope="module", params=NETS)
def case(request):
    name = request.param
    entry = settings("networks")["nets"][name]
    net = golden_net(name)
    kwargs = entry["kwargs"]
    size = kwargs["img_resolution"]
    sigma = torch.tensor([0.02, 0.8, 2.5]).reshape(-1, 1, 1, 1)
    x = (normal(entry["x_seed"], 3, kwargs["img_channels"], size, size) * sigma).requires_grad_()
    label_dim = kwargs.get("label_dim", 0)
    labels = torch.eye(label_dim)[[i % label_dim for i in (1, 4, 7)]] if label_dim else None
    extra = {}
    if kwargs.get("augment_dim"):
        extra["augment_labels"] = normal(entry["aug_seed"], 3, kwargs["augment_dim"])
    y = net(x, sigma, labels, **extra)
    (y * normal(entry["w_seed"], *y.shape)).sum().backward()
    return name, entry, net, x, y


def test_state_dict(case):
    _, entry, net, _, _ = case
    state = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert list(state.items()) == list(entry["state_dict"].items())
    assert sum(p.numel() for p in net.parameters()) == entry["params"]


def test_forward(case):
    name, _, _, _, y = case
    assert relative_error(y, arrays("networks")[f"{name}/y"]) <= OUTPUT_TOLERANCE


def test_input_gradient(case):
    name, _, _, x, _ = case
    assert relative_error(x.grad, arrays("networks")[f"{name}/dx"]) <= GRADIENT_TOLERANCE


def test_parameter_gradient_norms(case):
    _, entry, net, _, _ = case
    # the third gradient norms belong to parameters that the loss does not reach: recorded as absent
    norms = {name: float(p.grad.norm()) for name, p in net.named_parameters() if p.grad is not None}
    assert norms.keys() == entry["grad_norms"].keys()
    for name, want in entry["grad_norms"].items():
        assert abs(norms[name] - want) <= GRADIENT_TOLERANCE * abs(want), name


def test_without_labels_and_with_float64(case):
    name, entry, net, x, _ = case
    wide = x.detach().double()
    with torch.no_grad():
        y = net(wide, torch.tensor(0.5, dtype=torch.float64))
    assert str(y.dtype) == entry["y_none_dtype"]
    assert relative_error(y, arrays("networks")[f"{name}/y_none"]) <= OUTPUT_TOLERANCE
