"""Reward functions of users: loaded by name, called in a thread pool, with a time limit.

They may be plain or async. If a function raises, hangs or returns no finite number, a `RewardError`
names it. Does not know what the results are used for.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import attrs

#: Seconds that a cancelled async function gets to end.
GRACE_SECONDS = 0.1


class RewardError(ValueError):
    """A reward function or an environment raised, hung, or returned no finite number."""


def load(spec: str) -> Callable[..., Any]:
    """
    Load a function by a name such as "my_rewards.py:score".

    Raises:
        ValueError: If the file or the function does not exist, or the file cannot be run.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise ValueError(f"{spec!r} names no function; write it like my_rewards.py:score.")
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file {path}; {spec!r} must name a Python file and a function."
        )
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{path} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # so that it can import modules beside it
    try:
        module_spec.loader.exec_module(module)
    except Exception as exc:
        raise ValueError(f"{path} cannot be run: {type(exc).__name__}: {exc}") from exc
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{path} has no function {name}; it has {', '.join(there) or 'none'}.")
    found: Callable[..., Any] = function
    return found


def name_of(function: Callable[..., Any] | str | None) -> str | None:
    """The name of a function, for messages and for the settings of a run."""
    if function is None or isinstance(function, str):
        return function
    return str(getattr(function, "__qualname__", type(function).__name__))


@attrs.frozen
class Score:
    """A reward, and other numbers that the function returned."""

    reward: float
    metrics: Mapping[str, float] = attrs.field(factory=dict)


def as_score(value: Any) -> Score:
    """
    The result of a reward function as a `Score`: a number, or a dict with "reward" and other
    numbers.

    Raises:
        ValueError: If it is neither, or a number is not finite.
    """
    values = dict(value) if isinstance(value, Mapping) else {"reward": value}
    if "reward" not in values:
        raise ValueError(f'a dict without "reward": its keys are {", ".join(map(repr, values))}')
    for key, number in values.items():
        if not isinstance(number, numbers.Real) or not math.isfinite(number):
            what = "" if key == "reward" else f" for {key!r}"
            raise ValueError(f"{number!r}{what}, which is not a finite number")
    found = {str(key): float(number) for key, number in values.items()}
    return Score(found.pop("reward"), found)


class Pool:
    """Calls functions on threads that do not keep the program alive.

    A call that exceeds its time limit keeps its thread until it returns, if ever; another thread
    replaces it.

    Args:
        workers: number of calls at a time.
        timeout: time limit of a call, in seconds from its start.
    """

    def __init__(self, workers: int, timeout: float) -> None:
        self._timeout = timeout
        self._tasks: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._workers = workers
        for _ in range(workers):
            self._add_thread()

    def start(self, function: Callable[..., Any], *args: Any) -> _Call:
        """Queue a call of *function*; `_Call.result` waits for its result."""
        call = _Call(function, args, self._timeout, self._add_thread)
        self._tasks.put(call)
        return call

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """
        Call *function* and return its result.

        Raises:
            RewardError: If it raises or exceeds the time limit.
        """
        return self.start(function, *args).result()

    def close(self) -> None:
        """End idle threads at once, and busy ones after their current call."""
        for _ in range(self._workers):
            self._tasks.put(None)

    def _add_thread(self) -> None:
        threading.Thread(target=self._work, name="tinkex-reward", daemon=True).start()

    def _work(self) -> None:
        while (call := self._tasks.get()) is not None:
            call.run()
            if call.was_abandoned:
                return  # another thread has taken this one's place


class _Call:
    """One call: run by a thread of the pool, awaited by another."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        replace_thread: Callable[[], None],
    ) -> None:
        self._function, self._args, self._timeout = function, args, timeout
        self._replace_thread = replace_thread
        self._began = threading.Event()
        self._future: Future[Any] = Future()
        self.was_abandoned = False

    def run(self) -> None:
        self._began.set()
        try:
            value = self._function(*self._args)
            if inspect.isawaitable(value):
                value = _awaited(value, self._timeout)
        except BaseException as exc:
            self._future.set_exception(exc)
        else:
            self._future.set_result(value)

    def result(self) -> Any:
        """
        The result of the function.

        Raises:
            RewardError: If it raised or exceeded the time limit.
        """
        name = name_of(self._function)
        self._began.wait()
        # Async functions are cancelled at the limit; they get a little longer to end.
        if not wait([self._future], self._timeout + GRACE_SECONDS).done:
            self.was_abandoned = True
            self._replace_thread()
            raise RewardError(f"{name} did not return within {self._timeout:g} s")
        exc = self._future.exception()
        if isinstance(exc, _TooLong):
            raise RewardError(f"{name} did not return within {self._timeout:g} s") from exc
        if exc is not None:
            raise RewardError(f"{name} raised {type(exc).__name__}: {exc}") from exc
        return self._future.result()


class _TooLong(Exception):
    """An async function was cancelled at its time limit."""


def _awaited(value: Any, timeout: float) -> Any:
    import asyncio

    async def within_time() -> Any:
        task = asyncio.ensure_future(value)
        done, _ = await asyncio.wait([task], timeout=timeout)
        if not done:
            task.cancel()
            raise _TooLong
        return task.result()

    return asyncio.run(within_time())
