"""A stand-in driver, a launcher on it, and a folder for what Triton compiles."""

from __future__ import annotations

import pytest

from tests.packs import stand_in


@pytest.fixture(scope="session")
def triton_cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def triton_cache(triton_cache_folder, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton_cache_folder))


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory):
    return stand_in.build(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture
def driver(driver_library):
    return stand_in.StandIn(driver_library)


@pytest.fixture
def launcher(driver):
    from sign_fast._launcher import Launcher

    return Launcher(driver.path)


@pytest.fixture(scope="session")
def small_pack_files(tmp_path_factory):
    """Packs for 8.0 and 9.0, and PTX for newer GPUs, of `small_packs.table`."""
    from sign_fast.kernels.packs import build as builder
    from sign_fast.kernels.packs.architectures import parse
    from tests.packs import small_packs

    folder = tmp_path_factory.mktemp("packs")
    return builder.build(parse("8.0;9.0+PTX"), folder, table=small_packs.table(), jobs=2)
