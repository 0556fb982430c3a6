"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno

import pytest
import torch

from sign_fast import models
from sign_fast.checkpoints.atomic import replace_folder, write_atomically, write_text
from sign_fast.checkpoints.store import load_network, save_network
from sign_fast.errors import SignFastError


def test_failed_write_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_text(target, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SignFastError, match="the disk is full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.stat().st_mode & 0o044  # not private, as a plain new file would be


def test_failed_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "net"
    replace_folder(target, lambda folder: write_text(folder / "a", "old"))

    def fail(folder):
        write_text(folder / "a", "new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_folder(target, fail)
    assert (target / "a").read_text() == "old"
    replace_folder(target, lambda folder: write_text(folder / "b", "new"))
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["net"]


def test_network_round_trip(tmp_path):
    net = models.create("digits-uncond", model_channels=8)
    kwargs = {**models.presets.preset("digits-uncond")[1], "model_channels": 8}
    save_network(tmp_path / "net", net.state_dict(), "EDMPrecond", kwargs, role="teacher")
    again = load_network(tmp_path / "net", "cpu")
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
