"""Launches from packs on a stand-in driver: what hits, what misses, and what is said and done then."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile

import pytest
import torch

from sign_fast.kernels import device as devices
from sign_fast.kernels import launch as launching
from sign_fast.kernels.dispatch import MissingKernelError, NoKernelError, SlowPathError, SlowPathWarning
from sign_fast.kernels.packs import dispatch, store
from sign_fast.kernels.packs.architectures import parse
from sign_fast.kernels.packs.dispatch import DevicePacks, MissingKernelWarning
from sign_fast.kernels.packs.key import key
from sign_fast.kernels.packs.store import Pack, packs_in
from tests.packs import small_packs
from tests.packs.launching import STREAM, seen_by_kernel

_launcher = pytest.importorskip("sign_fast._launcher", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(small_pack_files):
    return small_pack_files[0].parent


@pytest.fixture(scope="module")
def known():
    return small_packs.launches()


@pytest.fixture
def on_h100(folder, launcher):
    return DevicePacks(0, 90, dispatch.usable(90, packs_in(folder)), launcher)


def test_a_hit_is_launched_with_what_the_kernel_will_see(on_h100, driver, known):
    for launch in known:
        assert on_h100.launch(launch, STREAM)
    report = driver.report()
    assert len(report["launches"]) == len(known)
    for launch, seen in zip(known, report["launches"], strict=True):
        variant = on_h100.packs[0].find(key(launch))
        assert seen["symbol"] == variant.symbol and seen["shared"] == variant.shared_bytes
        assert seen["parameters"] == seen_by_kernel(launch) and seen["stream"] == STREAM
    assert on_h100.hits.total() == len(known) and not on_h100.misses
    for launch in known:
        on_h100.launch(launch, STREAM)
    assert len(driver.report()["modules"]) == len({key(launch) for launch in known})  # loaded once


def test_which_packs_a_gpu_can_use(folder):
    def names(number):
        return [pack.path.stem for pack in dispatch.usable(number, packs_in(folder))]

    assert names(90) == ["sm_90", "ptx_89"] and names(80) == ["sm_80"]
    assert names(86) == ["sm_80"] and names(89) == ["sm_80", "ptx_89"]  # any newer GPU of the generation
    assert names(100) == names(120) == names(133) == ["ptx_89"]  # and of those to come
    assert names(75) == []


def test_a_newer_gpu_takes_the_ptx(folder, launcher, driver):
    packs = DevicePacks(0, 120, dispatch.usable(120, packs_in(folder)), launcher)
    own = small_packs.launches(architecture=120)
    for launch in own:
        assert packs.launch(launch, STREAM)
    (pack,) = packs.packs
    texts = [pack.image(pack.find(key(launch))) for launch in own]  # of which the driver reads what is before the zero
    assert sorted(m["bytes"] for m in driver.report()["modules"]) == sorted(len(text) - 1 for text in set(texts))


def test_a_miss_is_told_once_and_left_to_triton(on_h100, driver):
    other = small_packs.other_shape()
    with pytest.warns(MissingKernelWarning) as caught:
        assert not on_h100.launch(other, STREAM)
        assert not on_h100.launch(other, STREAM)
    (told,) = caught
    text = str(told.message)
    assert key(other) in text and "no pack has that variant" in text and "\n" not in text
    assert "sign-fast build-cubins --archs 9.0" in text and "SIGN_FAST_ARCHS=9.0 python -m build" in text
    assert driver.report()["launches"] == [] and on_h100.misses.total() == 2 and not on_h100.hits


def test_no_jit_raises_instead(on_h100, driver, monkeypatch, known):
    monkeypatch.setenv(dispatch.NO_JIT, "1")
    assert on_h100.launch(known[0], STREAM)
    with pytest.raises(MissingKernelError, match="SIGN_FAST_NO_JIT=1 forbids") as caught:
        on_h100.launch(small_packs.other_shape(), STREAM)
    assert "build-cubins --archs 9.0" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.delenv(dispatch.NO_JIT)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(NoKernelError, match="Triton, which could compile it now, is not installed"):
        on_h100.launch(small_packs.other_shape(), STREAM)


def test_a_kernel_that_no_pack_has(on_h100, known):
    from sign_fast.kernels.launch import Kernels, Launch

    unknown = Launch(Kernels("combine.triton_kernels").another, (1,), {})
    with pytest.warns(MissingKernelWarning, match="no pack has that kernel"):
        assert not on_h100.launch(unknown, STREAM)


def test_code_of_another_source_is_not_run(on_h100, driver, known, monkeypatch):
    monkeypatch.setattr(store, "source_hash", lambda name: "another")
    with pytest.warns(MissingKernelWarning, match="another version of the kernel's source"):
        assert not on_h100.launch(known[0], STREAM)
    assert driver.report()["modules"] == []


def damaged(folder, tmp_path, member):
    """A folder with sm_90.zip whose `member` has one byte changed."""
    target = tmp_path / "damaged"
    target.mkdir()
    with zipfile.ZipFile(folder / "sm_90.zip") as archive, zipfile.ZipFile(target / "sm_90.zip", "w") as out:
        for name in archive.namelist():
            content = archive.read(name)
            out.writestr(name, content[:-1] + bytes([content[-1] ^ 1]) if name == member else content)
    return target


def test_damage_falls_to_triton_or_raises(folder, tmp_path, launcher, driver, known, monkeypatch):
    member = Pack(folder / "sm_90.zip").find(key(known[0])).member
    packs = DevicePacks(0, 90, packs_in(damaged(folder, tmp_path, member)), launcher)
    with pytest.warns(MissingKernelWarning, match=rf"sm_90\.zip: {member} or its entry is damaged"):
        assert not packs.launch(known[0], STREAM)
    assert driver.report()["modules"] == []
    assert packs.launch(known[1], STREAM)  # the others are whole
    monkeypatch.setenv(dispatch.NO_JIT, "1")
    with pytest.raises(MissingKernelError, match="is damaged"):
        packs.launch(known[0], STREAM)


def test_the_next_pack_serves_where_one_is_damaged(folder, tmp_path, launcher, driver):
    launch = small_packs.launches(architecture=90)[0]
    member = Pack(folder / "sm_90.zip").find(key(launch)).member
    packs = [*packs_in(damaged(folder, tmp_path, member)), Pack(folder / "ptx_89.zip")]
    assert packs[1].find(key(launch)) is not None
    on_device = DevicePacks(0, 90, packs, launcher)
    assert on_device.launch(launch, STREAM) and len(driver.report()["launches"]) == 1


def test_an_unreadable_pack_is_left_out(folder, tmp_path):
    shutil.copy(folder / "sm_90.zip", tmp_path)
    (tmp_path / "sm_80.zip").write_bytes(b"no zip")
    with pytest.warns(SlowPathWarning, match="left out: .*sm_80.zip cannot be read"):
        assert [p.path.name for p in dispatch.usable(90, packs_in(tmp_path))] == ["sm_90.zip"]


@pytest.mark.parametrize(
    ("function", "code", "why"),
    [
        ("cuModuleLoadData", 209, "for other GPUs, or newer than this driver"),
        ("cuModuleLoadData", 200, "damaged, or newer than this driver"),
        ("cuModuleLoadData", 221, "PTX compiler is missing"),
        ("cuModuleLoadData", 222, "the PTX is newer than the driver"),
        ("cuModuleGetFunction", 500, "does not have it"),
    ],
)
def test_what_the_driver_cannot_use_is_a_miss(folder, launcher, driver, known, function, code, why):
    packs = DevicePacks(0, 90, [Pack(folder / "sm_90.zip")], launcher)
    driver.fail(function, code)
    with pytest.warns(MissingKernelWarning, match=why):
        assert not packs.launch(known[0], STREAM)


def stale(folder, tmp_path):
    """A pack whose kernels are of another source, with a parameter fewer, and whose variants are the folder's."""
    with zipfile.ZipFile(folder / "sm_90.zip") as archive, zipfile.ZipFile(tmp_path / "sm_90.zip", "w") as out:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "index.json":
                facts = json.loads(content)
                for row in facts["kernels"].values():
                    row.update(source="0" * 64, parameters=row["parameters"][:-1])
                content = json.dumps(facts)
            out.writestr(name, content)
    return Pack(tmp_path / "sm_90.zip")


def test_a_stale_pack_is_a_miss_and_stands_in_no_ones_way(folder, tmp_path, launcher, driver, known):
    old = stale(folder, tmp_path)
    with pytest.warns(MissingKernelWarning, match="sm_90.zip is of another version of the kernel's source"):
        assert not DevicePacks(0, 90, [old], launcher).launch(known[0], STREAM)
    both = DevicePacks(0, 90, [old, Pack(folder / "sm_90.zip")], launcher)
    assert both.launch(known[0], STREAM) and driver.report()["launched"] == 1


def test_other_failures_are_the_callers(folder, launcher, driver, known):
    packs = DevicePacks(0, 90, [Pack(folder / "sm_90.zip")], launcher)
    driver.fail("cuModuleLoadData", 2)
    with pytest.raises(torch.OutOfMemoryError, match="memory"):
        packs.launch(known[0], STREAM)
    assert packs.launch(known[0], STREAM)  # once there is some
    driver.fail("cuLaunchKernel", 2)
    with pytest.raises(torch.OutOfMemoryError):
        packs.launch(known[0], STREAM)
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(_launcher.DriverError) as caught:
        packs.launch(known[0], STREAM)
    assert caught.value.code == 700


@pytest.fixture
def pretended(monkeypatch, folder, launcher):
    """cuda:0 is an H100 whose packs are the folder's; tensors stay on the CPU."""
    monkeypatch.setattr(devices, "_cuda_device", lambda index: devices.KNOWN[90])
    monkeypatch.setattr(dispatch, "_on_device", {})
    monkeypatch.setattr(dispatch, "_launcher", lambda: launcher)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    monkeypatch.setenv(dispatch.PACKS, str(folder))
    devices._gpu_reason.cache_clear()
    yield
    devices._gpu_reason.cache_clear()


def test_operators_launch_from_packs(pretended, driver, known):
    launching.run(known, torch.device("cuda:0"))
    assert [seen["stream"] for seen in driver.report()["launches"]] == [STREAM] * len(known)
    assert dispatch.of_device(0).hits.total() == len(known)


def test_no_triton_is_needed_where_a_pack_fits(pretended, monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    assert devices.gpu_reason(0) is None
    devices._gpu_reason.cache_clear()
    monkeypatch.setattr(dispatch, "_on_device", {0: None})
    assert "Triton is not installed, and no pack" in str(devices.gpu_reason(0))


def test_plain_torch_where_there_is_neither_a_pack_nor_triton(monkeypatch):
    from sign_fast.kernels.operators import _or_plain

    def lacks(x):
        raise NoKernelError("no machine code for k")

    guarded = _or_plain("double", lacks, lambda x: 2 * x)
    monkeypatch.setattr("sign_fast.kernels.dispatch._warned", set())
    with pytest.warns(
        SlowPathWarning, match="double runs on its slower path: no machine code for k; pip install triton"
    ):
        assert guarded(3) == 6
    monkeypatch.setenv("SIGN_FAST_STRICT", "1")
    with pytest.raises(SlowPathError, match="no machine code for k"):
        guarded(3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_in_plain_torch_is_that_of_the_kernels(interleaved):
    """Forward and backward each stand alone: either may be the pack's. logsumexp is of base 2 there."""
    from sign_fast.kernels.attention import reference, registration

    assert registration._PLAIN.keys() == registration._IMPLEMENTATIONS.keys()
    torch.manual_seed(0)
    qkv = torch.randn(2, 3 * 2 * 8, 4, 4).contiguous(memory_format=torch.channels_last)
    dout = torch.randn(2, 16, 4, 4)
    wide = qkv.double().requires_grad_()
    q, k, v = registration.split(wide, 2, interleaved)
    want = registration._like_projected(reference.attention(q, k, v), wide)
    (gradient,) = torch.autograd.grad(want, wide, dout.double())
    out, logsumexp = registration._plain_projected_forward(qkv, 2, interleaved)
    assert torch.allclose(out.double(), want, atol=1e-5) and out.stride() == want.stride()
    logits = (q @ k.transpose(-2, -1)) / 8**0.5
    assert torch.allclose(logsumexp.double(), torch.log2(logits.exp().sum(-1)), atol=1e-5)
    found = registration._plain_projected_backward(dout, qkv, out, torch.empty(0), 2, interleaved)
    assert torch.allclose(found.double(), gradient, atol=1e-5) and found.stride() == qkv.stride()


def test_folders_without_packs_are_told_and_all_packs_can_be_left_out(monkeypatch, tmp_path, folder):
    monkeypatch.setenv(dispatch.PACKS, f"{folder}:{tmp_path / 'mistyped'}")
    with pytest.warns(SlowPathWarning, match="mistyped, where there are no packs"):
        assert {pack.path.parent for pack in dispatch.installed()} == {folder}
    monkeypatch.setattr(dispatch, "FOLDER", folder)
    monkeypatch.setenv(dispatch.PACKS, "none")
    assert dispatch.installed() == []
    monkeypatch.setenv(dispatch.PACKS, "")
    assert len(dispatch.installed()) == 3


@pytest.mark.parametrize(("number", "archs"), [(90, "9.0"), (86, "8.6"), (133, "8.9+PTX")])
def test_the_build_line_can_be_built(number, archs):
    line = dispatch.build_line(number)
    assert f"--archs {archs} " in line and f"SIGN_FAST_ARCHS={archs} " in line and parse(archs)


def test_without_packs_nothing_is_said_and_triton_runs(monkeypatch, known):
    ran = []
    monkeypatch.setattr(dispatch, "_on_device", {0: None})
    monkeypatch.setattr(launching.Launch, "run", lambda launch: ran.append(launch))
    monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launching.run(known, torch.device("cuda:0"))
    assert ran == known
    monkeypatch.setattr(devices, "_cuda_device", lambda index: devices.KNOWN[90])
    monkeypatch.setenv(dispatch.NO_JIT, "1")
    with pytest.raises(MissingKernelError, match="no packs"):
        launching.run(known, torch.device("cuda:0"))


def test_a_gpu_that_no_pack_fits_is_told(pretended, monkeypatch, tmp_path, folder):
    shutil.copy(folder / "sm_80.zip", tmp_path)
    monkeypatch.setenv(dispatch.PACKS, str(tmp_path))
    with pytest.warns(
        MissingKernelWarning, match=r"no pack of machine code fits cuda:0 \(sm_90\), there are .*sm_80.zip; for"
    ):
        assert not dispatch.serves(0)


def test_without_a_launcher_packs_are_not_used_and_it_is_told(pretended, monkeypatch):
    monkeypatch.setattr(dispatch, "_launcher", lambda: None)
    monkeypatch.setattr(dispatch, "launcher_module", lambda: "the launcher is not built (x)")
    with pytest.warns(SlowPathWarning, match="packs of machine code are not used: the launcher is not built"):
        assert dispatch.of_device(0) is None


def test_info_tells_packs_hits_and_misses(pretended, monkeypatch, known):
    from sign_fast.cli.info import machine_code

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    packs = dispatch.of_device(0)
    packs.launch(known[0], STREAM)
    with pytest.warns(MissingKernelWarning):
        packs.launch(small_packs.other_shape(), STREAM)
    facts = machine_code()
    own, forward = (str(pack.path) for pack in packs.packs)  # by their paths: the package's may have the same names
    assert facts[own].startswith(f"{len(packs.packs[0].keys)} variants, ") and "of small" in facts[own]
    assert facts["cuda:0"] == f"{own}, {forward}; 1 launches from them, 1 not"
    assert key(small_packs.other_shape()) in facts["cuda:0 lacked, 1"]
    assert facts["cuda:0 lacks"] == "0 variants of the packs' networks at batches 1 and 64"


def test_what_the_packs_networks_lack_on_a_gpu_is_found_without_running_them(pretended, monkeypatch):
    """As where a network, or a GPU's launch configuration, is not the one that the pack was made for."""
    from sign_fast.kernels.packs import calls

    packs = dispatch.of_device(0)
    own, other = small_packs.table()["small"], small_packs.other_call()
    monkeypatch.setattr(calls, "networks", lambda: {"small": own})
    assert packs.lacking(devices.KNOWN[90]) == []
    monkeypatch.setattr(calls, "networks", lambda: {"small": [*own, other], "elsewhere": [other]})
    want = {key(launch) for batch in dispatch.CHECKED_BATCHES for launch in other.launches(batch, devices.KNOWN[90])}
    assert set(packs.lacking(devices.KNOWN[90])) == want and want
    packs.packs = packs.packs[1:]  # the PTX, which is not for this GPU's configurations of attention
    assert set(packs.lacking(devices.KNOWN[90])) >= want


def test_info_says_what_the_gpu_lacks(pretended, monkeypatch, tmp_path):
    from sign_fast.cli.info import machine_code

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv(dispatch.PACKS, str(tmp_path))
    with pytest.warns(SlowPathWarning, match="where there are no packs"):
        facts = machine_code()
    assert facts["packs"].startswith("none") and facts["cuda:0"].startswith("no pack for sm_90: for your network's")
    (tmp_path / "sm_90.zip").write_bytes(b"no zip")
    told = machine_code()[str(tmp_path / "sm_90.zip")]
    assert told.startswith("not used: ") and told.endswith("build it anew or remove it")
