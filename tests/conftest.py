"""Shared set-up: helpers and benchmarks on the path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

# the networks here are small: one thread is as fast, and does not wait for cores that others use
os.environ.setdefault("OMP_NUM_THREADS", "1")
