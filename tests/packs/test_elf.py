"""What is read from machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sign_fast.kernels import ahead_of_time
from sign_fast.kernels.launch import Launch
from sign_fast.kernels.packs import elf
from tests.example_kernels import meta, whole_kernel
from tests.packs.launching import copy

pytestmark = pytest.mark.usefixtures("triton_cache")


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_machine_code_says_what_it_is(architecture):
    done = ahead_of_time.compile(copy(), architecture)
    assert elf.architecture(done.cubin) == architecture
    assert elf.symbols(done.cubin) == ["add_kernel"]
    assert list(elf.parameter_sizes(done.cubin, "add_kernel")) == [8, 8, 4, 4, 8, 8]


def test_what_is_no_machine_code():
    cubin = ahead_of_time.compile(Launch(whole_kernel, (1,), {"x": meta(16), "y": meta(16)}, {"BLOCK": 16}), 90).cubin
    with pytest.raises(ValueError, match="no kernel other"):
        elf.parameter_sizes(cubin, "other")
    for wrong in (b"", b"text", cubin[:40], Path(sys.executable).read_bytes()[:4096]):
        with pytest.raises(ValueError, match="not CUDA machine code"):
            elf.architecture(wrong)
    for size in range(64, len(cubin), 97):
        with pytest.raises(ValueError, match="cut off or damaged"):
            elf.symbols(cubin[:size])
