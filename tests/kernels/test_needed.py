"""A backward pass to some inputs makes no gradients of the others."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sign_fast import functional


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def of(self, part):
        return [name for name in self.names if part in name]


def block():
    last = torch.channels_last
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(8, 8, 3, 3, generator=generator)
    x = x.to(memory_format=last).requires_grad_()
    parameters = [w.to(memory_format=last).requires_grad_(), *(torch.randn(8, requires_grad=True) for _ in range(3))]
    w, b, scale, shift = parameters
    y = functional.convolution(functional.group_norm_silu(x, 2, scale, shift), w, b)
    return x, parameters, functional.convolution(y, w, b)


@pytest.mark.parametrize("how", ["grad", "backward"])
def test_to_the_image_alone(how):
    x, _, y = block()
    (whole,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    with Calls() as calls:
        if how == "grad":
            (dx,) = torch.autograd.grad(y.square().sum(), x)
        else:
            torch.autograd.backward(y.square().sum(), inputs=[x])
            dx = x.grad
    assert torch.equal(dx, whole)
    assert not calls.of("weight_gradient") and not calls.of("parameter_gradients")
    assert len(calls.of("convolution_input_gradient")) == 2


def test_to_the_parameters_alone():
    _, parameters, y = block()
    loss = y.square().sum()
    loss.backward(retain_graph=True)
    whole = [p.grad.clone() for p in parameters]
    with Calls() as calls:
        found = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert len(calls.of("weight_gradient")) == 2 and len(calls.of("parameter_gradients")) == 1
