"""The wheel: what is in it, that it installs without the extension and says so, and that the extension loads here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

import sign_fast
from sign_fast.kernels import extension

ROOT = Path(__file__).parents[1]


def copy_tree(target: Path, objects: bool = True) -> Path:
    """The sources as a fresh checkout has them; with the tree's compiled objects, so that little is compiled again."""
    for name in ("csrc", "kernels", "sign_fast"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "extension_build.json", "*.zip")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"):
        shutil.copy(ROOT / name, target / name)
    for folder in ROOT.glob("build/temp.*") if objects else ():
        shutil.copytree(folder, target / "build" / folder.name)
    return target


def build_environment(**switches: str) -> dict[str, str]:
    """This process's, without its switches of the build."""
    names = (
        "SIGN_FAST_ARCHS",
        "SIGN_FAST_PRESETS",
        "SIGN_FAST_SKIP_EXT",
        "SIGN_FAST_FORCE_BUILD",
        "TORCH_CUDA_ARCH_LIST",
    )
    return {name: value for name, value in os.environ.items() if name not in names} | switches


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    out = tmp_path_factory.mktemp("dist")
    environment = build_environment(SIGN_FAST_SKIP_EXT="1")
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", str(out), "."]
    done = subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing without the C++ extension: SIGN_FAST_SKIP_EXT=1 was set" in done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert max(Counter(names).values()) == 1
    for expected in (
        "sign_fast/py.typed",
        "sign_fast/kernels/group_norm_silu/reference.py",
        "sign_fast/kernels/extension_build.json",
        "sign_fast/models/presets.json",
        "sign_fast/training/recipes.json",
        "sign_fast/distill/recipes/digits-sid.json",
        "sign_fast/metrics/digits/classifier.safetensors",
        "sign_fast/checkpoints/bundled/digits-uncond/model.safetensors",
        "sign_fast/checkpoints/bundled/digits-cond/README.md",
    ):
        assert expected in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/", "csrc/", "build/"))]
    # the launcher, where a compiler is, is bound to no torch and no Python; without one the wheel has no binary at all
    compiled = [n for n in names if n.endswith(".so")]
    assert compiled == ["sign_fast/_launcher.abi3.so"] * bool(compiled)
    tag = r"cp310-abi3-(manylinux_2_\d+|linux)_x86_64" if compiled else "py3-none-linux_x86_64"
    assert re.fullmatch(rf"sign_fast-{sign_fast.__version__}-{tag}\.whl", wheel.name)
    assert any(n.endswith("LICENSE") for n in names)


def test_installed_without_extension_it_works_and_says_why(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*words):
        command = [sys.executable, "-m", "sign_fast.cli", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    told = run("info")
    assert "not built: SIGN_FAST_SKIP_EXT=1 was set" in told.stdout
    done = run("generate", "--network", "digits-uncond", "--outdir", "out", "--num", "2", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    # once an operation: the two of the extension that a generation takes
    for operation in ("group_norm_silu", "sampler_step"):
        assert done.stderr.count(f"warning: {operation} runs on its slower path") == 1
    assert done.stderr.count("runs on its slower path") == 2


def test_forced_build_without_a_compiler_fails(tmp_path):
    tree = copy_tree(tmp_path)
    environment = build_environment(SIGN_FAST_FORCE_BUILD="1", SIGN_FAST_SKIP_EXT="1")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "SIGN_FAST_FORCE_BUILD=1 asks for it" in done.stderr


def test_without_a_compiler_the_build_goes_on(tmp_path):
    tree = copy_tree(tmp_path)
    environment = build_environment(PATH=str(tmp_path / "nothing"), CXX="no-such-compiler")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler) was found" in done.stderr
    assert "no C++ compiler" in (tree / "kernels" / "extension_build.json").read_text()


@pytest.mark.skipif(os.environ.get("SIGN_FAST_SKIP_EXT") == "1", reason="SIGN_FAST_SKIP_EXT=1")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_where_a_compiler_is_the_extension_is_loaded():
    assert extension.missing() is None


@pytest.fixture
def reload():
    extension._load.cache_clear()
    yield
    extension._load.cache_clear()


@pytest.mark.parametrize(
    ("note", "told"),
    [
        ({"torch": "1.0.0"}, "was built with torch 1.0.0, this is"),
        ({"torch": torch.__version__, "python": "3.9"}, "was built for Python 3.9, this is"),
        ({"skipped": "because"}, "is not built: because"),
    ],
)
def test_an_extension_of_something_else_is_named(note, told, monkeypatch, reload):
    monkeypatch.setattr(extension, "_note", lambda: note)
    message = str(extension.missing())
    assert told in message and "pip install --no-build-isolation" in message and "\n" not in message
    assert extension.module() is None


def test_a_patch_release_of_torch_is_the_same_torch(monkeypatch, reload):
    expected = extension.missing()
    extension._load.cache_clear()
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(extension, "_note", lambda: {"torch": f"{major}.{minor}.99+cu999"})
    assert str(extension.missing()) == str(expected)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ImportError("/far/away/_C.so: undefined symbol: _ZN3c105ErrorC1E"),
            "built with torch 2.99, does not load with",
        ),
        (ImportError("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found"), "are older than its GLIBCXX_3.4.32"),
        (RuntimeError("it is registered twice"), "(it is registered twice)"),
        (OSError("a\nb"), "does not load with torch"),
    ],
)
def test_an_extension_that_does_not_load_is_one_sentence(error, told, monkeypatch, reload):
    def fail(name):
        raise error

    monkeypatch.setattr(torch, "__version__", "2.99.1")
    monkeypatch.setattr(extension, "_note", lambda: {"torch": "2.99"})
    monkeypatch.setattr(extension.importlib, "import_module", fail)
    message = str(extension.missing())
    assert told in message and "pip install --no-build-isolation" in message
    assert "undefined symbol" not in message and "/" not in message and "\n" not in message
