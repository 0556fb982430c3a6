"""Rows on disk: whole shards or none, resumed where they were left, read one by one."""

from __future__ import annotations

import json

import pytest
import torch

from sign_fast.distill.text_to_image.rows import Rows, key_of, write_rows
from sign_fast.errors import SignFastError

CPU = torch.device("cpu")


def values(start, stop):
    numbers = torch.arange(start, stop)
    return {"a": numbers[:, None].repeat(1, 3).bfloat16(), "b": numbers[:, None, None].float() / 7}


class Maker:
    def __init__(self, fail_at=None):
        self.made, self.fail_at = [], fail_at

    def __call__(self, start, stop):
        if start == self.fail_at:
            raise SignFastError("no more")
        self.made.append((start, stop))
        return values(start, stop)


def test_rows_come_back_in_any_order(tmp_path):
    told = []
    write_rows(tmp_path / "rows", 10, values, CPU, 4, told.append)
    rows = Rows(tmp_path / "rows")
    found = rows[[9, 0, 4, 4]]
    want = {name: t[[9, 0, 4, 4]] for name, t in values(0, 10).items()}
    assert len(rows) == 10 and found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) and found[name].dtype == want[name].dtype for name in want)
    assert told == [4, 4, 2]
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == [
        "index.json",
        *(f"rows-{i:05d}.safetensors" for i in range(3)),
    ]


def test_few_files_are_open_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("sign_fast.distill.text_to_image.rows._OPEN", 2)
    write_rows(tmp_path, 10, values, CPU, 1)
    rows = Rows(tmp_path)
    assert torch.equal(rows[list(range(10))]["b"], values(0, 10)["b"]) and len(rows._open) == 2


def test_what_was_made_is_not_made_again(tmp_path):
    first, second, third = Maker(fail_at=8), Maker(), Maker()
    with pytest.raises(SignFastError, match="no more"):
        write_rows(tmp_path, 10, first, CPU, 4)
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(SignFastError, match=r"index.json is damaged .*: remove .*, it is made again"):
        Rows(tmp_path)
    write_rows(tmp_path, 10, second, CPU, 4)
    write_rows(tmp_path, 10, third, CPU, 4)
    assert first.made == [(0, 4), (4, 8)] and second.made == [(8, 10)] and third.made == []


def test_a_damaged_shard_is_made_again(tmp_path):
    write_rows(tmp_path, 10, values, CPU, 4)
    path = tmp_path / "rows-00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b""):
        path.write_bytes(content)
        with pytest.raises(SignFastError, match=r"rows-00001.safetensors is damaged .*: remove it"):
            _ = Rows(tmp_path)[[5]]
        maker = Maker()
        with pytest.warns(UserWarning, match=r"rows-00001.safetensors is damaged .*: making it again"):
            write_rows(tmp_path, 10, maker, CPU, 4)
        assert maker.made == [(4, 8)] and path.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}', json.dumps({"format": "sign_fast rows 1"})])
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(SignFastError, match=r"index.json is damaged") as caught:
        Rows(tmp_path)
    assert "\n" not in str(caught.value)


def test_keys_tell_apart_what_differs():
    keys = [
        key_of({"dtype": "fp32"}, ["a", "b"]),
        key_of({"dtype": "bf16"}, ["a", "b"]),
        key_of({"dtype": "fp32"}, ["a\nb"]),
        key_of({"dtype": "fp32"}, ["b", "a"]),
        key_of({"dtype": "fp32"}, ["ab"]),
        key_of({"dtype": "fp32"}, ["a"], ["b"]),
        key_of({"dtype": "fp32"}, ["a", "\nb"]),
    ]
    assert len(set(keys)) == len(keys) and key_of({"dtype": "fp32"}, ["a", "b"]) == keys[0]
