"""Blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

import pytest
import torch

from sign_fast.models import UNetBlock
from tests.network_cases import inputs, network


def gradients(net, checkpointing):
    """Output and gradients of a loss, and the bytes that its graph keeps beside the weights."""
    net.checkpoint_blocks(checkpointing)
    x, sigma, labels = inputs(net)
    x.requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = net(x, sigma, labels)
    found = torch.autograd.grad(y.square().sum(), [x, *(p for p in net.parameters() if p.requires_grad)])
    return y, found, sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["ddpmpp-cond", "ncsnpp", "adm-cond"])
def test_same_gradients_from_less_memory(name, dropout):
    net = network(name).train().requires_grad_(True)
    for n, p in net.named_parameters():
        p.requires_grad_("map_augment" not in n)
    for module in net.modules():
        if isinstance(module, UNetBlock):
            module.dropout = dropout
    y, want, bytes_before = gradients(net, False)
    y_again, found, bytes_after = gradients(net, True)
    assert torch.equal(y, y_again)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert bytes_after < 0.5 * bytes_before


def test_frozen_weights_and_two_backward_passes_of_one_graph():
    net = network("ddpmpp-cond").requires_grad_(True)
    weight = net.model.enc["16x16_block0"].conv0.weight
    found = []
    for wanted in (False, True):
        net.checkpoint_blocks(wanted)
        x, sigma, labels = inputs(net)
        y = net(x.requires_grad_(), sigma, labels)
        weight.grad = None
        torch.autograd.backward(y, y.detach(), retain_graph=True, inputs=[weight])
        found.append([weight.grad, *torch.autograd.grad(y, x, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    net.requires_grad_(False)
    assert not net(x.detach(), sigma, labels).requires_grad
