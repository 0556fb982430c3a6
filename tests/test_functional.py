"""Bad input of the public functions: one line that says what is wrong."""

from __future__ import annotations

import pytest
import torch

from sign_fast import functional

X = torch.ones(2, 12, 4, 4)
SIGMA = torch.ones(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.group_norm_silu(x, 3, None, None),
        lambda x: functional.residual_group_norm_silu(x, x, None, 1.0, 3, None, None),
        lambda x: functional.attention(x, x, x),
        lambda x: functional.projected_attention(x, 2),
        lambda x: functional.fake_score_loss(x, x, SIGMA),
        lambda x: functional.sid_generator_loss(x, x, x),
        lambda x: functional.distill_losses(x, x, x, SIGMA),
        lambda x: functional.to_uint8(x),
        lambda x: functional.sampler_step(x),
        lambda x: functional.combine((x, x), (0.5, 2.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_images_are_of_a_floating_dtype(call, dtype):
    call(X)
    with pytest.raises(ValueError, match=r"floating dtype.*torch\.(int64|complex64)$"):
        call(X.to(dtype))


def test_sigma_data_is_positive():
    with pytest.raises(ValueError, match="sigma_data must be positive, not 0"):
        functional.fake_score_loss(X, X, SIGMA, 0)


def test_denoising_weight():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    want = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).flatten()
    torch.testing.assert_close(functional.denoising_weight(sigma), want)
    assert functional.denoising_weight(sigma[:1].half()).isfinite().all()  # 1/σ² is beyond float16
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        functional.denoising_weight(sigma, 0)
