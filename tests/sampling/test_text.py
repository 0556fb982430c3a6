"""Prompt embeddings as rows."""

from __future__ import annotations

import pytest
import torch

from sign_fast.sampling.text import TextConditioning


def rows(count: int, start: int = 0) -> TextConditioning:
    states = torch.arange(start, start + count * 6, dtype=torch.float32).reshape(count, 3, 2)
    return TextConditioning(states, states[:, 0] + 100, states[:, 1, :1] + 1000)


def same(a: TextConditioning, b: TextConditioning) -> bool:
    return all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


def test_rows_are_cut_joined_and_repeated():
    both = TextConditioning.cat([rows(2), rows(3, 50)])
    assert len(both) == 5 and same(both[:2], rows(2)) and same(both[2:], rows(3, 50))
    assert same(rows(1).expand(3), TextConditioning.cat([rows(1)] * 3)) and same(rows(3).expand(3), rows(3))
    assert same(both[torch.tensor([4, 0])], TextConditioning.cat([rows(3, 50)[2:], rows(1)]))


def test_rows_are_replaced_where_chosen():
    other = rows(1, 500)
    got = rows(3).where(torch.tensor([False, True, False]), other)
    assert same(got[:1], rows(3)[:1]) and same(got[1:2], other) and same(got[2:], rows(3)[2:])


def test_networks_without_a_pooled_embedding():
    text = TextConditioning(torch.ones(2, 3, 4))
    assert list(text.tensors()) == ["states"] and text.to(dtype=torch.bfloat16).states.dtype == torch.bfloat16
    assert TextConditioning.cat([text, text]).pooled is None


def test_rows_must_agree():
    with pytest.raises(ValueError, match="a row a prompt"):
        TextConditioning(torch.ones(2, 3, 4), torch.ones(3, 5))
