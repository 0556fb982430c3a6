"""Operators that make the host wait: found by name, by the error that they raise, with the line that calls them."""

from __future__ import annotations

import pytest
import torch

from sign_fast.sampling.synchronising import find_synchronising

X = torch.tensor([1.0, 2.0, 2.0])


def assigned(mask, value):
    y = X.clone()
    y[mask] = value
    return y


def copied(non_blocking):
    return torch.empty(3, device="meta").copy_(X, non_blocking=non_blocking)


@pytest.mark.parametrize(
    ("operator", "function"),
    [
        ("aten::_local_scalar_dense", lambda: X[0].item()),
        ("aten::_local_scalar_dense", lambda: float(X[1])),
        ("aten::nonzero", lambda: X.nonzero()),
        ("aten::masked_select", lambda: X.masked_select(X > 1)),
        ("aten::_unique2", lambda: X.unique()),
        ("aten::unique_consecutive", lambda: X.unique_consecutive()),
        ("aten::unique_dim", lambda: X.reshape(3, 1).unique(dim=0)),
        ("aten::equal", lambda: torch.equal(X, X + 1)),
        ("aten::bincount", lambda: X.long().bincount()),
        ("aten::repeat_interleave", lambda: torch.repeat_interleave(X.long())),
        ("aten::index", lambda: X[X > 1]),
        ("aten::index_put_", lambda: assigned(X > 1, torch.zeros(2))),
        ("aten::_to_copy", lambda: X.to("meta")),
        ("aten::copy_", lambda: copied(False)),
    ],
)
def test_known_operators(operator, function):
    found = find_synchronising(function, lambda watched: watched())
    assert found.operator == operator and found.why
    assert found.where.startswith(f"{__file__}:")


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.tanh(X @ X),
        lambda: X[torch.tensor([0, 2])],
        lambda: assigned(X > 1, torch.zeros(())),
        lambda: torch.where(X > 1, X, 0),
        lambda: torch.repeat_interleave(X.long(), output_size=5),
        lambda: X.to("meta", non_blocking=True),
        lambda: copied(True),
        lambda: X.to(torch.float64),
    ],
)
def test_operators_that_do_not_synchronise(function):
    assert find_synchronising(function, lambda watched: watched()) is None


def test_truth_of_a_tensor_and_its_line():
    def function():
        y = X + 1
        return y if y.sum() > 0 else X  # here

    found = find_synchronising(function, lambda watched: watched())
    line = function.__code__.co_firstlineno + 2
    assert str(found) == (
        "aten::_local_scalar_dense (.item(), or the truth value of a tensor) synchronises at " + f"{__file__}:{line}"
    )


def test_the_operator_that_raised_goes_before_one_that_is_known():
    def function():
        X.nonzero()
        return X @ torch.ones(4)

    def run(watched):
        with pytest.raises(RuntimeError, match="size"):
            watched()
        raise RuntimeError("another one on top")

    line = function.__code__.co_firstlineno + 2
    assert str(find_synchronising(function, run)) == (
        f"aten::dot is not allowed in a CUDA graph, called at {__file__}:{line}"
    )


def test_a_function_of_torch_that_is_no_operator():
    def function():
        torch.nn.Parameter(X) + 1
        return torch.set_default_device("no such device")  # raises in torch's Python

    line = function.__code__.co_firstlineno + 2
    assert str(find_synchronising(function, lambda watched: watched())) == (
        f"torch.set_default_device is not allowed in a CUDA graph, called at {__file__}:{line}"
    )


def test_errors_of_other_kinds_go_through():
    def function():
        raise KeyError("mine")

    with pytest.raises(KeyError):
        find_synchronising(function, lambda watched: watched())
