"""Whole generations as CUDA graphs: one per network, batch bucket and plan, captured at its first use."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..errors import SignFastError, first_line
from .buckets import LARGEST_BUCKET, bucket_of
from .capture import Capture, CudaCapture, Recording
from .synchronising import find_synchronising

T = TypeVar("T")
Inputs: TypeAlias = Mapping[str, Tensor]
Function: TypeAlias = Callable[[Inputs], Tensor]
Watched: TypeAlias = Callable[[], Iterable[Tensor]]

SWITCH = "SIGN_FAST_DISABLE_GRAPHS"
WARM_UPS = 2  # the first run compiles and picks algorithms, the second shows that nothing is left to do


class GraphMemoryWarning(UserWarning):
    """A batch was too large for the GPU's memory and is generated in smaller parts."""


class GraphRecaptureWarning(UserWarning):
    """Parameters were replaced, so that a generation had to be captured again."""


class BucketTooLarge(RuntimeError):
    """A bucket does not fit into the memory that is free; `generate_in_buckets` goes on with half of it."""

    def __init__(self, bucket: int) -> None:
        super().__init__(f"a batch of {bucket} does not fit into the GPU's memory: generate fewer images at a time")
        self.bucket = bucket


@dataclass(frozen=True)
class GraphKey:
    """What a captured generation depends on, besides the shapes and dtypes of its inputs.

    Args:
        network: a token that no other network has had in this process (not `id`, which is used again).
        bucket: images a replay makes, a power of two.
        plan: the sampler and its number of steps; coefficients are inputs, so only their structure counts.
        dtype: of the inner network.
        conditional: whether there are class labels.
        noise: "torch" or "philox".
        output: "uint8" or "float".
    """

    network: int
    bucket: int
    plan: Hashable
    dtype: torch.dtype
    conditional: bool
    noise: str
    output: str


@dataclass
class _Graph:
    """A captured generation: its inputs, where it reads them, and the addresses of the parameters it reads."""

    key: GraphKey
    recording: Recording
    inputs: dict[str, Tensor]
    addresses: tuple[Any, ...]
    pool_bytes: int
    copied: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return sum(t.nbytes for t in self.inputs.values())

    def fill(self, inputs: Inputs, constant: Collection[str]) -> None:
        for name, static in self.inputs.items():
            source = inputs[name]
            if name in constant:
                # a tensor made in inference mode does not count its writes, and cannot be written to outside of it
                version = 0 if source.is_inference() else source._version
                last, copied = self.copied.get(name, (None, 0))
                if last is not None and last() is source and copied == version:
                    continue
                self.copied[name] = weakref.ref(source), version
            static.copy_(source, non_blocking=True)


_all: weakref.WeakSet[Graphs] = weakref.WeakSet()
_tokens = itertools.count()


def network_token() -> int:
    """One for the keys of a network's graphs: no two in a process are equal."""
    return next(_tokens)


class Graphs:
    """The captured generations of a device; safe to use from several threads and on several streams.

    A call takes its turn: it waits on the device (the host goes on) for the one before it, copies its inputs to where
    the graph reads them, replays the graph on the caller's current stream and copies the result out. Generations on
    one device never overlap, because their graphs share one memory pool; see `capture._Device`.

    With SIGN_FAST_DISABLE_GRAPHS=1, read at every call, or inside a capture of the caller's, the function runs as it
    is; its images are the same to the byte.

    Args:
        device: of the networks.
        max_graphs: how many are kept; the least recently used one gives way.
        largest_bucket: a power of two; larger batches are generated in parts.
        capture: what captures; tests hand in a stand-in.

    Raises:
        ValueError: max_graphs < 1, or a largest_bucket that is no power of two.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_graphs: int = 16,
        largest_bucket: int = LARGEST_BUCKET,
        capture: Callable[[torch.device], Capture] = CudaCapture,
    ) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, not {max_graphs}")
        if largest_bucket < 1 or largest_bucket & (largest_bucket - 1):
            raise ValueError(f"largest_bucket must be a power of two, not {largest_bucket}")
        self.device = torch.device(device)
        self.max_graphs = max_graphs
        self.largest_bucket = largest_bucket
        self._capture = capture(self.device)
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the least recently used one first
        self._limits: dict[GraphKey, int] = {}  # the largest bucket that may fit, where one did not
        self._warned_of_replaced = False
        self._counts = {"replays": 0, "captures": 0, "evictions": 0}
        _all.add(self)

    def run(
        self,
        key: GraphKey,
        inputs: Inputs,
        function: Function,
        watched: Watched,
        *,
        rows: int | None = None,
        constant: Collection[str] = (),
    ) -> Tensor:
        """`function(inputs)` as one graph launch, captured if it has not been yet.

        Args:
            key: of the graph.
            inputs: tensors of any shape whose batch is the bucket (see `buckets.pad`), on this device, or on the CPU
                and not written to again. The function gets contiguous copies on this device.
            function: makes a tensor (bucket, …) from inputs with the names given. All it reads are inputs and what
                `watched` yields; it does not synchronise.
            watched: yields the network's tensors, always in one order; called every time, so keep them in a list. The
                graph reads them where they lie: values written in place count, a tensor put in the place of another
                is noticed and costs a new capture.
            rows: return only the first ones.
            constant: names of inputs that seldom change: copied only where it is another tensor, or was written to.

        Returns:
            (rows or bucket, …), the caller's own.

        Raises:
            BucketTooLarge: it does not fit into memory, nor would a larger bucket from now on.
            SignFastError: not even bucket 1 fits; the function cannot be captured; graphs of the parent process.
        """
        # tensors made in inference mode could not be filled again outside of it
        with torch.inference_mode(False), torch.no_grad():
            if key.bucket > self.largest(key):
                raise BucketTooLarge(key.bucket)
            if not self._captures():
                return self._in_memory(key, lambda: function(self._copies(inputs)))[:rows]
            with self._lock, self._capture.turn():
                graph = self._graph(key, inputs, function, watched, constant)
                graph.fill(inputs, constant)
                graph.recording.replay()
                self._counts["replays"] += 1
                return graph.recording.output[:rows].clone()

    def largest(self, key: GraphKey) -> int:
        """The largest bucket that has not been found too large; `key.bucket` does not matter."""
        return self._limits.get(replace(key, bucket=0), self.largest_bucket)

    def clear(self) -> None:
        """Give up all graphs and their memory, and forget which buckets were too large."""
        self._check_process()
        with self._lock:
            if self._graphs:
                with self._capture.turn():
                    while self._graphs:
                        self._graphs.popitem(last=False)[1].recording.reset()
                    self._capture.release()
            self._limits.clear()

    @property
    def captured_bytes(self) -> int:
        """Memory of the graphs: the device's pool, which all `Graphs` of a device share, and their inputs."""
        if os.getpid() != self._process:
            return 0
        with self._lock:
            return self._capture.reserved() + sum(graph.input_bytes for graph in self._graphs.values())

    def statistics(self) -> dict[str, Any]:
        """Counts of graphs, replays, captures and evictions; bytes that each graph added to the pool and its inputs."""
        if os.getpid() != self._process:
            return {"device": str(self.device), "graphs": 0, **dict.fromkeys(self._counts, 0), "bytes": {}}
        with self._lock:
            added: Counter[GraphKey] = Counter()  # a key has several graphs where torch's settings were changed
            for graph in self._graphs.values():
                added[graph.key] += graph.pool_bytes + graph.input_bytes
            return {"device": str(self.device), "graphs": len(self._graphs), **self._counts, "bytes": dict(added)}

    def _graph(
        self, key: GraphKey, inputs: Inputs, function: Function, watched: Watched, constant: Collection[str]
    ) -> _Graph:
        """The graph of a call, captured now if there is none or if it would read parameters that are gone."""
        shapes = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        whole = (key, shapes, _settings(self.device))
        addresses = tuple((t.data_ptr(), t.shape, t.dtype) for t in watched())
        graph = self._graphs.get(whole)
        if graph is not None and graph.addresses == addresses:
            self._graphs.move_to_end(whole)
            return graph
        if graph is not None:
            self._graphs.pop(whole).recording.reset()
            del graph  # its inputs
            self._warn_of_replaced()
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)[1].recording.reset()
            self._counts["evictions"] += 1
        graph = self._in_memory(key, lambda: self._captured(key, inputs, function, addresses))
        self._graphs[whole] = graph
        self._counts["captures"] += 1
        return graph

    def _captured(self, key: GraphKey, inputs: Inputs, function: Function, addresses: tuple[Any, ...]) -> _Graph:
        before = self._capture.reserved()
        # a cache of casts would be filled inside the graph and outlive it
        autocast = torch.autocast(
            self.device.type,
            torch.get_autocast_dtype(self.device.type),
            torch.is_autocast_enabled(self.device.type),
            cache_enabled=False,
        )
        with self._capture.aside(), autocast:
            static = self._copies(inputs)
            for _ in range(WARM_UPS):
                function(static)
            try:
                recording = self._capture.record(lambda: function(static))
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                found = find_synchronising(lambda: function(static), self._capture.record)
                why = f"{found}; remove it" if found else f"{first_line(error)}; mend it"
                raise SignFastError(f"the network cannot be captured: {why} or set {SWITCH}=1") from error
        return _Graph(key, recording, static, addresses, self._capture.reserved() - before)

    def _copies(self, inputs: Inputs) -> dict[str, Tensor]:
        """Contiguous copies on the device; the kernels that a function picks may depend on the layout."""
        copies = {name: torch.empty(t.shape, dtype=t.dtype, device=self.device) for name, t in inputs.items()}
        for name, copy in copies.items():
            copy.copy_(inputs[name], non_blocking=True)
        return copies

    def _in_memory(self, key: GraphKey, attempt: Callable[[], T]) -> T:
        """What `attempt` returns; where memory runs out, what was taken is given back and the bucket is too large."""
        try:
            return attempt()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            why = first_line(error)  # no more than its text: its traceback holds the activations
        self._capture.release()
        if key.bucket == 1:
            raise SignFastError(
                f"not enough GPU memory for one image at a time: free some of it, use dtype=torch.bfloat16, or "
                f"device='cpu' ({why})"
            )
        self._limits[replace(key, bucket=0)] = key.bucket // 2
        warnings.warn(
            f"not enough GPU memory for batches of {key.bucket}: going on with {key.bucket // 2} ({why})",
            GraphMemoryWarning,
            stacklevel=2,
        )
        raise BucketTooLarge(key.bucket)

    def _warn_of_replaced(self) -> None:
        if not self._warned_of_replaced:
            self._warned_of_replaced = True
            warnings.warn(
                "parameters were replaced since the generation was captured: it is captured again, now and whenever "
                "that happens; write new values in place, with copy_ or load_state_dict, to keep the graph",
                GraphRecaptureWarning,
                stacklevel=2,
            )

    def _captures(self) -> bool:
        """Whether a call made now may use graphs."""
        if os.environ.get(SWITCH) == "1":
            return False
        self._check_process()  # first: CUDA answers no question in a forked process
        return not self._capture.capturing()

    def _check_process(self) -> None:
        if os.getpid() == self._process:
            return
        if self._graphs:
            raise SignFastError(
                "this process was forked from one that has captured CUDA graphs and cannot use them: start processes "
                "with multiprocessing's spawn method, or fork before the first image"
            )
        self._process, self._lock = os.getpid(), threading.RLock()  # the parent's may be held by a thread of its own


def _settings(device: torch.device) -> tuple[Any, ...]:
    """Settings of torch that decide which kernels run: a graph stays with those of its capture."""
    cudnn = torch.backends.cudnn
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.backends.cuda.matmul.fp32_precision,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.deterministic,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an exhausted memory is behind an error: in a capture, the error of its end comes on top."""
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        # cuBLAS and cuDNN have their own names for it
        if isinstance(link, torch.OutOfMemoryError) or "out of memory" in text or "STATUS_ALLOC_FAILED" in text:
            return True
        link = link.__cause__ or link.__context__
    return False


def generate_in_buckets(
    graphs: Graphs,
    count: int,
    key: GraphKey,
    make_inputs: Callable[[int, int, int], Inputs],
    function: Function,
    watched: Watched,
    constant: Collection[str] = (),
    choose: Callable[[int, int], int] = bucket_of,
) -> Tensor:
    """`count` images in buckets as large as memory allows, the last one padded.

    Args:
        graphs, function, watched, constant: as in `Graphs.run`.
        key: its bucket does not matter.
        make_inputs: (start, stop, bucket) -> the inputs of images start … stop − 1, padded to bucket rows; called
            again for smaller parts where a bucket is too large.
        choose: (images left, largest) -> the next bucket, a power of two.

    Returns:
        (count, …).

    Raises:
        SignFastError: as `Graphs.run`.
    """
    parts: list[Tensor] = []
    start = 0
    while start < count:
        bucket = choose(count - start, graphs.largest(key))
        stop = min(start + bucket, count)
        inputs = make_inputs(start, stop, bucket)
        try:
            part = graphs.run(
                replace(key, bucket=bucket), inputs, function, watched, rows=stop - start, constant=constant
            )
        except BucketTooLarge:
            continue  # graphs.largest is smaller now
        parts.append(part)
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def captured() -> list[dict[str, Any]]:
    """What is captured in this process, by `Graphs`: its `statistics` and "captured_bytes"."""
    return [{**graphs.statistics(), "captured_bytes": graphs.captured_bytes} for graphs in list(_all)]
