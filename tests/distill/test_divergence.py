"""The guard: when it stops, what it says, what it remembers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from sign_fast.distill.divergence import DivergenceGuard, all_finite
from sign_fast.errors import SignFastError


def feed(guard, values, start=100):
    """Checks every 100 iterations; the first stop and its iteration, or None."""
    for i, value in enumerate(values):
        if stop := guard.check(start + 100 * i, value):
            return start + 100 * i, stop
    return None


def test_a_run_that_converges_is_not_stopped():
    guard = DivergenceGuard(factor=3, patience=2)
    assert feed(guard, [968, 400, 30, 12, 8, 9, 7, 20.9, 7.5, 5.4, 6]) is None
    assert (guard.best, guard.best_iteration) == (5.4, 1000)
    assert guard.limit == pytest.approx(16.2)


def test_a_run_that_diverges_is_stopped_after_patience():
    guard = DivergenceGuard(factor=3, patience=3)
    iteration, stop = feed(guard, [10, 5, 16, 17, 18, 19])
    assert iteration == 500
    assert stop == (
        "the run diverges: quality 18 at iteration 500, for 3 checks worse than 3 × its best: lower the learning rate, "
        "or use fp32; the best was 5 at iteration 200"
    )


def test_one_better_check_starts_the_count_again():
    guard = DivergenceGuard(factor=2, patience=2)
    assert feed(guard, [10, 21, 19, 21, 20, 21, 20]) is None  # exactly k × the best is not worse
    assert feed(guard, [21, 21])[0] == 200


def test_patience_of_one_and_unmeasured_checks():
    guard = DivergenceGuard(factor=2, patience=1)
    assert guard.check(1) == "" and guard.limit is None
    assert guard.check(2, 4.0) == ""
    assert guard.check(3, None) == ""
    assert "for 1 check worse than 2 × its best" in guard.check(4, 8.5)


def test_is_best_says_when_to_keep_a_checkpoint():
    guard = DivergenceGuard()
    kept = []
    for iteration, value in enumerate([9.0, 10.0, 8.0, 8.0, 7.0]):
        guard.check(iteration, value)
        kept.append(guard.is_best)
    assert kept == [True, False, True, False, True]
    guard.check(6)
    assert not guard.is_best


def test_numbers_that_are_not_finite_stop_at_once():
    guard = DivergenceGuard()
    first = guard.check(7, 3.0, finite=False)
    assert first == "weights or losses are not finite at iteration 7: lower the learning rate, or use fp32"
    assert guard.best is None  # a black image's quality counts nothing
    guard.check(8, 3.0)
    assert guard.check(9, finite=False).endswith("the best was 3 at iteration 8")
    for bad in (math.nan, math.inf):
        assert f"the quality is {bad} at iteration 10" in guard.check(10, bad)
    assert guard.best == 3.0 and not guard.is_best


def test_state_goes_through_a_checkpoint():
    values = [10, 5, 16, 17, 18]
    for cut in range(len(values)):
        guard = DivergenceGuard(factor=3, patience=3)
        assert feed(guard, values[:cut]) is None
        again = DivergenceGuard(factor=3, patience=3)
        again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert (again.best, again.best_iteration) == (guard.best, guard.best_iteration)
        assert feed(again, values[cut:], 100 * (cut + 1))[0] == 500


@pytest.mark.parametrize("arguments, message", [((1.0, 3), "must be above 1"), ((3, 0), "at least 1 check")])
def test_settings_out_of_range(arguments, message):
    with pytest.raises(SignFastError, match=message):
        DivergenceGuard(*arguments)


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [lambda net: net[0].weight, lambda net: net[2].bias, lambda net: net[1].running_var])
def test_finite_weights(bad, place):
    good, net = network(), network()
    with torch.no_grad():
        net[2].weight.fill_(-3e38)  # large, but finite: no sum of squares is taken
        assert all_finite(good, net).item() is True
        place(net).view(-1)[-1] = bad
    assert all_finite(good, net).item() is False
    assert all_finite(good).item() is True
