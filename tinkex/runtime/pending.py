"""Pending operations, and failures that the caller has not seen.

However a client ends, work must not be dropped silently, and a failure must not be lost because
`result()` was never called. Does not know about HTTP; watches futures.
"""

from __future__ import annotations

import concurrent.futures
import logging
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from tinkex import errors
from tinkex.futures import OperationFuture

logger = logging.getLogger("tinkex")

TICK = 0.2  # seconds between two checks whether waiting still makes sense
#: After this many failures of an owner, those that the caller has seen are forgotten.
PRUNE_AT = 256


class PendingOperations:
    """The operations of one session, by owner (a model or a sampling session)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards everything below
        self._open: dict[OperationFuture[Any], str] = {}
        self._failed: dict[str, list[OperationFuture[Any]]] = {}
        #: Failures logged since the last save, and their texts.
        self._logged: dict[str, list[tuple[weakref.ref[Any], str]]] = {}

    def add(
        self,
        owner: str,
        future: OperationFuture[Any],
        *,
        ordered: bool = True,
        saves: str = "",
    ) -> None:
        """Watch *future* until it is done.

        Args:
            saves: if it saves the weights, the name of the call: a success logs a warning if
                earlier operations failed and the caller has not seen that.
            ordered: True if the owner's operations finish in order, so that a failure is reported
                as soon as the next one is done. Failures of samples, which finish in any order, are
                reported when the client closes.
        """
        with self._lock:
            self._open[future] = owner
        future.add_done_callback(partial(self._done, owner, ordered, saves))

    def forget(self, futures: Iterable[OperationFuture[Any]]) -> None:
        """Stop waiting for *futures*, which the caller has abandoned."""
        with self._lock:
            for future in futures:
                self._open.pop(future, None)

    def open(self, owner: str | None = None) -> list[OperationFuture[Any]]:
        """The futures of *owner* (None: of all) that are not done."""
        with self._lock:
            return [f for f, of in self._open.items() if owner is None or of == owner]

    def wait(
        self, owner: str | None, seconds: float, give_up: Callable[[], bool] = lambda: False
    ) -> list[OperationFuture[Any]]:
        """Wait up to *seconds* for all of *owner*, or until *give_up* returns True.

        Returns the futures that are not done.
        """
        deadline = time.monotonic() + seconds
        left = self.open(owner)
        while left and not give_up() and (room := deadline - time.monotonic()) > 0:
            concurrent.futures.wait(left, min(TICK, room))
            left = self.open(owner)  # a callback of a done future may submit more
        return [future for future in left if not future.done()]

    # Failures.

    def report(self, owner: str | None = None) -> None:
        """Log the failures that the caller has not seen, once, one line for each owner."""
        with self._lock:
            owners = list(self._failed) if owner is None else [owner]
        for one in owners:
            self._report(one)

    def _warn_about_save(self, owner: str, saves: str) -> None:
        with self._lock:
            logged = self._logged.pop(owner, [])
            # Failed before the save, although their callbacks have not run yet.
            late = [f for f, of in self._open.items() if of == owner and f.done()]
        logged += [(weakref.ref(f), _text(f)) for f in late if _failure_of(f) is not None]
        unseen = [text for ref, text in logged if (f := ref()) is None or not f.is_retrieved]
        if unseen:
            logger.warning(
                "%s succeeded, but %s before it failed: the weights that it saved lack what should "
                "have been trained. The first failure: %s",
                saves,
                _count(len(unseen), "operation"),
                unseen[0],
            )

    def _report(self, owner: str) -> None:
        with self._lock:
            failed = [f for f in self._failed.pop(owner, ()) if not f.is_retrieved]
            texts = [_text(future) for future in failed]
            if failed:
                self._logged.setdefault(owner, []).extend(
                    (weakref.ref(future), text) for future, text in zip(failed, texts)
                )
        if failed:
            logger.error(
                "%s failed, and result() was not called: %s",
                _count(len(failed), "operation"),
                texts[0] if len(texts) == 1 else f"first {texts[0]}",
            )

    def _done(self, owner: str, ordered: bool, saves: str, future: OperationFuture[Any]) -> None:
        """Runs on the thread that resolved *future*."""
        if ordered:
            self._report(owner)
        if saves and not future.cancelled() and Future.exception(future) is None:
            self._warn_about_save(owner, saves)
        with self._lock:
            self._open.pop(future, None)
            if _failure_of(future) is None:
                return
            failed = self._failed.setdefault(owner, [])
            failed.append(future)
            if len(failed) % PRUNE_AT == 0:
                failed[:] = [f for f in failed if not f.is_retrieved]


def _failure_of(future: OperationFuture[Any]) -> BaseException | None:
    """The failure of a done future, without marking it as seen; None if it succeeded, was cancelled
    or closed, or only follows from another failure."""
    exc = None if future.cancelled() else Future.exception(future)
    consequences = (errors.ClientClosedError, errors.PriorOperationFailedError)
    return None if isinstance(exc, consequences) else exc


def drop(left: str, whose: str, seconds: float | None) -> None:
    """Report that a client ended before its submitted operations.

    Args:
        left: the unfinished operations, from `describe`; "" for none.
        whose: the client that ended, for the message.
        seconds: how long it waited for them: then this raises, like close() of a file that cannot
            be written. If None, or during another exception, it only logs.

    Raises:
        ClientClosedError: If awaited work is left.
    """
    if not left:
        return
    waited = "" if seconds is None else f" after waiting {seconds:.0f} s"
    message = f"{whose} was closed{waited} before {left}. What was not sent is dropped."
    if seconds is not None and sys.exc_info()[0] is None:
        raise errors.ClientClosedError(f"{message} To wait longer, set patience.close.")
    logger.warning(message)


def _text(future: OperationFuture[Any]) -> str:
    text = str(_failure_of(future))
    return text if future.what in text else f"{future.what}: {text}"


def describe(futures: Iterable[OperationFuture[Any]]) -> str:
    """A description: how many operations, their kinds, models and progress; "" for none."""
    futures = list(futures)
    if not futures:
        return ""
    kinds = Counter(future.what for future in futures)
    listed = [f"{count} x {what}" for what, count in kinds.most_common(4)]
    if len(kinds) > 4:
        listed.append("...")
    sent = sum(future.running() for future in futures)
    state = f"{len(futures) - sent} not sent, {sent} in progress"
    return f"{_count(len(futures), 'operation')} ({state}): {', '.join(listed)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
