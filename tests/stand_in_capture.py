"""A stand-in for CUDA graphs on the CPU: what is captured runs again at a replay, on the tensors that it read then."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch.fx.experimental.proxy_tensor import make_fx


class Recording:
    def __init__(self, capture, function):
        # tensors that the function closes over become constants, and an operator that gives the host a number fails
        self.trace = make_fx(function)()
        with torch.no_grad():
            self.output = torch.full_like(function(), -1)  # a capture does not compute
        self.capture = capture
        capture.live.append(self)

    def replay(self):
        assert self.capture.busy.locked() and self in self.capture.live
        self.output.copy_(self.trace())

    def reset(self):
        self.capture.live.remove(self)


class StandIn:
    """`Capture` for the CPU; raises where turns overlap."""

    def __init__(self, device):
        self.busy = threading.Lock()
        self.live = []
        self.releases = 0
        self.on_release = lambda: None
        self.attempts = 0
        self.recording = self.in_callers_capture = self.on_side = False

    @contextmanager
    def turn(self):
        assert self.busy.acquire(blocking=False), "two turns at the same time"
        try:
            yield
        finally:
            self.busy.release()

    @contextmanager
    def aside(self):
        assert self.busy.locked()
        self.on_side = True
        try:
            yield
        finally:
            self.on_side = False

    def record(self, function):
        assert self.on_side
        self.attempts += 1
        self.recording = True
        try:
            return Recording(self, function)
        except RuntimeError:
            # as where a capture cannot be ended: the first error is only the context of this one
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")  # noqa: B904
        finally:
            self.recording = False

    def release(self):
        self.releases += 1
        self.on_release()

    def capturing(self):
        return self.in_callers_capture

    def reserved(self):
        return sum(recording.output.nbytes for recording in self.live)
