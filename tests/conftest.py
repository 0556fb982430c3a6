"""Shared set-up."""

from __future__ import annotations

import os

# the networks here are small: one thread is as fast, and does not wait for cores that others use
os.environ.setdefault("OMP_NUM_THREADS", "1")
