"""A stand-in for CUDA graphs on the CPU: what is captured runs again at a replay, on the tensors that it read then."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sign_fast.sampling.synchronising import SYNCHRONISING


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

    recording_class = Recording

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
            return self.recording_class(self, function)
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


def _storages(tree):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


class _Tape(TorchDispatchMode):
    """Every operator with its tensors, and what was in the tensors from before that it wrote to."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.made, self.before = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in SYNCHRONISING:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(given.get(argument.name)):
                    key = t.untyped_storage().data_ptr()
                    if key not in self.made and key not in self.before:
                        self.before[key] = t.untyped_storage(), t.untyped_storage().clone()
        out = func(*args, **kwargs)
        inputs = _storages((args, kwargs))
        fresh = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and _storages(t).isdisjoint(inputs)]
        self.made |= _storages(fresh)
        self.operators.append((func, args, kwargs, [any(o is t for t in fresh) for o in tree_leaves(out)], out))
        return out

    def undo(self):
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, fresh, out in self.operators:
            again = tree_leaves(func(*args, **kwargs))
            for old, new, made in zip(tree_leaves(out), again, fresh, strict=True):
                if made:
                    old.detach().copy_(new)


class TapeRecording:
    """A function that writes to tensors, such as an optimizer's step: nothing is written before a replay."""

    def __init__(self, capture, function):
        self.tape = _Tape()
        with torch.random.fork_rng(devices=[]), self.tape:
            self.output = function()
        self.tape.undo()
        self.output.detach().fill_(-1)
        self.capture = capture
        capture.live.append(self)

    def replay(self):
        assert self.capture.busy.locked() and self in self.capture.live
        self.tape.replay()

    def reset(self):
        self.capture.live.remove(self)


class TapeStandIn(StandIn):
    """`Capture` for the CPU and training: replays are the operators, with the numbers that they had at the capture."""

    recording_class = TapeRecording
