"""GroupNorm–SiLU's dispatch: plain torch for float64, errors, compilation, and what is said where C++ is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import group_norm_cases as cases
import pytest
import torch

from sign_fast import functional
from sign_fast.kernels.group_norm_silu import reference


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_of_the_plain_form(channels_last):
    for second in (0, 1):
        t = (
            cases.make((2, 6, 3, 2), 2, channels_last=channels_last, second=second)
            .to(torch.float64, leaves=True)
            .tensors
        )

        def norm(*values, names=tuple(t)):
            return cases.fast(cases.Inputs(2, dict(zip(names, values, strict=True))))

        assert torch.autograd.gradcheck(norm, tuple(t.values()))
    t = cases.make((2, 6, 3, 2), 2, channels_last=channels_last, folds="skip join_bias weight bias").tensors

    def join(h, skip, bias, weight, norm_bias):
        return functional.residual_group_norm_silu(h, skip, bias, 0.7, 2, weight, norm_bias)

    names = ("x", "skip", "join_bias", "weight", "bias")
    assert torch.autograd.gradcheck(join, tuple(t[name].double().requires_grad_() for name in names))


def test_a_large_mean_in_the_plain_form():
    """channels_last too, where torch's own norm on the CPU takes E[x²] − E[x]²."""
    for channels_last in (True, False):
        inputs = cases.make((2, 64, 16, 16), 8, channels_last=channels_last, folds="", mean=10000, deviation=0.1)
        (want,) = cases.plain(inputs.to(torch.float64))
        got = reference.group_norm_silu(inputs.tensors["x"], None, 8, None, None, cases.EPS)
        assert (got.double() - want).abs().max() <= 2e-2  # plain torch in NCHW is at 7e-3


def test_compiles_without_a_break():
    t = cases.make((2, 24, 8, 8), 6).tensors
    x, weight, bias, emb = t["x"], t["weight"], t["bias"], t["emb"]

    def norm(x, weight, bias, emb):
        return functional.group_norm_silu(x, 6, weight, bias, emb=emb)

    with torch.no_grad():
        compiled = torch.compile(norm, fullgraph=True)(x, weight, bias, emb)
        assert torch.allclose(compiled, norm(x, weight, bias, emb), atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: functional.group_norm_silu(x, 5, None, None), "24 channels do not divide into 5 groups"),
        (lambda x: functional.group_norm_silu(x, 6, torch.ones(3), None), r"must be \(24,\)"),
        (lambda x: functional.group_norm_silu(x, 6, None, None, emb=torch.ones(3, 24)), "emb, scale and shift"),
        (lambda x: functional.group_norm_silu(x, 6, None, None, activation="relu"), "activation must be"),
        (lambda x: functional.group_norm_silu(x[0], 6, None, None), r"x must be \(B, C, H, W\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 24, 4, 4))


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


CALL = """
import torch
from sign_fast import functional
with torch.no_grad():
    for _ in range(3):
        functional.group_norm_silu(torch.ones(1, 4, 2, 2), 2, None, None)
"""


def test_without_the_extension_warns_once_with_the_remedy():
    done = run(CALL, SIGN_FAST_DISABLE_EXT="1")
    assert done.returncode == 0
    assert done.stderr.count("SlowPathWarning") == 1
    assert "SIGN_FAST_DISABLE_EXT=1; unset it" in done.stderr


def test_strict_raises_instead():
    done = run(CALL, SIGN_FAST_DISABLE_EXT="1", SIGN_FAST_STRICT="1")
    assert done.returncode != 0
    assert "SlowPathError: group_norm_silu" in done.stderr


def test_gradients_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.group_norm_silu(torch.ones(1, 4, 2, 2, requires_grad=True), 2, None, None)
