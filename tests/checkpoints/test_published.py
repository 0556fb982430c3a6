"""Published snapshots: every class of network, every way in which their programs' versions wrote one."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sign_fast import ImageGenerator, models
from sign_fast.checkpoints.published import machine, read_snapshot
from sign_fast.checkpoints.published.archives import zip_members
from sign_fast.checkpoints.published.records import Storage, StorageType, TensorRecord
from sign_fast.errors import SignFastError
from tests.checkpoints.snapshots import (
    TINY,
    persistent,
    published_modules,
    storing,
    tiny,
    tiny_snapshot,
    write_snapshot,
)
from tests.network_cases import NETWORKS, inputs, network


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _equal(got: models.Precond, want: models.Precond) -> None:
    assert type(got) is type(want) and list(got.state_dict()) == list(want.state_dict())
    for name, value in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


@pytest.fixture
def channels_first(monkeypatch):
    """Networks as they were made: in channels_last, as `load` leaves them, convolutions round otherwise."""
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, memory_format=None, **k: to(self, *a, **k))


@torch.no_grad()
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network(name, tmp_path, channels_first):
    net = network(name)
    path = _written(tmp_path / "x.pkl", write_snapshot({"ema": persistent(net, NETWORKS[name][1])}))
    loaded = models.load(path, "cpu")
    _equal(loaded, net)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for attribute in ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max"):
        assert getattr(loaded, attribute) == getattr(net, attribute)
    x, sigma, labels = inputs(net)
    assert torch.equal(loaded(x, sigma, labels), net(x, sigma, labels))


@pytest.mark.parametrize("zip_storages", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_format(protocol, zip_storages, tmp_path):
    data = tiny_snapshot(protocol=protocol, zip_storages=zip_storages)
    _equal(models.load(_written(tmp_path / "x.pkl", data), "cpu"), tiny())


@pytest.mark.parametrize("zip_file", [False, True])
def test_files_of_torch_save(zip_file, tmp_path):
    with published_modules():
        torch.save({"ema": persistent(tiny(), TINY)}, tmp_path / "x.pkl", _use_new_zipfile_serialization=zip_file)
    _equal(models.load(tmp_path / "x.pkl", "cpu"), tiny())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_exact(dtype, tmp_path):
    net = tiny().to(dtype)  # float64 of float32's values
    loaded = models.load(_written(tmp_path / "x.pkl", write_snapshot({"ema": persistent(net, TINY)})), "cpu")
    for name, value in net.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name].to(dtype), value)


def test_float64_that_float32_cannot_hold(tmp_path):
    net = tiny().double()
    net.model.map_layer0.weight[0, 0] = 1 / 3
    path = _written(tmp_path / "x.pkl", write_snapshot({"ema": persistent(net, TINY)}))
    with pytest.raises(SignFastError, match=r"map_layer0.weight in torch.float64, which float32 cannot hold"):
        models.load(path, "cpu")
    net.model.map_layer0.weight[0, 1] = torch.nan  # does not hide the other
    path = _written(tmp_path / "x.pkl", write_snapshot({"ema": persistent(net, TINY)}))
    with pytest.raises(SignFastError, match=r"map_layer0.weight in torch.float64, which float32 cannot hold"):
        models.load(path, "cpu")


def test_a_tensor_spread_over_a_large_storage_costs_what_it_has(tmp_path):
    with open(tmp_path / "sparse", "wb+") as file:
        file.truncate(2**36)
        file.seek(-4, 2)
        file.write(struct.pack("<f", 2.5))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            spread = TensorRecord(
                Storage(StorageType(torch.float32), 2**34, memory), 2**10, (2, 1), (2**34 - 2**10 - 1, 7)
            )
            assert spread.tensor().tolist() == [[0.0], [2.5]]


def test_views_and_other_memory_orders(tmp_path):
    net = tiny().to(memory_format=torch.channels_last)
    whole = torch.arange(20.0)
    net.model.map_layer0.bias = torch.nn.Parameter(whole[3:19:2].repeat(4), requires_grad=False)
    base = torch.randn(40)
    net.model.map_layer1.bias = torch.nn.Parameter(base[5:37], requires_grad=False)  # inside a larger storage
    _equal(models.load(_written(tmp_path / "x.pkl", write_snapshot({"ema": persistent(net, TINY)})), "cpu"), net)


def test_arguments_by_position_and_attributes_changed_since(tmp_path):
    net = tiny(label_dim=3, sigma_max=70)
    net.use_fp16, net.sigma_min = True, 0.002
    record = persistent(
        net, {k: v for k, v in TINY.items() if k not in ("img_resolution", "img_channels", "label_dim")}
    )
    record.meta["state"]["_init_args"] = (8, 1, 3, False, 0, 70)
    loaded = models.load(_written(tmp_path / "x.pkl", write_snapshot({"ema": record})), "cpu")
    _equal(loaded, net)
    assert (loaded.use_fp16, loaded.sigma_min, loaded.sigma_max, loaded.label_dim) == (True, 0.002, 70, 3)


def test_what_else_published_snapshots_hold(tmp_path):
    """Training's objects beside the network: read as nothing, whatever they are."""
    entries = {
        "ema": persistent(tiny(), TINY),
        "loss_fn": storing("EDMLoss", P_mean=-1.2, P_std=np.float64(1.2), sigma_data=0.5),
        "augment_pipe": storing("AugmentPipe", p=0.12, weights=np.float32(3), steps=(1, 2), known={"a", "b"}),
        "dataset_kwargs": OrderedDict(
            path="data.zip", none=None, big=10**12, deep=[[{}], ()], empty=b"", seen=frozenset()
        ),
    }
    for protocol in (2, 4):
        path = _written(tmp_path / "network-snapshot-000100.pkl", write_snapshot(entries, protocol))
        assert read_snapshot(path).role == "teacher"
        _equal(models.load(path, "cpu"), tiny())


@pytest.mark.parametrize(
    ("name", "loss", "role"),
    [
        ("edm-cifar10-32x32-cond-vp.pkl", None, "teacher"),
        ("baseline-cifar10-32x32-uncond-ve.pkl", None, "teacher"),
        ("network-snapshot-1.200000-403968.pkl", None, "student"),
        ("sid-cifar10.pkl", None, "student"),
        ("cifar10-SiDA.pkl", None, "student"),
        ("inside.pkl", None, None),
        ("inside.pkl", "VELoss", "teacher"),
        ("edm-like.pkl", "SID_EDMLoss", "student"),
    ],
)
def test_role(name, loss, role, tmp_path):
    entries = {"ema": persistent(tiny(), TINY)} | ({"loss_fn": storing(loss)} if loss else {})
    path = _written(tmp_path / name, write_snapshot(entries))
    assert read_snapshot(path).role == role
    if role is None:
        with pytest.raises(SignFastError, match="does not tell whether it is a teacher or a student"):
            ImageGenerator.from_pretrained(path, "cpu")
    else:
        generator = ImageGenerator.from_pretrained(path, "cpu")
        assert generator.role == role and generator(range(2)).shape == (2, 8, 8, 1)


def test_entries(tmp_path):
    entries = {"ema": persistent(tiny(1), TINY), "G": persistent(tiny(2), TINY), "loss_fn": storing("EDMLoss")}
    path = _written(tmp_path / "x.pkl", write_snapshot(entries))
    assert {read_snapshot(path).key, read_snapshot(path, "ema").key} == {"ema"}
    for key, seed in (("ema", 1), ("G", 2)):
        snapshot = read_snapshot(path, key)
        _same = snapshot.state(tiny(seed))
        assert all(torch.equal(value, _same[name]) for name, value in tiny(seed).state_dict().items())
    with pytest.raises(SignFastError, match=r"holds 'ema', 'G'; 'x' is no network: name another by --key"):
        read_snapshot(path, "x")
    with pytest.raises(SignFastError, match=r"holds 'ema', 'G'; 'loss_fn' is 'EDMLoss', no network of this library"):
        read_snapshot(path, "loss_fn")
    alone = _written(tmp_path / "alone.pkl", write_snapshot(persistent(tiny(1), TINY)))
    _equal(models.load(alone, "cpu"), tiny(1))


def _broken(**changes: Any) -> Any:
    """The tiny network's record with other attributes; None takes one away."""
    record = persistent(tiny(), TINY)
    for name, value in changes.items():
        record.meta["state"].update({name: value})
        if value is None:
            del record.meta["state"][name]
    return record


_MISFITS: dict[str, tuple[Any, str]] = {
    "other class": (lambda: storing("StyleGAN"), "holds no network of this library .*'ema' is 'StyleGAN'"),
    "no network": (lambda: None, "holds no network of this library"),
    "no arguments": (lambda: _broken(_init_kwargs=None), "without its constructor's arguments"),
    "unknown argument": (
        lambda: _broken(_init_kwargs={**TINY, "heads": 3}),
        "the argument 'heads', which it does not take",
    ),
    "run's argument": (lambda: _broken(_init_kwargs={**TINY, "dtype": "x"}), "'dtype', which it does not take"),
    "inner argument": (
        lambda: _broken(_init_kwargs={**TINY, "in_channels": 3}),
        "'in_channels', which it does not take",
    ),
    "unknown U-Net": (lambda: _broken(_init_kwargs={**TINY, "model_type": "UViT"}), "around 'UViT': only SongUNet"),
    "too many": (lambda: _broken(_init_args=tuple(range(20))), "more arguments than it takes"),
    "twice": (lambda: _broken(_init_args=(8,)), "more arguments than it takes"),
    "no value": (lambda: _broken(_init_kwargs={**TINY, "dropout": storing("X")}), "has Record as argument dropout"),
    "wrong kind": (lambda: _broken(_init_kwargs={**TINY, "num_blocks": "many"}), "x.pkl: "),
    "zero": (lambda: _broken(_init_kwargs={**TINY, "model_channels": 0}), "x.pkl"),
    "endless": (lambda: _broken(_init_kwargs={**TINY, "num_blocks": 10**9}), "num_blocks is out of all proportion"),
    "huge": (lambda: _broken(_init_kwargs={**TINY, "channel_mult": [10**15]}), "out of all proportion"),
    "nested": (lambda: _broken(_init_kwargs={**TINY, "channel_mult": [[1] * 9]}), "must be a list of numbers"),
    "other weights": (lambda: _broken(_init_kwargs={**TINY, "num_blocks": 2}), "lacks model.enc.8x8_block1"),
    "other shape": (lambda: _broken(_init_kwargs={**TINY, "model_channels": 16}), r"instead of \["),
    "other size": (lambda: _broken(img_resolution=16), "img_resolution is not the one that it was made with"),
    "no tensor": (lambda: _broken(_buffers={"x": 3}), "has x, which is 3, no tensor"),
    "no table": (lambda: _broken(_modules=[1]), "_modules are list, no table"),
    "name": (lambda: _broken(_buffers={"\x1b[2J\n": 3}), r"has a module with a part named '\\x1b\[2J\\n'"),
    "older version": (lambda: persistent(tiny(), TINY, version=3), "type 'class', version 3: only 'class', version 6"),
    "other type": (lambda: persistent(tiny(), TINY, type="func"), "type 'func'"),
}


@pytest.mark.parametrize("name", list(_MISFITS))
def test_misfits_end_in_one_line(name, tmp_path):
    make, message = _MISFITS[name]
    path = _written(tmp_path / "x.pkl", write_snapshot({"ema": make(), "n": 1}))
    with pytest.raises(SignFastError, match=message) as caught:
        models.load(path, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_modules_that_hold_themselves(tmp_path):
    record = persistent(tiny(), TINY)
    record.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["enc"] = torch.nn.ModuleDict()
    inner = record.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["enc"]
    inner.__dict__["_modules"]["again"] = inner
    with pytest.raises(SignFastError, match="nested without end"):
        models.load(_written(tmp_path / "x.pkl", write_snapshot({"ema": record})), "cpu")


def test_files_that_are_none(tmp_path):
    for data, message in (
        (b"", "is empty"),
        (b"hello world", "is no pickle of protocol 2"),
        (b"\x80\x09N.", "is of pickle protocol 9"),
        (tiny_snapshot() + b".", "more follows its pickle"),
    ):
        with pytest.raises(SignFastError, match=message):
            models.load(_written(tmp_path / "x.pkl", data), "cpu")
    (tmp_path / "folder.pkl").mkdir()
    with pytest.raises(SignFastError, match=r"holds no config\.json"):
        models.load(tmp_path / "folder.pkl", "cpu")
    with pytest.raises(SignFastError, match="no file"):
        models.load(tmp_path / "nowhere.pkl", "cpu")


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.pkl"
    with open(path, "wb") as file:
        file.truncate(16 * 2**30 + 1)  # no block of it is on the disk
    with pytest.raises(SignFastError, match="larger than 16 GiB"):
        models.load(path, "cpu")


def test_the_limit_leaves_room(tmp_path):
    """A network as deep as the largest published one takes a tenth of what is allowed."""
    net = models.create("imagenet64-cond-adm", model_channels=32, label_dim=2)
    kwargs = {**models.presets.preset("imagenet64-cond-adm")[1], "model_channels": 32, "label_dim": 2}
    data = write_snapshot({"ema": persistent(net, kwargs)})
    budgets = []
    made = machine.Budget.__init__

    class Counted(machine.Budget):
        def __init__(self, size: int) -> None:
            made(self, size)
            budgets.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sign_fast.checkpoints.published.snapshot.Budget", Counted)
        read_snapshot(_written(tmp_path / "x.pkl", data))
    assert machine.MAX_OPERATIONS - budgets[0].operations < machine.MAX_OPERATIONS / 10


def test_storages_of_the_zip_format_are_found_by_their_directory():
    """As zipfile reads them, aligned and with data descriptors as torch writes them."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(1000.0), "b": torch.zeros(0)}, file)
    members = zip_members(memoryview(file.getvalue()), machine.Budget(len(file.getvalue())))
    with zipfile.ZipFile(file) as want:
        assert {name: bytes(data) for name, data in members.items()} == {n: want.read(n) for n in want.namelist()}


@pytest.mark.parametrize("limit", [5, 65_535])
def test_archives_of_many_files(limit, monkeypatch):
    """Zip64's directory, which is written from 65,535 files on; here from six."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limit)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(10):
            archive.writestr(f"x/data/{i}", b"1")
    data = file.getvalue()
    assert (b"PK\x06\x06" in data) == (limit == 5)
    members = zip_members(memoryview(data), machine.Budget(len(data)))
    assert list(members) == [f"x/data/{i}" for i in range(10)]
