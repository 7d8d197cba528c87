"""Records a network as a CUDA graph for every distinct size of its input, and replays it; not run on a GPU yet."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch

from vg.movable import map_tensors
from vg.types import Batch

MAX_GRAPHS = 4
MAX_KEYS = 1000  # sizes without a graph that are counted
CALLS_BEFORE = 2  # calls of a size before it is recorded: they load kernels and choose algorithms


class CudaGraphs:
    """A network in evaluation mode whose kernels are launched at once for sizes that it has seen twice before.

    The recently used MAX_GRAPHS sizes are kept. If the network cannot be recorded, it warns once and runs as without.

    Args:
        record: runs a function and returns what repeats it on the same memory, and its output; see Recorder.
    """

    def __init__(self, network: Callable[[Batch], Any], record: Recorder | None):
        self.network = network
        self.record = record
        self.calls: Counter[Hashable] = Counter()
        # Static input, replay and static output; the least recently used one first.
        self.graphs: dict[Hashable, tuple[Batch, Callable[[], Any], Any]] = {}
        self.lock = Lock()

    def __call__(self, batch: Batch) -> Any:
        with self.lock:
            key = (batch.sizes, *((x.shape, x.dtype) for x in batch.tensors()))
            if key not in self.graphs and not self._record(key, batch):
                return self.network(batch)
            static, replay, output = self.graphs[key] = self.graphs.pop(key)
            for own, tensor in zip(static.tensors(), batch.tensors(), strict=True):
                own.copy_(tensor)
            replay()
            return map_tensors(output, torch.clone)  # the next replay overwrites it

    def _record(self, key: Hashable, batch: Batch) -> bool:
        """Record a graph if it is time to; return whether there is one."""
        if len(self.calls) >= MAX_KEYS:
            self.calls.clear()
        self.calls[key] += 1
        if self.record is None or self.calls[key] <= CALLS_BEFORE:
            return False
        static = batch.map(torch.clone)
        try:
            self.graphs[key] = (static, *self.record(lambda: self.network(static)))
        except Exception as error:
            self.record = None
            torch.clear_autocast_cache()  # of casts that were recorded, but never computed
            warnings.warn(f"cuda_graphs: the network cannot be recorded and runs without: {error}", stacklevel=2)
            return False
        del self.calls[key]
        if len(self.graphs) > MAX_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return True


class Recorder:
    """Records CUDA graphs that share their memory, so outputs must be copied before the next replay of any of them.

    Args:
        device: that of the network, such as "cuda:1"; it need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # By default torch records on a stream of the device that was current in the first recording of the process.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph does not return to the current stream if the recording fails; torch.cuda.stream does.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            mode = "thread_local"  # because other threads read images
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
                output = function()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, output
