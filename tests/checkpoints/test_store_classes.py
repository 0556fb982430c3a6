"""Every class of network is saved and loaded, by way of the meta device."""

from __future__ import annotations

import pytest
import torch

from sign_fast import models
from sign_fast.checkpoints.store import save_network
from sign_fast.models.presets import CLASSES
from tests.golden_rules import fill, relative_error

_KWARGS = {
    "img_resolution": 8,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
}


@torch.no_grad()
@pytest.mark.parametrize("cls", CLASSES)
def test_save_and_load(cls, tmp_path):
    net = fill(CLASSES[cls](**_KWARGS), 1).eval()
    save_network(tmp_path / cls, net.state_dict(), cls, _KWARGS)
    loaded = models.load(tmp_path / cls, "cpu")
    assert type(loaded) is type(net)
    assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = () if cls == "IdempotentPrecond" else (0.7,)
    assert relative_error(loaded(x, *arguments), net(x, *arguments)) <= 2e-6  # one of them in channels_last
