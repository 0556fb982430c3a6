"""The launcher against a stand-in driver that reads each kernel's parameters from its machine code."""

from __future__ import annotations

import gc
import itertools
import os
import re
import struct
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import key
from tests.example_kernels import add, product_kernel
from tests.packs.launching import STREAM, compiled, copy, declare, load, norm, run, seen_by_kernel

_launcher = pytest.importorskip("sign_fast._launcher", reason="the launcher is not built")
pytestmark = pytest.mark.usefixtures("triton_cache")

DriverError, Launcher = _launcher.DriverError, _launcher.Launcher
ROOT = Path(__file__).resolve().parent.parent.parent


def kinds_of_arguments():
    x = torch.zeros(4096)
    for number, skip in itertools.product((4096, 2**40, 2**63, True, 4095.5), (None, x, x[5:])):
        launch = add(x, skip, torch.zeros(4096, dtype=torch.bfloat16), scale=-0.1)
        yield replace(launch, arguments={**launch.arguments, "n": number})
    launch = add(x, None, x, num_warps=8)
    yield replace(launch, arguments={**launch.arguments, "n": 1, "scale": -3}, grid=(5, 4, 3))


@pytest.mark.parametrize("launch", list(kinds_of_arguments()), ids=lambda launch: str(launch.arguments["n"]))
def test_the_kernel_finds_its_arguments(driver, launcher, launch):
    assert run(launcher, launch) == key.key(launch)  # not there yet
    assert driver.report()["launches"] == [] and launcher.launches == 0
    load(launcher, launch)
    assert run(launcher, launch) is None
    (seen,) = driver.report()["launches"]
    assert seen["parameters"] == seen_by_kernel(launch)
    assert seen["symbol"] == "add_kernel" and seen["device"] == 0 and seen["stream"] == STREAM
    assert seen["grid"] == [*launch.grid, 1, 1][:3] and seen["block"] == [32 * launch.num_warps, 1, 1]
    assert seen["shared"] == 0 and launcher.launches == 1 and launcher.loaded == {0: 1}


@pytest.mark.parametrize("launch", [norm(), norm(96, 8, silu=False)], ids=["bundles", "uneven"])
def test_the_kernels_of_an_operation_find_their_arguments(driver, launcher, launch):
    load(launcher, launch)
    assert run(launcher, launch, stream=0) is None
    (seen,) = driver.report()["launches"]
    assert seen["parameters"] == seen_by_kernel(launch) and seen["stream"] == 0
    assert seen["grid"] == [*launch.grid, 1, 1][:3] and seen["block"] == [32 * launch.num_warps, 1, 1]


def test_much_shared_memory_is_asked_for_once(driver, launcher):
    a = torch.zeros(128, 128, dtype=torch.bfloat16)
    launch = Launch(product_kernel, (1,), {"a": a, "b": a, "c": a}, {"SIZE": 128})
    load(launcher, launch)
    for _ in range(3):
        assert run(launcher, launch) is None
    report = driver.report()
    assert report["calls"]["cuFuncSetAttribute"] == 1
    assert {seen["shared"] for seen in report["launches"]} == {compiled(launch)[3]} and compiled(launch)[3] > 48 << 10
    driver.set(shared_limit=60 << 10)
    with pytest.raises(DriverError, match=r"bytes of shared memory.*GPUs with more of it") as failure:
        launcher.add(1, key.key(launch), *compiled(launch))
    assert (failure.value.code, failure.value.function) == (1, "cuFuncSetAttribute")
    assert launcher.loaded == {0: 1} and driver.report()["modules"][1]["unloaded"]
    driver.set(shared_limit=227 << 10)
    load(launcher, launch, 1)
    assert run(launcher, launch, 1) is None and launcher.loaded == {0: 1, 1: 1}


def test_a_grid_without_programs_launches_nothing(driver, launcher):
    launch = copy(grid=(3, 0))
    load(launcher, launch)
    assert run(launcher, launch) is None
    assert driver.report()["launches"] == [] and launcher.launches == 0


@pytest.mark.parametrize(
    "sizes", [b"", b"\x08", b"\x08\x08\x08\x04\x08\x08", b"\x08\x08\x04\x04\x08\x08\x08", b"\x08\x08\x04\x04\x04"]
)
def test_other_parameters_are_not_launched(driver, launcher, sizes):
    launch = copy()
    image, symbol, warps, shared, right = compiled(launch)
    declare(launcher, launch)
    launcher.add(0, key.key(launch), image, symbol, warps, shared, sizes)
    with pytest.raises(ValueError, match="add_kernel takes parameters of"):
        run(launcher, launch)
    assert driver.report()["launches"] == [] and launcher.launches == 0
    launcher.add(0, key.key(launch), image, symbol, warps, shared, right)  # in the place of the wrong one
    assert run(launcher, launch) is None and launcher.loaded == {0: 1}
    for none in (b"\x00", b"\x09", b"\x08" * 300):
        with pytest.raises(ValueError, match="parameter sizes of add_kernel"):
            launcher.add(0, "key", image, symbol, warps, shared, none)


def test_modules_are_loaded_once_a_device(driver, launcher):
    launch, wide = copy(), copy(num_warps=8)
    for device, _ in itertools.product((0, 1), range(3)):
        load(launcher, launch, device)
        load(launcher, wide, device)
        launcher.add(device, "another key", *compiled(launch))
    modules = driver.report()["modules"]
    assert [m["device"] for m in modules] == [0, 0, 1, 1] and len({m["hash"] for m in modules}) == 2
    assert launcher.loaded == {0: 2, 1: 2}
    assert driver.report()["calls"]["cuDevicePrimaryCtxRetain"] == 2
    assert {m["bytes"] for m in modules} == {len(compiled(launch)[0]), len(compiled(wide)[0])}


def test_each_device_has_its_own(driver, launcher):
    launch = copy()
    load(launcher, launch, 1)
    assert run(launcher, launch, 0) == key.key(launch)
    assert run(launcher, launch, 1) is None
    load(launcher, launch, 0)
    assert run(launcher, launch, 0) is None and run(launcher, launch, 1) is None
    assert [seen["device"] for seen in driver.report()["launches"]] == [1, 0, 1]


@pytest.mark.parametrize("current", [-1, 0, 1])
def test_the_threads_context_is_as_before(driver, launcher, current):
    driver.set(context=current)
    launch = copy()
    load(launcher, launch, 1)
    assert run(launcher, launch, 1) is None
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(DriverError):
        run(launcher, launch, 1)
    with pytest.raises(DriverError):
        launcher.add(1, "key", b"nothing", "add_kernel", 4, 0, b"")
    assert driver.context == current and driver.depth == (current >= 0)
    assert driver.report()["calls"].get("cuCtxPushCurrent", 0) == (0 if current == 1 else 4)


def test_ptx_is_loaded_too(driver, launcher):
    launch = copy()
    done = ahead_of_time.compile(launch, 90)
    _, symbol, warps, shared, sizes = compiled(launch)
    declare(launcher, launch)
    launcher.add(0, key.key(launch), done.ptx.encode(), symbol, warps, shared, sizes)
    assert run(launcher, launch) is None


def test_loading_while_a_graph_is_captured(driver, launcher):
    launch = copy()
    for mode in (0, 1):
        driver.set(capturing=1, capture_mode=mode)
        load(launcher, launch, mode)
        assert driver.capture_mode == mode
        for function in ("cuModuleLoadData", "cuModuleGetFunction", "cuCtxPushCurrent"):
            driver.fail(function, 2)
            with pytest.raises(DriverError):
                load(launcher, copy(num_warps=8), mode)
            assert driver.capture_mode == mode
        with pytest.raises(DriverError):
            load(launcher, launch, 7)
        assert driver.capture_mode == mode
    assert run(launcher, launch) is None


FORK = """
import os, sys
from sign_fast._launcher import DriverError, Launcher

library, when = sys.argv[1:]
launcher, other = Launcher(library), Launcher(library)
launcher.declare("k", [])
if when == "after":
    launcher.driver_version()
elif when == "failed":  # what could not be opened is not in use
    launcher = Launcher("/nowhere/" + library)
    try:
        launcher.driver_version()
    except DriverError:
        launcher = other

def calls():
    yield launcher.driver_version
    yield lambda: launcher.add(0, "k", b"", "k", 4, 0, b"")
    if when == "after":
        launcher.declare("k", [])
        yield lambda: launcher.launch(0, 0, "k", (1,), {}, {}, 4, 1, True)

child = os.fork()
if child == 0:
    said = []
    for call in calls():
        try:
            said.append(str(call()))
        except DriverError as error:
            said.append(f"{error.code} {error.function} {error}")
    said.append(str(other.driver_version()))  # opened by nobody before the fork
    print(*said, sep="\\n", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(launcher.driver_version())
"""


@pytest.mark.parametrize("when", ["before", "after", "failed"])
def test_fork(driver_library, when):
    command = [sys.executable, "-c", textwrap.dedent(FORK), str(driver_library), when]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["12080", "12080"]
    if when == "after":
        forked = "0 fork this process was forked after CUDA was in use; start workers with spawn"
        assert lines[:-2] == [forked] * 3
    else:
        assert lines[0] == "12080" and re.match("200 cuModuleLoadData ", lines[1]) and len(lines) == 4


def test_threads(driver, launcher):
    x = torch.zeros(4096)
    launches = [add(x, None, x, num_warps=4), add(x, x, x, num_warps=4), add(x, None, x, num_warps=8)]
    code = {key.key(launch): compiled(launch) for launch in launches}
    start, failures = threading.Barrier(8), []

    def work(own: int) -> None:
        try:
            start.wait()
            for turn in range(200):
                launch, device = launches[(own + turn) % 3], (own + turn // 3) % 2
                missing = run(launcher, launch, device)
                if missing is not None:
                    launcher.add(device, missing, *code[missing])
                    assert run(launcher, launch, device) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    report = driver.report()
    assert launcher.launches == len(report["launches"]) == 8 * 200
    assert launcher.loaded == {0: 3, 1: 3} and len(report["modules"]) == 6
    want = {launch.num_warps * 32: [] for launch in launches}
    for launch in launches:
        want[launch.num_warps * 32].append(seen_by_kernel(launch))
    assert all(seen["parameters"] in want[seen["block"][0]] for seen in report["launches"])


def test_python_runs_while_the_driver_works(driver, launcher):
    """A value that launches while it is read: nothing is shared between launches under way."""
    inner = copy()
    load(launcher, inner)

    class Nested:
        dtype = torch.float32

        def data_ptr(self):
            assert run(launcher, inner) is None
            return 4096

    outer = copy()
    outer = replace(outer, arguments={**outer.arguments, "x": Nested()})
    assert run(launcher, outer) is None
    first, second = driver.report()["launches"]
    assert first["parameters"] == seen_by_kernel(inner)
    assert second["parameters"][0] == struct.pack("<Q", 4096)
    assert (
        second["parameters"][1:]
        == seen_by_kernel(replace(outer, arguments={**outer.arguments, "x": inner.arguments["x"]}))[1:]
    )


def _resident_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_launches_leave_nothing_behind(driver, launcher):
    launch = norm()
    load(launcher, launch)
    name = declare(launcher, launch)
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    counted = [launch.arguments, launch.constants, launch.grid, name, torch.bfloat16, torch.float32, *tensors]
    missing = {**launch.arguments, "emb": launch.arguments["weight"]}
    driver.set(recording=0)

    def many(count: int) -> None:
        options = (launch.constants, launch.num_warps, launch.num_stages, launch.enable_fp_fusion)
        for _ in range(count):
            assert launcher.launch(0, 0, name, launch.grid, launch.arguments, *options) is None
            assert launcher.launch(0, 0, name, launch.grid, missing, *options) is not None

    many(1000)
    gc.collect()
    before, memory = [sys.getrefcount(value) for value in counted], _resident_kb()
    many(100_000)
    assert [sys.getrefcount(value) for value in counted] == before
    assert _resident_kb() - memory < 1024
    for _ in range(1000):  # failures leave nothing either
        with pytest.raises(TypeError):
            launcher.key(name, {**launch.arguments, "x": "text"}, launch.constants, 4, 1, True)
    assert [sys.getrefcount(value) for value in counted] == before


def test_a_launcher_is_freed(driver):
    default, image = "a default of its own", compiled(copy())
    before = sys.getrefcount(default)
    for _ in range(20):
        launcher = Launcher(driver.path)
        launcher.declare("k", [("A", True, default)])
        launcher.key("k", {}, {}, 4, 1, True)
        launcher.add(0, "k", *image)
    assert sys.getrefcount(default) > before
    del launcher
    assert sys.getrefcount(default) == before
