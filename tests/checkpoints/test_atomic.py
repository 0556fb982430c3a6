"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

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


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_renamed_meanwhile_keeps_nothing_half_written(tmp_path, moment):
    folder, moved = tmp_path / "out", tmp_path / "moved"
    folder.mkdir()

    def move(temporary):
        if moment == "after":
            temporary.write_text("half")
        folder.rename(moved)
        temporary.write_text("half")

    with pytest.raises(SignFastError, match="cannot write"):
        write_atomically(folder / "file", move)
    assert moved.is_dir() and not list(moved.iterdir())


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


@pytest.fixture
def disk(monkeypatch):
    """What is flushed and renamed, in order."""
    done = []
    fsync, replace = os.fsync, Path.replace

    def flush(handle):
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def rename(self, target):
        done.append(("rename", Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    return done


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")


@needs_proc
def test_a_file_and_its_name_are_on_the_disk(tmp_path, disk):
    write_text(tmp_path / "file", "text")
    assert disk[1:] == [("rename", tmp_path / "file"), ("flush", tmp_path)]
    assert disk[0][0] == "flush" and disk[0][1].parent == tmp_path and disk[0][1].suffix == ".tmp"
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("new"), durable=False)
    assert disk[3:] == [("rename", tmp_path / "file")]


@needs_proc
def test_a_network_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, disk):
    cls, kwargs = models.presets.preset("digits-uncond")
    kwargs |= {"model_channels": 8}
    state = models.create("digits-uncond", model_channels=8).state_dict()
    save_network(tmp_path / "net", state, cls, kwargs)
    disk.clear()
    save_network(tmp_path / "net", state, cls, kwargs, card="text")
    first = next(i for i, (what, path) in enumerate(disk) if what == "rename" and path.suffix == ".old")
    flushed = {path.name for what, path in disk[:first] if what == "flush"}
    assert {"model.safetensors", "config.json", "README.md"} < flushed
    assert disk[first - 1][0] == "flush" and disk[first - 1][1].parent == tmp_path  # the folder's own entries
    assert disk[first + 1 :] == [("rename", tmp_path / "net"), ("flush", tmp_path)]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EIO])
def test_a_system_that_flushes_no_folders(tmp_path, monkeypatch, refusal):
    fsync = os.fsync

    def flush(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(refusal, os.strerror(refusal))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    if refusal == errno.EIO:  # no refusal, the disk fails
        with pytest.raises(SignFastError, match="Input/output error"):
            write_text(tmp_path / "file", "text")
        return
    write_text(tmp_path / "file", "text")
    replace_folder(tmp_path / "net", lambda folder: write_text(folder / "a", "text"))
    assert (tmp_path / "file").read_text() == (tmp_path / "net" / "a").read_text() == "text"


def test_network_round_trip(tmp_path):
    net = models.create("digits-uncond", model_channels=8)
    kwargs = {**models.presets.preset("digits-uncond")[1], "model_channels": 8}
    save_network(tmp_path / "net", net.state_dict(), "EDMPrecond", kwargs, role="teacher")
    again = load_network(tmp_path / "net", "cpu")
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
