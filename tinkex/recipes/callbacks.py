"""Callbacks: the events that a run reports while it trains.

A callback is an object with some of the methods of `Callback`. Its errors are logged and do not end
the run. Does not know what is trained: each recipe reports through `Callbacks`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any, Literal

import attrs

from tinkex.recipes.run import Run

logger = logging.getLogger("tinkex")

#: A callback that fails this many times in a row is not called again.
MAX_FAILURES = 5


@attrs.frozen
class Checkpoint:
    """A checkpoint on the server.

    Attributes:
        step: the step after which it was saved.
        path: tinker://...
        kind: "state" (weights and optimizer), or "sampler" (the final weights).
        adapter: local folder of the PEFT adapter; None except for the final weights.
    """

    step: int
    path: str
    kind: Literal["state", "sampler"] = "state"
    adapter: str | None = None


@attrs.frozen
class Sample:
    """A prompt, and the model's completion of it after a step."""

    step: int
    prompt: str
    text: str


@attrs.frozen
class End:
    """How a run ended.

    Attributes:
        status: "finished", "stopped" (it can be resumed), or "failed".
        error: what failed; "" otherwise.
    """

    status: Literal["finished", "stopped", "failed"]
    error: str = ""


class Callback:
    """Base class of callbacks: override what you need. All methods do nothing here.

    They are called on the thread that trains, so a slow one makes the run slow. *run* is the
    `tinkex.Run`; its metrics include the row that is reported.
    """

    def on_start(self, run: Run) -> None:
        """Training begins at run.step, of run.total_steps. Called again after a restart."""

    def on_step(self, run: Run, row: dict[str, float]) -> None:
        """A step is complete. *row* has "step", "train_loss", "learning_rate" and more."""

    def on_eval(self, run: Run, row: dict[str, float]) -> None:
        """An evaluation is complete. *row* has "step", "eval_loss" and more."""

    def on_save(self, run: Run, checkpoint: Checkpoint) -> None:
        """A checkpoint or the final weights have been saved."""

    def on_sample(self, run: Run, samples: Sequence[Sample]) -> None:
        """Samples were taken during training."""

    def on_restart(self, run: Run, reason: str) -> None:
        """The model or the server was lost; the run resumes from its last checkpoint."""

    def on_end(self, run: Run, end: End) -> None:
        """The run ended, successfully or not. Called once."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Calls every callback in order, and isolates the run from their errors.

    Args:
        callbacks: objects with some of the methods of `Callback`.

    Raises:
        TypeError: If one has none of the methods, or has an `on_...` method with another name.
    """

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        for callback in callbacks:
            check(callback)
        self._failures = [0] * len(callbacks)
        self._callbacks = list(callbacks)

    def start(self, run: Run) -> None:
        self._call("on_start", run)

    def step(self, run: Run, row: dict[str, float]) -> None:
        self._call("on_step", run, row)

    def eval(self, run: Run, row: dict[str, float]) -> None:
        self._call("on_eval", run, row)

    def save(self, run: Run, checkpoint: Checkpoint) -> None:
        self._call("on_save", run, checkpoint)

    def sample(self, run: Run, samples: Sequence[Sample]) -> None:
        self._call("on_sample", run, samples)

    def restart(self, run: Run, reason: str) -> None:
        self._call("on_restart", run, reason)

    def end(self, run: Run, end: End) -> None:
        self._call("on_end", run, end)

    def _call(self, event: str, *values: Any) -> None:
        for number, callback in enumerate(self._callbacks):
            method = getattr(callback, event, None)
            if method is None or self._failures[number] == MAX_FAILURES:
                continue
            try:
                # A copy, so that a callback that changes the row changes only its own.
                method(*(dict(v) if isinstance(v, dict) else v for v in values))
            except Exception as exc:
                self._failures[number] += 1
                self._log(callback, event, exc, self._failures[number])
            else:
                self._failures[number] = 0

    def _log(self, callback: Any, event: str, exc: Exception, failures: int) -> None:
        logger.warning(
            "The callback %s failed in %s (%s: %s); %s.",
            type(callback).__name__,
            event,
            type(exc).__name__,
            exc,
            "the run continues"
            if failures < MAX_FAILURES
            else f"it failed {failures} times in a row and is not called again; the run continues",
        )
        logger.debug("The traceback:", exc_info=exc)


def check(callback: Any) -> None:
    """Raise TypeError with the reason if *callback* is not a callback."""
    if isinstance(callback, type):
        raise TypeError(
            f"a callback must be an object, got the class {callback.__name__}; "
            f"write {callback.__name__}()."
        )
    named = [name for name in dir(callback) if name.startswith("on_")]
    for name in named:
        if name not in EVENTS and callable(getattr(callback, name)):
            near = difflib.get_close_matches(name, EVENTS, 1)
            hint = f"; did you mean {near[0]}?" if near else f". Events: {', '.join(EVENTS)}."
            raise TypeError(f"{type(callback).__name__} has {name}, which is not an event{hint}")
    if not named:
        raise TypeError(
            f"a callback needs at least one of {', '.join(EVENTS)}; {callback!r} has none."
        )
