"""Code that runs in a process of its own as if this CPU had fewer instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sign_fast.kernels import extension


def run_on(limit: str, code: str) -> None:
    """Run code, in which {name!r} is the capability, with ATEN_CPU_CAPABILITY=limit; skips what this CPU lacks.

    Args:
        limit: "avx2" or "default".
    """
    name = limit.upper()
    if name == "AVX2" and extension.module().capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    done = subprocess.run(
        [sys.executable, "-c", code.format(name=name)],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": limit, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
