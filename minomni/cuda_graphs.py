"""CUDA graphs: a recorded sequence of kernels, which one launch replays.

A graph repeats the same kernels on the same addresses, so nothing of it may depend on numbers of
the host or wait for the device. Two kinds of work are recorded: a step that changes its buffers in
place (Replay), and a function whose inputs are copied in and whose results are copied out (Graphs).
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UPS = 3  # runs before a capture, in which libraries allocate their workspaces
MAX_GRAPHS = 16  # of one Graphs, each with buffers for its inputs and results
MAX_KEYS = 1000  # of one Graphs: shapes that occurred once are forgotten beyond it


def capture(
    function: Callable[[], Any], after_warm_up: Callable[[], None], pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record a function -> the graph, and the result, whose tensors each replay fills again.

    It runs a few times first; after_warm_up is called after each run. pool: memory that several
    graphs share.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
            after_warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # records, and runs nothing
        result = function()
    return graph, result


class Replay:
    """A step that changes buffers in place; on CUDA a graph of it, which one launch replays."""

    def __init__(self, step: Callable[[], None], state: list[Tensor]):
        """state: all buffers that the step changes, except those of a cache beyond its lengths."""
        self.step = step
        self.state = state
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.state[0].is_cuda:
            self.step()
            return
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record the step. The buffers keep their values."""
        saved = [buffer.clone() for buffer in self.state]

        def restore() -> None:
            for buffer, value in zip(self.state, saved, strict=True):
                buffer.copy_(value)

        graph, _ = capture(self.step, restore)
        return graph


class Recording:
    """One call of a function of tensors, recorded with buffers for its inputs and results."""

    def __init__(self, function: Callable, inputs: tuple, pool: Any):
        self.inputs = copied(inputs)
        # Kept, since the graph reads the weights and constants that the function holds.
        self.function = function
        self.graph, self.results = self.record(pool)

    def record(self, pool: Any) -> tuple[Any, Any]:
        """The graph, and the results that its replay fills."""
        return capture(lambda: self.function(*self.inputs), lambda: None, pool)

    def __call__(self, inputs: tuple) -> Any:
        """The function's results for other inputs of the same shapes."""
        buffers = pytree.tree_leaves(self.inputs)
        for buffer, value in zip(buffers, pytree.tree_leaves(inputs), strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
        self.graph.replay()
        return copied(self.results)


class Graphs:
    """Calls functions of tensors by graphs.

    A graph is recorded at the second call with a key and the shapes of its inputs, since some
    shapes occur only once; so the second answer is the slow one. Graphs belong to the weights that
    they read: make a new object after replacing parameters.
    """

    def __init__(self) -> None:
        # Both end with what was used last.
        self.recordings: dict[Hashable, Recording] = {}
        self.called_once: dict[Hashable, None] = {}
        self.pool: Any = None

    def call(self, key: Hashable, function: Callable, inputs: tuple) -> Any:
        """function(*inputs), where inputs and results are nested lists and tuples of tensors.

        key: all that the function depends on besides inputs and weights. The function must neither
        change its inputs nor read numbers back.
        """
        kinds = []
        for value in pytree.tree_leaves(inputs):
            is_tensor = isinstance(value, Tensor)
            kinds.append((tuple(value.shape), value.dtype, value.device) if is_tensor else None)
        key = (key, *kinds)
        recording = self.recordings.pop(key, None)
        if recording is None and key not in self.called_once:
            keep(self.called_once, key, None, MAX_KEYS)
            return function(*inputs)

        if recording is None:
            recording = Recording(function, inputs, self.shared_pool())
        keep(self.recordings, key, recording, MAX_GRAPHS)
        return recording(inputs)

    def shared_pool(self) -> Any:
        """The memory of all graphs: one runs at a time, and its results are copied at once."""
        if self.pool is None and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool


def keep(kept: dict, key: Hashable, value: Any, limit: int) -> None:
    """Add an entry; where there are `limit` of them, it replaces the longest unused one."""
    while len(kept) >= limit:
        kept.pop(next(iter(kept)))
    kept[key] = value


def copied(values: Any) -> Any:
    """The same nested lists and tuples with a copy of each tensor."""
    return pytree.tree_map_only(Tensor, torch.clone, values)
