"""Each failure of the driver: its one line, its attributes, and that nothing is left behind."""

from __future__ import annotations

import pytest

from sign_fast.kernels.packs import key
from tests.packs import stand_in
from tests.packs.launching import compiled, copy, load, run

_launcher = pytest.importorskip("sign_fast._launcher", reason="the launcher is not built")
pytestmark = pytest.mark.usefixtures("triton_cache")

DriverError, Launcher = _launcher.DriverError, _launcher.Launcher


def test_nothing_is_opened_before_it_is_needed():
    launcher = Launcher("/nowhere/libcuda.so.1")
    launcher.declare("k", [])
    assert launcher.launch(0, 0, "k", (1,), {}, {}, 4, 1, True) == "k warps=4 stages=1 fused=1"
    assert launcher.loaded == {} and launcher.launches == 0
    for call in (launcher.driver_version, lambda: launcher.add(0, "k", b"", "k", 4, 0, b"")):
        with pytest.raises(DriverError, match=r"/nowhere/libcuda\.so\.1.*install NVIDIA's driver") as failure:
            call()
        assert (failure.value.code, failure.value.function) == (0, "dlopen")
        assert isinstance(failure.value, RuntimeError) and "\n" not in str(failure.value)


def test_a_library_that_is_no_driver():
    with pytest.raises(
        DriverError, match=r"libm.so.6 is no CUDA driver library: it lacks cuDriverGetVersion"
    ) as failure:
        Launcher("libm.so.6").driver_version()
    assert (failure.value.code, failure.value.function) == (0, "cuDriverGetVersion")


def test_a_driver_that_is_too_old(driver, launcher):
    driver.set(version=11040)
    with pytest.raises(DriverError, match=r"supports CUDA 11\.4, and 12\.0 is needed; update the driver") as failure:
        launcher.driver_version()
    assert (failure.value.code, failure.value.function) == (0, "cuDriverGetVersion")
    driver.set(version=13010)
    assert launcher.driver_version() == 13010


def test_a_driver_that_lacks_a_function(tmp_path):
    incomplete = Launcher(str(stand_in.build(tmp_path, incomplete=True)))
    with pytest.raises(
        DriverError, match=r"supports CUDA 12\.8 but lacks cuThreadExchangeStreamCaptureMode"
    ) as failure:
        incomplete.driver_version()
    assert (failure.value.code, failure.value.function) == (0, "cuThreadExchangeStreamCaptureMode")


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("cuInit", 100, "CUDA_ERROR_NO_DEVICE.*CUDA_VISIBLE_DEVICES"),
        ("cuInit", 803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH.*restart the machine"),
        ("cuInit", 3, "forked after CUDA was in use"),
        ("cuInit", 12345, "unknown error.*returned 12345.*documentation"),
        ("cuDevicePrimaryCtxRetain", 2, "use device 0.*free memory"),
        ("cuModuleLoadData", 2, "load add_kernel on device 0: CUDA_ERROR_OUT_OF_MEMORY .*out of memory.*free memory"),
        ("cuModuleLoadData", 209, "CUDA_ERROR_NO_BINARY_FOR_GPU.*build with SIGN_FAST_ARCHS"),
        ("cuModuleLoadData", 200, "CUDA_ERROR_INVALID_IMAGE.*damaged"),
        ("cuModuleLoadData", 222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION.*update the driver"),
        ("cuModuleGetFunction", 500, "CUDA_ERROR_NOT_FOUND.*does not have it"),
        ("cuThreadExchangeStreamCaptureMode", 1, "allow loading while a graph is captured"),
        ("cuCtxGetCurrent", 201, "which context is current"),
    ],
)
def test_loading_that_fails(driver, function, code, message):
    # CUDA is initialised once a library: a launcher that has not tried does
    launcher = Launcher(driver.path)
    launch = copy()
    driver.fail(function, code)
    with pytest.raises(DriverError, match=message) as failure:
        load(launcher, launch)
    assert (failure.value.code, failure.value.function) == (code, function) and "\n" not in str(failure.value)
    assert launcher.loaded == {} and run(launcher, launch) == key.key(launch)
    assert driver.depth == 0 and driver.capture_mode == 0
    assert all(module["unloaded"] for module in driver.report()["modules"])
    load(launcher, launch)
    assert run(launcher, launch) is None and launcher.loaded == {0: 1}


def test_images_and_symbols_that_are_none(driver, launcher):
    image, symbol, *rest = compiled(copy())
    other_machine = image[:18] + b"\x3e\x00" + image[20:]
    for wrong in (b"", b"text", other_machine, image[:60], image[:-1]):
        with pytest.raises(DriverError, match="the machine code is damaged") as failure:
            launcher.add(0, "k", wrong, symbol, *rest)
        assert failure.value.code == 200
    with pytest.raises(DriverError, match="could not load other_kernel on device 0") as failure:
        launcher.add(0, "k", image, "other_kernel", *rest)
    assert (failure.value.code, failure.value.function) == (500, "cuModuleGetFunction") and launcher.loaded == {}
    with pytest.raises(DriverError, match=r"use device 2.*CUDA_ERROR_INVALID_DEVICE") as failure:
        launcher.add(2, "k", image, symbol, *rest)
    assert (failure.value.code, failure.value.function) == (101, "cuDeviceGet")
    with pytest.raises(TypeError):
        launcher.add(0, "k", "text", symbol, *rest)


def test_a_loaded_module_outlives_a_symbol_that_it_has_not(driver, launcher):
    launch = copy()
    load(launcher, launch)
    with pytest.raises(DriverError):
        launcher.add(0, "k", compiled(launch)[0], "other_kernel", 4, 0, b"")
    assert run(launcher, launch) is None and launcher.loaded == {0: 1}


@pytest.mark.parametrize(
    ("code", "message"),
    [(1, "are not what a GPU takes"), (700, "CUDA_LAUNCH_BLOCKING=1"), (701, "more registers"), (2, "free memory")],
)
def test_launching_that_fails(driver, launcher, code, message):
    launch = copy()
    load(launcher, launch)
    driver.fail("cuLaunchKernel", code)
    with pytest.raises(
        DriverError, match=f"could not launch add_kernel with 4×1×1 programs of 128 threads.*{message}"
    ) as f:
        run(launcher, launch)
    assert (f.value.code, f.value.function) == (code, "cuLaunchKernel") and launcher.launches == 0
    assert run(launcher, launch) is None and launcher.launches == 1


def test_a_grid_that_no_gpu_takes(driver, launcher):
    launch = copy(grid=(1, 70000))
    load(launcher, launch)
    with pytest.raises(DriverError, match="1×70000×1") as failure:
        run(launcher, launch)
    assert failure.value.code == 1
