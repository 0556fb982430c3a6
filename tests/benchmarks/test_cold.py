"""Fresh processes: cold caches, turns, medians, and children that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cold import cold, compiler_caches, first_images
from benchmarks.providers import Case

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
DIGITS = Case("digits-uncond", "few_step", 1, "float32", "cpu")


def caches():
    return [os.environ.get(name) for name in NAMES]


def test_compilers_find_empty_caches(monkeypatch):
    monkeypatch.setenv(NAMES[0], "/mine")
    monkeypatch.delenv(NAMES[1], raising=False)
    with compiler_caches():
        inside = caches()
        assert "/mine" not in inside and len({*inside}) == 2
        assert not any(Path(folder).exists() and any(Path(folder).iterdir()) for folder in inside)
        with compiler_caches():
            assert not {*caches()} & {*inside}
        assert caches() == inside
    assert caches() == ["/mine", None]
    with compiler_caches(keep=True):
        assert caches()[0] == "/mine" and caches()[1]
    assert caches() == ["/mine", None]


def test_turns_medians_and_a_provider_that_fails():
    started = []

    def start(name):
        started.append(name)
        if name == "b" and started.count("b") == 2:
            raise RuntimeError("broken")
        return {"ready_s": {"a": [3.0, 1.0, 2.0], "b": [9.0], "c": [5.0, 5.0, 8.0]}[name][started.count(name) - 1]}

    found, failed = first_images(["a", "b", "c"], start)
    assert started == ["a", "b", "c", "b", "c", "a", "c", "a"]
    assert found == {"a": {"ready_s": 2.0, "rounds": 3}, "c": {"ready_s": 5.0, "rounds": 3}}
    assert failed == {"b": "broken"}


def test_a_child_says_in_one_line_what_was_wrong():
    with pytest.raises(RuntimeError, match="unknown provider 'magic'"):
        cold("magic", DIGITS, 1, 60)
    with pytest.raises(RuntimeError, match="took longer than 0 s"):
        cold("plain", DIGITS, 1, 0.01)


def test_a_child_can_time_the_import_of_torch():
    code = "import sys, benchmarks.cold; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
