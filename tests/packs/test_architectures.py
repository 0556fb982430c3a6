"""SIGN_FAST_ARCHS: what is understood, what is refused and how."""

from __future__ import annotations

import collections
import inspect
import os
import re
from unittest import mock

import pytest

from sign_fast.kernels.packs.architectures import FAMILIES, KNOWN, Architecture, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", "8.0"),
        ("8.0;9.0", "8.0;9.0"),
        ("9.0,8.0 8.6", "8.0;8.6;9.0"),
        (" 9.0 ;; 8.0, ", "8.0;9.0"),
        ("9.0a", "9.0"),
        ("10.0f;12.1a", "10.0;12.1"),
        ("sm_90", "9.0"),
        ("sm90a sm_120", "9.0;12.0"),
        ("compute_80", "8.0"),
        ("90;100", "9.0;10.0"),
        ("9.0;9.0+PTX;9.0", "9.0+PTX"),
        ("8.0+ptx", "8.0+PTX"),
        ("9.0a+PTX", "9.0+PTX"),
        ("Ampere", "8.0;8.6+PTX"),
        ("Ampere;Hopper", "8.0;8.6+PTX;9.0+PTX"),
        ("ada+PTX", "8.9+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("Blackwell", "10.0;10.3;12.0;12.1+PTX"),
        ("Blackwell+Tegra", "11.0"),
    ],
)
def test_understood(text, expected):
    found = parse(text)
    assert ";".join(map(str, found)) == expected
    assert parse(expected) == found
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no architecture is named"),
        (" ; ", "no architecture is named"),
        ("7.5", "'7.5' is older than 8.0"),
        ("Volta", "'Volta' is older than 8.0"),
        ("Maxwell+Tegra", "'Maxwell+Tegra' is older than 8.0"),
        ("Turing+PTX", "'Turing+PTX' is older than 8.0"),
        ("Kepler+Tesla", "'Kepler+Tesla' is older than 8.0"),
        ("8.0;70", "'70' is older than 8.0"),
        ("8.4", "'8.4' is not one of the known architectures 8.0, 8.6"),
        ("9.5", "'9.5' is not one of the known"),
        ("hopper9", "'hopper9' is not an architecture"),
        ("9.0+PTXX", "'9.0+PTXX' is not an architecture"),
        ("9.0b", "'9.0b' is not an architecture"),
        ("native", "'native' needs a GPU where it is built"),
        ("1e9", "'1e9' is not an architecture"),
        ("9.00", "'9.00' is not an architecture"),
    ],
)
def test_refused_in_one_line_with_an_example(text, told):
    with pytest.raises(ValueError) as raised:
        parse(text)
    message = str(raised.value)
    assert message.startswith(told) and "\n" not in message and '"8.0;9.0"' in message


def test_what_runs_where():
    assert [number for number in KNOWN if Architecture(80).runs_on(number)] == [80, 86, 87, 89]
    assert [number for number in KNOWN if Architecture(86).runs_on(number)] == [86, 87, 89]
    assert [number for number in KNOWN if Architecture(90).runs_on(number)] == [90]
    assert [number for number in KNOWN if Architecture(120).runs_on(number)] == [120]


def test_what_torch_understands_is_understood_the_same():
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    flags = cpp_extension._get_cuda_arch_flags
    for name in FAMILIES:
        text = "+".join(word.capitalize() for word in name.split("+"))
        with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=text):
            if text not in inspect.getsource(flags):
                continue  # another torch
            theirs = collections.Counter(re.findall(r"code=(sm|compute)_(\d+)", " ".join(flags())))
        ours = parse(text)
        expected = [("sm", str(a.number)) for a in ours] + [("compute", str(a.number)) for a in ours if a.ptx]
        assert theirs == collections.Counter(expected)
