"""Every class of network is saved and loaded, by way of the meta device."""

from __future__ import annotations

import math

import pytest
import torch

from sign_fast import models
from sign_fast.checkpoints.store import save_network
from sign_fast.errors import SignFastError
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


_FOLDERS = {
    "blocks": ({"kwargs": {**_KWARGS, "num_blocks": 10**9}}, "num_blocks is out of all proportion"),
    "levels": ({"kwargs": {**_KWARGS, "M": 10**9}}, "M is out of all proportion"),
    "list": ({"kwargs": {**_KWARGS, "channel_mult": [[1] * 10]}}, "channel_mult must be a list of numbers"),
    "long": ({"kwargs": {**_KWARGS, "channel_mult": [1] * 101}}, "channel_mult is out of all proportion"),
    "zero": ({"kwargs": {**_KWARGS, "model_channels": 0}}, r"config\.json: "),
    "unknown": ({"kwargs": {**_KWARGS, "heads": 1}}, "heads"),
    "role": ({"role": "expert"}, "role must be teacher or student, not 'expert'"),
    "sampling": ({"sampling": {"steps": 1, "code": 2}}, "sampling must be a table of steps"),
    "steps": ({"sampling": {"steps": "1"}}, "sampling must be a table of steps"),
    "no steps": ({"sampling": {"steps": 0}}, "steps of 1 to 10,000"),
    "years": ({"sampling": {"steps": 10**12}}, "steps of 1 to 10,000"),
    "no noise": ({"sampling": {"sigma": math.nan}}, "sigma above 0, finite"),
    "too much noise": ({"sampling": {"sigma": 10**400}}, "sigma above 0, finite"),
    "trained": ({"trained": "yes"}, "trained must be a table, not 'yes'"),
    "quality": ({"quality": 3}, "quality must be a table, not 3"),
    "no table": ({"sampling": [1]}, "sampling must be a table of steps"),
}


@pytest.mark.parametrize("name", list(_FOLDERS))
def test_folders_of_anybody(name, tmp_path):
    """A config.json may come from anywhere: it ends in one line, and at once."""
    changed, line = _FOLDERS[name]
    save_network(tmp_path / "net", {}, **{"cls": "iDDPMPrecond", "kwargs": _KWARGS, **changed})
    with pytest.raises(SignFastError, match=line) as caught:
        models.load(tmp_path / "net", "cpu")
    assert "\n" not in str(caught.value)


def test_endlessly_nested_configuration(tmp_path):
    save_network(tmp_path / "net", {}, "EDMPrecond", _KWARGS)
    (tmp_path / "net" / "config.json").write_text("[" * 200_000)
    with pytest.raises(SignFastError, match="is not readable as JSON"):
        models.load(tmp_path / "net", "cpu")
