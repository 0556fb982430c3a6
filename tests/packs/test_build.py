"""Packs: every file is what its metadata says, equal inputs give equal bytes, and what is wrong is said in a line."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from dataclasses import replace

import pytest
import triton

from sign_fast.kernels.ahead_of_time import specialise
from sign_fast.kernels.device import KNOWN
from sign_fast.kernels.packs import build as builder
from sign_fast.kernels.packs import elf, store
from sign_fast.kernels.packs.architectures import parse
from sign_fast.kernels.packs.calls import BATCHES
from sign_fast.kernels.packs.devices import devices, devices_for
from sign_fast.kernels.packs.key import key
from sign_fast.kernels.packs.store import DamagedPackError, Pack
from sign_fast.kernels.resources import _cuobjdump
from tests.packs import small_packs


@pytest.fixture(scope="module")
def packs(small_pack_files):
    return {path.stem: Pack(path) for path in small_pack_files}


def test_a_pack_for_each_architecture_and_ptx(packs):
    assert {name: (p.architecture, p.kind) for name, p in packs.items()} == {
        "sm_80": (80, "cubin"), "sm_90": (90, "cubin"), "ptx_89": (89, "ptx"),
    }  # fmt: skip
    for pack in packs.values():
        assert pack.triton == triton.__version__ and pack.networks == ["small"] and re.match(r"1[23]\.", pack.ptxas)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_machine_code_is_what_its_metadata_say(packs, name, tmp_path):
    pack = packs[name]
    assert len(pack.keys) > 10
    with zipfile.ZipFile(pack.path) as archive:
        assert set(archive.namelist()) == {"index.json"} | {pack.find(key).member for key in pack.keys}
    for text in pack.keys:
        variant = pack.find(text)
        image = pack.image(variant)
        assert store.seal(variant, image) + ".cubin" == variant.member
        assert elf.architecture(image) == pack.architecture and elf.symbols(image) == [variant.symbol]
        assert text.startswith(f"{text.split(' ')[0]} ") and text.split(" ")[0].endswith(f".{variant.symbol}")
        assert bytes(variant.parameter_sizes) == elf.parameter_sizes(image, variant.symbol)
        sizes = {"fp32": 4, "i32": 4, "u1": 1}
        passed = [8 if kind[0] == "*" else sizes.get(kind, 8) for kind in variant.signature.values()]
        assert list(variant.parameter_sizes) == [*passed, 8, 8]  # then Triton's scratch pointers
        (tmp_path / "code.cubin").write_bytes(image)
        command = [_cuobjdump(), "-res-usage", str(tmp_path / "code.cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert int(re.search(rf"Function {variant.symbol}:\s+REG:(\d+)", usage).group(1)) == variant.registers
        assert 0 <= variant.shared_bytes <= KNOWN[pack.architecture].shared_bytes
        assert f"warps={variant.num_warps} " in text
    assert {row.source for row in pack.kernels.values()} == {store.source_hash(name) for name in pack.kernels}


def test_ptx_is_forward_compatible_text(packs):
    pack = packs["ptx_89"]
    for text in pack.keys:
        image = pack.image(pack.find(text))
        assert image.endswith(b"\0") and image.count(b"\0") == 1
        assert re.search(rb"^\.target sm_89$", image, re.M)  # sm_90a would run on one GPU only


def test_the_packs_have_what_the_devices_launch(packs):
    for architecture in (80, 90):
        for gpu in devices_for(architecture, ptx=False):
            for call in small_packs.table()["small"]:
                for batch in BATCHES:
                    for launch in call.launches(batch, gpu):
                        assert packs[f"sm_{architecture}"].find(key(launch)) is not None
    for call in small_packs.table()["small"]:  # and a newer GPU finds its own in the PTX
        for launch in call.launches(8, KNOWN[120]):
            assert packs["ptx_89"].find(key(launch)) is not None


def test_signatures_are_tritons(packs):
    (launch,) = small_packs.table()["small"][0].launches(4, KNOWN[90])
    signature = specialise(launch).signature
    variant = packs["sm_90"].find(key(launch))
    assert variant.signature == {name: kind for name, kind in signature.items() if kind != "constexpr"}


def test_equal_inputs_give_equal_bytes(small_pack_files, tmp_path):
    table = small_packs.table()
    (again,) = builder.build(parse("9.0"), tmp_path, table=table, jobs=1)
    first = next(path for path in small_pack_files if path.name == again.name)
    assert again.read_bytes() == first.read_bytes()


def test_devices():
    assert {d.architecture for d in devices(90)} == {90}
    assert {d.architecture for d in devices(87)} == {87} and {d.shared_bytes for d in devices(87)} == {163 << 10}
    assert {d.architecture for d in devices(103)} == {103}  # not listed: a B200's figures
    assert {d.architecture for d in devices_for(90, ptx=False)} == {90}
    assert {d.architecture for d in devices_for(80, ptx=False)} == {
        80,
        86,
        87,
        89,
    }  # its machine code runs on all of them
    assert {d.architecture for d in devices_for(86, ptx=False)} == {86, 87, 89}
    assert {d.architecture for d in devices_for(89, ptx=True)} == {89, 90, 100, 120}
    for architecture in (80, 86, 89, 90, 100, 120):
        assert KNOWN.get(architecture, devices(architecture)[0]).shared_bytes == devices(architecture)[0].shared_bytes
        assert min(d.multiprocessors for d in devices(architecture)) <= 20


@pytest.mark.parametrize(("architecture", "others"), [(80, (86, 87, 89)), (89, ())])
def test_a_pack_serves_every_gpu_that_its_code_runs_on(packs, architecture, others):
    """And any number of multiprocessors: slices and smaller cards."""
    pack = packs["sm_80"] if architecture == 80 else packs["ptx_89"]
    gpus = [
        replace(d, multiprocessors=n)
        for o in (architecture, *others)
        for d in devices(o)[:1]
        for n in (16, 46, 82, 108)
    ]
    missing = {
        (gpu.architecture, gpu.multiprocessors, key(launch))
        for gpu in gpus
        for call in small_packs.table()["small"]
        for batch in (1, 8, 64, 512)
        for launch in call.launches(batch, gpu)
        if pack.find(key(launch)) is None
    }
    assert not missing


def test_names_of_networks():
    table = {"digits-cond": [], "digits-uncond": [], "sdxl": []}
    assert list(builder.chosen(["digits"], table)) == ["digits-cond", "digits-uncond"]
    assert list(builder.chosen(["sdxl", "digits-cond"], table)) == ["digits-cond", "sdxl"]
    assert builder.chosen(None, table) == table
    for wrong in ("digit", "sdxl2", ""):
        with pytest.raises(builder.BuildError, match="unknown network"):
            builder.chosen([wrong], table)


def test_nothing_is_built_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(builder.BuildError, match="TRITON_INTERPRET is set"):
        builder.build(parse("9.0"), tmp_path, table={})


def test_a_kernel_that_does_not_compile_is_named(tmp_path, monkeypatch):
    (need, *_) = builder.needs(small_packs.table()["small"], devices(90)[:1])

    def fails(*_):
        raise ValueError("first line\nsecond")

    monkeypatch.setattr(builder, "compile", fails)
    with pytest.raises(builder.BuildError) as caught:
        builder._compile((need, 90, False))
    assert str(caught.value) == f"{need.key} does not compile for 90: first line"


def broken(path, tmp_path, change):
    """A copy of a pack with another index, or other bytes."""
    target = tmp_path / path.name
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as out:
        for name in archive.namelist():
            out.writestr(name, change(name, archive.read(name)))
    return Pack(target)


def test_damage_is_named(small_pack_files, tmp_path):
    path = next(p for p in small_pack_files if p.stem == "sm_90")
    good = Pack(path)
    variant = good.find(good.keys[0])
    flipped = broken(path, tmp_path, lambda n, c: c[:-1] + bytes([c[-1] ^ 1]) if n == variant.member else c)
    with pytest.raises(DamagedPackError, match=rf"sm_90\.zip: {variant.member} or its entry is damaged"):
        flipped.image(variant)
    cut = tmp_path / "cut.zip"
    for size in (0, 10, 1000, path.stat().st_size - 30):
        cut.write_bytes(path.read_bytes()[:size])
        with pytest.raises(DamagedPackError, match=r"cut\.zip cannot be read"):
            _ = Pack(cut).architecture
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(variant.member).header_offset + 30 + len(variant.member)
    raw[start + 5 : start + 50] = bytes(45)
    (tmp_path / "raw.zip").write_bytes(raw)
    with pytest.raises(DamagedPackError, match=r"raw\.zip"):
        Pack(tmp_path / "raw.zip").image(variant)

    def other(**changes):
        def change(name, content):
            return json.dumps(json.loads(content) | changes) if name == "index.json" else content

        return broken(path, tmp_path, change)

    rows = json.loads(zipfile.ZipFile(path).read("index.json"))["variants"]
    more_threads = {**rows, variant.key: {**rows[variant.key], "num_warps": 32}}
    with pytest.raises(DamagedPackError, match="or its entry is damaged"):  # what the launch takes is sealed, too
        wrong = other(variants=more_threads)
        wrong.image(wrong.find(variant.key))
    first, second = (rows[key] for key in good.keys[:2])
    with pytest.raises(DamagedPackError, match="or its entry is damaged"):
        wrong = other(variants={**rows, variant.key: second})
        wrong.image(wrong.find(variant.key))
    for entry in ({}, {**first, "num_warps": "4"}, {**first, "parameter_sizes": ["x"]}, {**first, "more": 1}, 7):
        with pytest.raises(DamagedPackError, match="no proper entry"):
            other(variants={variant.key: entry}).find(variant.key)
    for facts in ({"kernels": [1]}, {"variants": 5}, {"networks": 5}, {"architecture": "ninety"}, {"kind": "zzz"}):
        with pytest.raises(DamagedPackError, match="cannot be read: its "):
            _ = other(**facts).architecture
    for kernels in ({"a": {}}, {"a": {"source": "", "parameters": [3]}}):
        with pytest.raises(DamagedPackError, match="no proper list"):
            _ = other(kernels=kernels).kernels
    with pytest.raises(DamagedPackError, match="has format 2, this is for 1"):
        _ = other(format=2).kind
    with pytest.raises(DamagedPackError, match="cannot be read"):
        _ = Pack(tmp_path / "none.zip").kind


def test_a_pack_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="no space"):
        store.write_pack(tmp_path / "sm_90.zip", 90, "cubin", "3", "12.8", [], {}, [])
    assert list(tmp_path.iterdir()) == []


def test_the_source_of_a_kernel_is_all_that_its_code_is_made_from(tmp_path, monkeypatch):
    """Kernels call functions of their folder's other files, and read constants of its reference."""
    for name in ("packs", "op"):
        (tmp_path / name).mkdir()
    for name in ("triton_kernels.py", "triton_backward.py", "reference.py", "config.py"):
        (tmp_path / "op" / name).write_text(name)
    monkeypatch.setattr(store, "__file__", str(tmp_path / "packs" / "store.py"))

    def found():
        store.source_hash.cache_clear()
        return store.source_hash("op.triton_backward.kernel")

    hashes = [found()]
    for name in ("triton_kernels.py", "triton_backward.py", "reference.py"):
        (tmp_path / "op" / name).write_text(f"{name} changed")
        hashes.append(found())
    assert len({*hashes, ""}) == 5
    (tmp_path / "op" / "config.py").write_text("another block size")  # is in the variant's key
    assert found() == hashes[-1]
    assert store.source_hash("elsewhere.kernel") == ""
    store.source_hash.cache_clear()
