"""Conditioning rows: the affines of the network's own embedding, from a table or computed at the call."""

from __future__ import annotations

import pytest
import torch

from sign_fast import optimize
from sign_fast.inference import conditioning
from sign_fast.inference.build import affine_columns
from tests.golden_rules import relative_error
from tests.network_cases import NETWORKS, network

LEVELS = (0.3, 2.5, 40.0)


def expected(net, sigma, labels):
    """Every block's affine of the embedding, with the bias of the convolution before it where it is added there."""
    *coefficients, c_noise = net.coefficients(torch.tensor(sigma).reshape(1, 1, 1, 1))
    if net.label_dim and labels is None:
        labels = torch.zeros(1, net.label_dim)
    emb = net.model.embed(c_noise.flatten(), labels, None)
    parts = [
        block.affine(emb) + (0 if block.adaptive_scale else block.conv0.bias) for block in affine_columns(net.model)
    ]
    return torch.cat(coefficients, 1).flatten(), torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("table", [True, False])
def test_rows(name, table, monkeypatch):
    if not table:
        monkeypatch.setattr(conditioning, "_TABLE_BYTES", 0)
    net = network(name)
    optimized = optimize(net)
    found = optimized.conditioning(LEVELS)
    classes = net.label_dim + 1 if net.label_dim else 1
    width = optimized.program.width
    assert found.table.shape == (3, classes, width) if table else found.table is None
    assert found.coefficients.shape == (3, 3) and found.coefficients.dtype == torch.float32
    for level, sigma in enumerate(LEVELS):
        coefficients, want = expected(net, sigma, None)
        assert torch.equal(found.coefficients[level], coefficients)
        assert relative_error(found.rows(level), want) <= 1e-6
        if net.label_dim:
            numbers = torch.tensor([1, 0, 1])
            _, want = expected(net, sigma, torch.eye(net.label_dim)[numbers])
            assert relative_error(found.rows(level, numbers), want) <= 1e-6


def test_the_table_has_a_limit():
    optimized = optimize(network("ddpmpp-cond"))
    width = optimized.program.width
    levels = 64 * 2**20 // (4 * 4 * width)  # four bytes, three classes and "no class"
    assert optimized.conditioning(tuple(float(i + 1) for i in range(levels))).table is not None
    assert optimized.conditioning(tuple(float(i + 1) for i in range(levels + 1))).table is None


def test_the_cache_is_bounded():
    optimized = optimize(network("ddpmpp"))
    first = optimized.conditioning((1.0,))
    for i in range(2, 65):
        optimized.conditioning((float(i),))
    assert optimized.conditioning((1.0,)) is first
    optimized.conditioning((65.0,))
    assert len(optimized._cache) == 64
    assert optimized.conditioning((1.0,)) is first and (2.0,) not in optimized._cache
