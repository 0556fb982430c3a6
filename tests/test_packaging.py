"""The wheel: what is in it, that it installs without the extension and says so, and that the extension loads here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from sign_fast.kernels import extension

ROOT = Path(__file__).parents[1]


def copy_tree(target: Path) -> Path:
    """The sources as a fresh checkout has them."""
    for name in ("csrc", "kernels", "sign_fast"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "extension_build.json")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    out = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "SIGN_FAST_SKIP_EXT": "1"}
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
        "sign_fast/metrics/digits/classifier.safetensors",
        "sign_fast/checkpoints/bundled/digits-uncond/model.safetensors",
        "sign_fast/checkpoints/bundled/digits-cond/README.md",
    ):
        assert expected in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/")) or n.endswith(".so")]
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
    environment = {**os.environ, "SIGN_FAST_FORCE_BUILD": "1", "SIGN_FAST_SKIP_EXT": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "SIGN_FAST_FORCE_BUILD=1 asks for it" in done.stderr


def test_without_a_compiler_the_build_goes_on(tmp_path):
    tree = copy_tree(tmp_path)
    environment = {**os.environ, "PATH": str(tmp_path / "nothing"), "CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler) was found" in done.stderr
    assert "no C++ compiler" in (tree / "kernels" / "extension_build.json").read_text()


@pytest.mark.skipif(os.environ.get("SIGN_FAST_SKIP_EXT") == "1", reason="SIGN_FAST_SKIP_EXT=1")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_where_a_compiler_is_the_extension_is_loaded():
    assert extension.missing() is None


def test_an_extension_of_another_torch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_note", lambda: {"torch": "1.0.0"})
    extension._load.cache_clear()
    try:
        assert "was built with torch 1.0.0, this is" in str(extension.missing())
    finally:
        extension._load.cache_clear()
