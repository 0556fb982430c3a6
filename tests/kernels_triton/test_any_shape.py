"""Shapes that nobody thought of: hypothesis draws them, always the same ones."""

from __future__ import annotations

import pytest
import torch

from tests import distill_loss_cases, group_norm_cases
from tests.kernels_triton.test_attention import check as check_attention
from tests.kernels_triton.test_attention import draw
from tests.kernels_triton.test_group_norm_silu import check as check_norm
from tests.oracle import TRITON_DEVICE

pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate], database=None
    )


@drawn(25)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 6),
    group_channels=st.integers(1, 13),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    dtype=DTYPES,
    channels_last=st.booleans(),
    silu=st.booleans(),
    folds=st.sets(st.sampled_from(["weight", "bias", "emb", "input_bias", "scale", "shift"])),
    seam=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_group_norm_silu(batch, groups, group_channels, height, width, dtype, channels_last, silu, folds, seam, seed):
    channels = groups * group_channels
    check_norm(
        group_norm_cases.make(
            (batch, channels, height, width),
            groups,
            dtype,
            channels_last=channels_last,
            silu=silu,
            folds=" ".join(sorted(folds)),
            second=int(seam * (channels - 1)),
            seed=seed,
        )
    )


@drawn(20)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 70),
    channels=st.integers(1, 48),
    dtype=DTYPES,
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_attention(batch, heads, tokens, channels, dtype, scale, seed):
    check_attention(*draw((batch, heads, tokens, channels), dtype, scale, seed))


@drawn(20)
@given(
    name=st.sampled_from(sorted(distill_loss_cases.LOSSES)),
    dtype=DTYPES,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_distill_loss(name, dtype, shape, weighted, seed):
    case = distill_loss_cases.make(shape, dtype, weighted=weighted, seed=seed)
    distill_loss_cases.check(name, case, TRITON_DEVICE, "triton")
