"""What build makes of a network: the operations, and how long buffers live."""

from __future__ import annotations

import pytest
import torch

from sign_fast import models
from sign_fast.inference.build import build
from sign_fast.inference.fuse import fuse_joins
from sign_fast.inference.program import Attention, Convolution, Filter, JoinNorm, Norm, reads, writes
from tests.network_cases import NETWORKS, network


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fused", [False, True])
def test_order_of_buffers(name, fused):
    program = build(network(name), torch.float32)
    program = fuse_joins(program) if fused else program
    written, dead = {0}, set()
    for operation, dies in zip(program.operations, program.dead, strict=True):
        assert set(reads(operation)) <= written - dead
        assert written.isdisjoint(writes(operation))
        written |= set(writes(operation))
        dead |= set(dies)
    assert written - dead == {program.output}
    assert written == set(range(len(program.buffers)))


def test_digits():
    """One of everything: what is read in place, where biases are, which channels stay."""
    program = build(models.load("digits-uncond", "cpu"), torch.float32)
    convolutions = [o for o in program.operations if isinstance(o, Convolution)]
    assert not any(isinstance(o, Filter) for o in program.operations)
    assert {o.resampling for o in convolutions} == {"none", "up", "down"}
    # nearest-neighbour upsampled skips are convolved small
    assert all(o.resampling != "up" or program.constants[o.weight].shape[-1] == 3 for o in convolutions)
    assert sum(o.residual_up for o in convolutions) == 1
    # both skips and norms of the decoder's blocks read two buffers; nothing is concatenated
    assert {len(o.inputs) for o in convolutions} == {len(o.inputs) for o in program.operations if isinstance(o, Norm)}
    # the norm after a block's first convolution has its bias, in the columns
    embedded = [o for o in program.operations if isinstance(o, Norm) and o.emb]
    assert all(o.input_bias is None for o in embedded)
    first = {o.inputs[0] for o in embedded}
    assert all(o.bias is None for o in convolutions if o.output in first)
    width = sum(o.emb.stop - o.emb.start for o in embedded)
    assert width == program.width and {o.emb.stop for o in embedded} >= {o.emb.start for o in embedded} - {0}


def test_join_norms():
    program = build(models.load("digits-uncond", "cpu"), torch.float32)
    fused = fuse_joins(program)
    joins = [o for o in fused.operations if isinstance(o, JoinNorm)]
    assert len(joins) == 9 and len(program.operations) == len(fused.operations)
    assert all(o.skip_scale == 0.5**0.5 for o in joins)
    assert all(a is b for a, b in zip(fused.constants, program.constants, strict=True))
    # of other residuals one is read upsampled, one comes before the first concatenation; 1×1 convolutions take the rest
    left = [o for o in fused.operations if isinstance(o, Convolution) and o.residual is not None]
    wide = [o.residual_up for o in left if fused.constants[o.weight].shape[-1] == 3]
    assert len(left) > 2 and sorted(wide) == [False, True]


def test_16_bits_layout():
    program = build(models.load("digits-cond", "cpu"), torch.bfloat16)
    for o in program.operations:
        if isinstance(o, Convolution):
            weight = program.constants[o.weight]
            assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
        if isinstance(o, Norm):
            assert program.constants[o.weight].dtype == program.constants[o.bias].dtype == torch.float32
    assert sum(isinstance(o, Attention) for o in program.operations) == 3
