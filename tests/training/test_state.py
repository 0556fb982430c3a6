"""Resumable states: what is kept, what damage does, what is no damage."""

from __future__ import annotations

import errno
import re

import pytest
import torch

from sign_fast.errors import SignFastError
from sign_fast.training.state import load_newest, save_state, saved_states


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, *iterations, keep=9):
    for iteration in iterations:
        save_state(folder, iteration, {"iteration": iteration}, keep)


def damage(folder, *iterations):
    for iteration in iterations:
        path = folder / f"state-{iteration:08d}.pt"
        path.write_bytes(path.read_bytes()[:300])


def test_the_last_few_are_kept(tmp_path):
    write(tmp_path, 2, 4, 6, keep=2)
    assert [path.name for path in saved_states(tmp_path)] == ["state-00000004.pt", "state-00000006.pt"]
    assert load_newest(tmp_path, set_aside=True) == {"iteration": 6}
    (tmp_path / "new").mkdir()
    assert load_newest(tmp_path / "new", set_aside=True) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_just_written_stays_whatever_has_higher_numbers(tmp_path, keep):
    write(tmp_path, 6, 8)
    save_state(tmp_path, 3, {"iteration": 3}, keep)
    assert "state-00000003.pt" in names(tmp_path)


def test_damaged_ones_are_set_aside_by_the_process_that_may(tmp_path):
    write(tmp_path, 2, 6, 8)
    damage(tmp_path, 6, 8)
    before = names(tmp_path)
    with pytest.warns(UserWarning, match=r"state-0000000[68].pt is damaged .*falling back to state-00000002.pt"):
        assert load_newest(tmp_path, set_aside=False) == {"iteration": 2}
    assert names(tmp_path) == before
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_newest(tmp_path, set_aside=True) == {"iteration": 2}
    assert names(tmp_path) == ["state-00000002.pt", "state-00000006.pt.damaged", "state-00000008.pt.damaged"]
    write(tmp_path, 3, 4, keep=2)
    assert [path.name for path in saved_states(tmp_path)] == ["state-00000003.pt", "state-00000004.pt"]


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04" + bytes(500), bytes(1000)])
def test_where_none_is_whole_nothing_is_touched(tmp_path, content):
    write(tmp_path, 2, 4)
    for path in saved_states(tmp_path):
        path.write_bytes(content)
    before = names(tmp_path)
    with pytest.raises(SignFastError, match=r"holds 2 saved state\(s\), all damaged \(state-00000004.pt: .*--outdir"):
        load_newest(tmp_path, set_aside=True)
    assert names(tmp_path) == before


def test_what_the_system_cannot_read_is_no_damage(tmp_path, monkeypatch):
    write(tmp_path, 2)
    (tmp_path / "state-00000004.pt").mkdir()
    with pytest.raises(SignFastError, match=re.escape("state-00000004.pt (Is a directory): mend that")):
        load_newest(tmp_path, set_aside=True)
    (tmp_path / "state-00000004.pt").rmdir()
    write(tmp_path, 4)

    def refuse(error):
        def load(*arguments, **options):
            raise error

        monkeypatch.setattr(torch, "load", load)

    refuse(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(SignFastError, match=r"cannot read .*state-00000004.pt \(Input/output error\)"):
        load_newest(tmp_path, set_aside=True)
    refuse(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    with pytest.raises(SignFastError, match="not enough memory to read"):
        load_newest(tmp_path, set_aside=True)
    assert names(tmp_path) == ["state-00000002.pt", "state-00000004.pt"]
