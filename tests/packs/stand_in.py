"""The stand-in CUDA driver of stand_in_driver.cpp: built where it is needed, loaded and read by the tests."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("stand_in_driver.cpp")


def build(folder: Path, incomplete: bool = False) -> Path:
    """The library's path; `incomplete`: without cuThreadExchangeStreamCaptureMode."""
    compiler = shutil.which("g++") or shutil.which("c++") or "g++"
    target = folder / ("libcuda_incomplete.so" if incomplete else "libcuda_stand_in.so")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", *(["-DSTAND_IN_IS_INCOMPLETE"] if incomplete else [])]
    partial = target.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(partial)], check=True)
    os.replace(partial, target)
    return target


class StandIn:
    """One loaded stand-in; its state is the process's and is emptied here."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stand_in_report.restype = ctypes.c_char_p
        self._library.stand_in_reset()
        self.set(capture_mode=0, context=-1)

    def set(self, **facts: int) -> None:
        """version; devices; shared_limit in bytes; capturing: loading is forbidden unless the thread's mode is relaxed;
        capture_mode and context (a device, -1 for none) of this thread; recording: 0 while launches are timed."""
        for name, value in facts.items():
            self._library.stand_in_set(name.encode(), int(value))

    def fail(self, function: str, code: int, call: int = 1) -> None:
        """The `call`-th call of the function from now on returns that code, once."""
        self._library.stand_in_fail(function.encode(), call, code)

    @property
    def capture_mode(self) -> int:
        """This thread's: 0 global, 1 thread-local, 2 relaxed."""
        return self._library.stand_in_capture_mode()

    @property
    def context(self) -> int:
        """The device whose context is this thread's current one, -1 for none."""
        return self._library.stand_in_context()

    @property
    def depth(self) -> int:
        """How many contexts are on this thread's stack."""
        return self._library.stand_in_depth()

    def report(self) -> dict[str, Any]:
        """modules, launches (parameters as bytes), launched, calls: how often each function was called."""
        report: dict[str, Any] = json.loads(self._library.stand_in_report())
        for launch in report["launches"]:
            launch["parameters"] = [bytes.fromhex(text) for text in launch["parameters"]]
        return report
