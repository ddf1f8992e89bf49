"""Lanes: parts of one computation side by side, each on processor cores of its own.

Cores that share every operation wait for each other at every operation, and read from memory what
another has just written. With a part of the rows each, they meet once, at the end: with two cores
and a model 128 wide that trains a third faster. Knows nothing of what is computed.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

#: What a lane is to compute, and where the result goes; None: nothing more.
_Tasks = queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]

#: More than these are not worth the interpreter that they share; each then has several cores.
MOST_LANES = 4

#: A share of less is computed sooner by all cores together.
LEAST_SHARE = 256

#: How much larger than the average the largest share may be: the others wait for it.
UNEVEN = 1.25


class Lanes:
    """Threads that compute for the thread that calls `run`.

    Args:
        threads: of the processor, for all lanes together.

    Attributes:
        count: how many parts can be computed at a time.
    """

    def __init__(self, threads: int) -> None:
        counts = range(1, min(threads, MOST_LANES) + 1)
        self.count = max(counts, key=lambda count: (threads // count * count, count))
        self._tasks: list[_Tasks] = []
        if self.count == 1:
            return
        for i in range(self.count):
            tasks: _Tasks = queue.SimpleQueue()
            threading.Thread(
                target=_work, args=(tasks, threads // self.count), name=f"tinkex-lane-{i}",
                daemon=True,
            ).start()  # fmt: skip
            self._tasks.append(tasks)
        weakref.finalize(self, _end, self._tasks)

    def share_out(self, sizes: Sequence[int]) -> list[list[int]]:
        """Numbers of the items for each lane: as many shares, of about the same size, or one.

        Depends on *sizes* alone, so that the same work is always computed in the same parts.
        """
        shares: list[list[int]] = [[] for _ in range(self.count)]
        totals = [0] * self.count
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            smallest = totals.index(min(totals))
            shares[smallest].append(i)
            totals[smallest] += sizes[i]
        average = sum(totals) / self.count
        if average < LEAST_SHARE or max(totals) > UNEVEN * average:
            return [list(range(len(sizes)))]
        return [sorted(share) for share in shares]

    def run(self, parts: Sequence[Callable[[], Result]]) -> list[Result]:
        """What each part returns: as many as there are lanes, the first lane's first. Or a single
        part, which the caller computes, with all cores.

        Gradients are off in lanes. All parts have ended when this returns, or raises what the first
        of those that failed has raised.
        """
        if len(parts) == 1:
            return [parts[0]()]
        futures: list[Future[Result]] = []
        for tasks, part in zip(self._tasks, parts, strict=True):
            futures.append(Future())
            tasks.put((part, futures[-1]))
        concurrent.futures.wait(futures)
        return [future.result() for future in futures]


def _work(tasks: _Tasks, threads: int) -> None:
    """A lane's thread, until it is handed None."""
    torch.set_num_threads(threads)  # of this thread: each has its own number
    torch.set_grad_enabled(False)
    while (task := tasks.get()) is not None:
        part, future = task
        try:
            future.set_result(part())
        except BaseException as exc:  # raised where it is waited for
            future.set_exception(exc)
        del task, part, future  # or what was computed would be kept until the next one


def _end(lanes: Sequence[_Tasks]) -> None:
    for tasks in lanes:
        tasks.put(None)
