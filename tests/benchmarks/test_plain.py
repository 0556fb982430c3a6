"""The benchmark's baseline computes the same function: every golden network, without the library's operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain import Plain
from tests.golden_rules import OUTPUT_TOLERANCE, arrays, golden_net, normal, relative_error, settings


@pytest.mark.parametrize("name", settings("networks")["nets"])
def test_plain_is_the_published_network(name, monkeypatch):
    import sign_fast.functional as functional

    for operation in functional.__all__:
        monkeypatch.delattr(functional, operation)
    entry = settings("networks")["nets"][name]
    kwargs = entry["kwargs"]
    sigma = torch.tensor([0.02, 0.8, 2.5]).reshape(-1, 1, 1, 1)
    x = normal(entry["x_seed"], 3, 3, 16, 16) * sigma
    dim = kwargs.get("label_dim", 0)
    labels = torch.eye(dim)[[1, 4, 7]] if dim else None
    augment = normal(entry["aug_seed"], 3, kwargs["augment_dim"]) if kwargs.get("augment_dim") else None
    with torch.no_grad():
        y = Plain(golden_net(name))(x, sigma, labels, augment)
    assert relative_error(y, arrays("networks")[f"{name}/y"]) <= OUTPUT_TOLERANCE
