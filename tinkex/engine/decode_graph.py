"""Steps that are recorded once and replayed: CUDA graphs, by the shape of the step.

A graph repeats the same operations on the same addresses, for the cost of one launch. In a recorded
step the host must not read any number, and all tensors must keep their addresses. Does not know
what a step computes.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

#: Graphs that are kept; the least recently used one is dropped first.
MOST_GRAPHS = 64

Step = Callable[[], None]


class Capture(Protocol):
    """Records steps."""

    def warm_up(self, step: Step) -> None:
        """Run a step as it will be recorded, so that libraries finish their set-up."""

    def record(self, step: Step) -> Step:
        """Record a step without running it; return a callable that replays it."""


class CudaCapture:
    """Records steps as CUDA graphs, which share one memory pool because they never run together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def warm_up(self, step: Step) -> None:
        """Run the step on a side stream: capturing needs one, and so does its warm-up."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        try:
            with torch.cuda.stream(self._side):
                step()
        finally:
            current.wait_stream(self._side)

    def record(self, step: Step) -> Step:
        if not self._graphs:  # a pool is freed with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate memory meanwhile, for instance to read base models.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
        ):
            step()
        self._graphs.add(graph)
        return graph.replay


class Graphs:
    """The recorded steps of one owner, by shape.

    The first step of a shape runs normally, the second is recorded, and all later ones are
    replayed. A shape that cannot be recorded always runs normally.

    Args:
        capture: None to run every step normally.
        most: how many are kept.
    """

    def __init__(self, capture: Capture | None, most: int = MOST_GRAPHS) -> None:
        self._capture = capture
        self._most = most
        self._replays: OrderedDict[Hashable, Step] = OrderedDict()
        self._warm: OrderedDict[Hashable, None] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, shape: Hashable, step: Step) -> None:
        """Run *step*, or its recording if one of its *shape* is kept."""
        replay = self._replays.get(shape)
        if replay is not None:
            self._replays.move_to_end(shape)
            replay()
        elif self._capture is None or shape in self._refused:
            step()
        elif shape not in self._warm:
            self._capture.warm_up(step)
            self._warm[shape] = None
            if len(self._warm) > self._most:
                self._warm.popitem(last=False)
        else:
            self._record(self._capture, shape, step)

    def _record(self, capture: Capture, shape: Hashable, step: Step) -> None:
        while len(self._replays) >= self._most:
            self._replays.popitem(last=False)
        try:
            replay = capture.record(step)
        except RuntimeError as exc:  # also torch.OutOfMemoryError
            self._refused.add(shape)
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            logger.log(
                level,
                "A decoding step could not be recorded as a CUDA graph (%s); steps of its shape "
                "run without one, which is slower.",
                exc,
            )
            step()
            return
        self._replays[shape] = replay
        replay()

    def drop(self, matches: Callable[[Hashable], bool]) -> None:
        """Drop the graphs whose shape *matches*, because the buffers that they used are gone."""
        for shape in [shape for shape in self._replays if matches(shape)]:
            del self._replays[shape]
        for shape in [shape for shape in self._warm if matches(shape)]:
            del self._warm[shape]
        self._refused = {shape for shape in self._refused if not matches(shape)}
