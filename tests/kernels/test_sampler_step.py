"""Philox, normals, the sampler's step and the bytes at the end: integers bit for bit, normals to 4 units."""

from __future__ import annotations

import pytest
import torch

from sign_fast.kernels.sampler_step import reference

# Random123's known answers: counter, key, words
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert reference.philox(_hex(counter), _hex(key)) == _hex(words)


def edge_words() -> torch.Tensor:
    """Zero, the largest, the octants' and the branches' boundaries, each with its neighbours."""
    middle = [i << 29 for i in range(9)] + [reference.NEAR_ONE, 0xFFFFFFFF - reference.NEAR_ONE]
    middle += [1 << i for i in range(33)] + [0xFFFFFFFF - (1 << i) for i in range(32)]
    return torch.tensor(sorted({m + d & 0xFFFFFFFF for m in middle for d in range(-3, 4)}))


def all_words(count: int = 500_000) -> torch.Tensor:
    """(N, 4) words: `count` random blocks, and every pair of the edges."""
    edges = edge_words()
    pairs = torch.cartesian_prod(edges, edges)
    pairs = pairs[: len(pairs) // 2 * 2].reshape(-1, 4)
    return torch.cat((reference.words(torch.tensor([2024]), 3, 4 * count)[0], pairs))


def units_off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error in units of the last place of float32(want); where want is 0 so must got be."""
    near = want.float().abs()
    unit = (torch.nextafter(near, torch.tensor(torch.inf)) - near).double()
    return float(((got.double() - want).abs() / unit).max())


def test_reference_normals_are_within_four_units():
    words = all_words()
    assert units_off(reference.normals(words), reference.normals(words, torch.float64)) <= 4
    for function in (reference.radius, lambda w, *d: torch.stack(reference.cos_sin(w, *d))):
        assert units_off(function(words), function(words, torch.float64)) <= 3
