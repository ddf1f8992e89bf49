"""Data-parallel workers: threads that compute portions of one batch, each on its own cores.

Cores that split every operation wait for each other at every operation, and read what another core
has just written. Workers synchronise once, at the end of their portions: on two cores a model of
width 128 trains a third faster this way. Does not know what is computed.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

#: A worker's next task and the future for its result; None ends the worker.
_Tasks = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]

#: Most workers. They share one Python interpreter, so with more cores each worker gets several.
MAX_WORKERS = 4

#: Tokens per worker below which all cores together are faster than separate workers.
MIN_PORTION = 128

#: Largest ratio of the largest portion to the average portion; all workers wait for the largest.
MAX_IMBALANCE = 1.25

#: The same ratio up to which portions are even: less work would not leave the workers idle less.
EVEN = 1.1


def available_cores() -> int:
    """Processor threads that this process may use: its CPU affinity, limited by OMP_NUM_THREADS,
    which users of shared machines set."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(wanted) or cores) if wanted.isdecimal() else cores


class Workers:
    """Threads that compute for the thread that calls `run`.

    The calling thread keeps *threads* for what it computes itself. torch keeps the number of
    threads per thread, but a thread that has not computed anything yet takes the number that was
    set last anywhere in the process; the constructor therefore fixes the number of each worker and
    then of the calling thread before it returns.

    Args:
        threads: processor threads for all workers together.
        on_cpu: False if another device computes; then there is one worker, the calling thread.

    Attributes:
        count: number of workers, which is the number of portions that are computed at a time.
    """

    def __init__(self, threads: int, *, on_cpu: bool = True) -> None:
        counts = range(1, (min(threads, MAX_WORKERS) if on_cpu else 1) + 1)
        self.count = max(counts, key=lambda count: (threads // count * count, count))
        self._tasks: list[_Tasks] = []
        if self.count > 1:
            self._start(threads // self.count)
        set_threads(threads)

    def _start(self, threads_each: int) -> None:
        for i in range(self.count):
            tasks: _Tasks = queue.SimpleQueue()
            threading.Thread(
                target=_work, args=(tasks,), name=f"tinkex-worker-{i}", daemon=True
            ).start()
            self._tasks.append(tasks)
        weakref.finalize(self, _end, self._tasks)
        self.run([lambda: set_threads(threads_each)] * self.count)

    def divide(self, sizes: Sequence[int], *, adjacent: bool = False) -> list[list[int]]:
        """Divide items among the workers.

        Depends on *sizes* alone, so that the same work is always computed in the same portions.

        Args:
            sizes: tokens of each item.
            adjacent: portions of adjacent items, if these are even.

        Returns:
            Indices of the items of each portion, in ascending order. A single portion, for all
            cores together, if the portions would be smaller than `MIN_PORTION` or uneven.
        """
        portions, imbalance = self._portions(sizes)
        if adjacent:
            in_order = self._in_order(sizes)
            largest = max(sum(sizes[i] for i in portion) for portion in in_order)
            if largest * self.count <= EVEN * sum(sizes):
                portions = in_order
        if self._is_little(sizes) or imbalance > MAX_IMBALANCE:
            return [list(range(len(sizes)))]
        return [sorted(portion) for portion in portions]

    def is_even(self, sizes: Sequence[int]) -> bool:
        """True if `divide` leaves no worker idle for long, or workers would not be faster."""
        return self.count == 1 or self._is_little(sizes) or self._portions(sizes)[1] <= EVEN

    def _is_little(self, sizes: Sequence[int]) -> bool:
        return sum(sizes) < MIN_PORTION * self.count

    def _portions(self, sizes: Sequence[int]) -> tuple[list[list[int]], float]:
        """Items for each worker, the largest first; the largest portion in average portions."""
        portions: list[list[int]] = [[] for _ in range(self.count)]
        totals = [0] * self.count
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            smallest = totals.index(min(totals))
            portions[smallest].append(i)
            totals[smallest] += sizes[i]
        return portions, max(totals) * self.count / max(sum(totals), 1)

    def _in_order(self, sizes: Sequence[int]) -> list[list[int]]:
        """Portions of adjacent items: each item goes where its middle is."""
        middles = np.cumsum(sizes) - np.array(sizes) / 2
        owners = (middles * self.count / max(sum(sizes), 1)).astype(int)
        return [np.flatnonzero(owners == i).tolist() for i in range(self.count)]

    def run(self, parts: Sequence[Callable[[], Result]]) -> list[Result]:
        """Call each part on its own worker and return the results in the order of *parts*.

        All parts have ended when this returns or raises. Gradients are off in the workers.

        Args:
            parts: one for each worker; or a single part, which the calling thread computes.

        Raises:
            BaseException: What the first of the failed parts raised.
        """
        if len(parts) == 1:
            return [parts[0]()]
        futures: list[Future[Result]] = []
        for tasks, part in zip(self._tasks, parts, strict=True):
            futures.append(Future())
            tasks.put((part, futures[-1]))
        concurrent.futures.wait(futures)
        return [future.result() for future in futures]


def set_threads(count: int) -> None:
    """Set how many processor threads torch uses for what the calling thread computes.

    `torch.get_num_threads` marks the calling thread's number as decided. Without it, the first
    computation of this thread would replace it with the number set last in the process.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def _work(tasks: _Tasks) -> None:
    """Run a worker's tasks until None comes."""
    torch.set_grad_enabled(False)
    while (task := tasks.get()) is not None:
        part, future = task
        try:
            future.set_result(part())
        except BaseException as exc:  # raised by run(), in the calling thread
            future.set_exception(exc)
        del task, part, future  # so that the result is not kept alive until the next task


def _end(queues: Sequence[_Tasks]) -> None:
    for tasks in queues:
        tasks.put(None)
