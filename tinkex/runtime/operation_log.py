"""The progress of operations as log lines, and as OpenTelemetry spans and metrics.

Log lines go to the logger "tinkex": each step at DEBUG, milestones (a model, a checkpoint) at INFO.
They contain names, numbers, sizes and times; never a key, tokens or text of the data. With logging
at WARNING and without OpenTelemetry, this costs a few assignments per operation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from tinkex.futures import OperationFuture, Progress
from tinkex.runtime import tracing
from tinkex.runtime.wait_log import one_line

logger = logging.getLogger("tinkex")

#: Operations whose end is logged at INFO.
MILESTONES = {
    "create_model",
    "load_weights",
    "save_weights",
    "save_weights_external",
    "save_weights_for_sampler",
    "save_weights_and_get_sampling_client",
    "unload_model",
}


def submitted(
    future: OperationFuture[Any], *, model: str, tokens: Callable[[], int] = lambda: 0
) -> None:
    """Log that an operation was called. Call this before anything is sent.

    Args:
        model: id of the model or sampler.
        tokens: counts the sent tokens; called only if the number is logged or recorded.
    """
    progress = future.progress
    progress.model = model
    if not (logger.isEnabledFor(logging.INFO) or tracing.is_loaded()):
        return
    progress.tokens = tokens()
    if logger.isEnabledFor(logging.DEBUG):
        size = f" ({progress.tokens:,} tokens)" if progress.tokens else ""
        logger.debug("%s: submitted%s", future.what, size)
    tracing.begin(progress, _name(future.what))
    future.on_end = partial(_ended, future.what, progress)


def accepted(future: OperationFuture[Any], seq_id: int | None, request_id: str) -> None:
    """Log that the server has accepted one request of an operation."""
    progress = future.progress
    progress.accepted = time.monotonic()
    progress.request_ids += (request_id,)
    if seq_id is not None:
        progress.seq_ids += (seq_id,)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "%s: accepted as request %s%s after %s",
            future.what,
            request_id or "(answered at once)",
            "" if seq_id is None else f", seq_id {seq_id}",
            _milliseconds(progress.accepted - progress.began),
        )


def not_yet(future: OperationFuture[Any], state: str, reason: str | None) -> None:
    """Log that a poll was answered with "not yet"."""
    progress = future.progress
    progress.polls += 1
    if state != progress.queue_state:
        progress.queue_state = state
        tracing.event(progress, "queue_state", state)
    if logger.isEnabledFor(logging.DEBUG):
        why = f" ({reason})" if reason else ""
        logger.debug("%s: not done yet, queue state %s%s", future.what, state, why)


def _ended(what: str, progress: Progress, result: Any, exc: BaseException | None) -> None:
    """Log the end of an operation. Runs on the thread that resolves it."""
    outcome = "done" if exc is None else "failed"
    if isinstance(exc, CancelledError):
        outcome, exc = "cancelled", None
    tracing.end(progress, _name(what), outcome, exc)
    level = logging.INFO if _name(what) in MILESTONES else logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    parts = [f"{outcome} in {_milliseconds(time.monotonic() - progress.began)}"]
    if progress.retries:
        parts.append(f"retries: {progress.retries}")
    if progress.sent or progress.received:
        parts.append(f"{progress.sent:,} bytes sent, {progress.received:,} received")
    if exc is not None:
        parts.append(f"{type(exc).__name__}: {one_line(exc)}")
    elif path := getattr(result, "path", None):
        parts.append(path)
    logger.log(level, "%s: %s", what, "; ".join(parts))


def _name(what: str) -> str:
    """The operation's name: `what` begins with it."""
    return what.split(" ", 1)[0]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms"
