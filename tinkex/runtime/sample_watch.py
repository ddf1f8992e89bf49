"""One long poll for all results of a sampling session, if the server offers retrieve_futures.

Waits for completions and passes each finished promise to the poller, which fetches its result.
Knows only the id of the sampling session.
"""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

from tinkex import errors, types, wire
from tinkex.futures import fail
from tinkex.runtime.polling import Promise
from tinkex.runtime.retry import ONCE, WATCH_FAILED, Attempts
from tinkex.runtime.session import Session

logger = logging.getLogger("tinkex")

GATHER = 0.005  # seconds after news, in which more samples may finish, until the next question
LINGER = 5.0  # seconds that the idle thread stays alive
DOUBT = 60.0  # seconds without news after which each sample is polled separately


class CompletionWatch:
    """Waits for the promises of one sampling session with one request at a time.

    Its thread runs while there are promises. After a failure it starts again from cursor 0, so that
    no completion is missed. If the server does not offer the endpoint, each promise is polled
    instead. The same happens to waiting promises after a long time without news: the server may
    have lost them, which only a poll can show.
    """

    def __init__(self, session: Session, sampling_session_id: str, clone: int) -> None:
        self._session = session
        self._target = {
            "type": "sampling_session",
            "sampling_session_id": sampling_session_id,
            "cloned_sampler_id": clone,
        }
        self._changed = threading.Condition()  # guards everything below
        self._waiting: dict[str, Promise[Any]] = {}
        self._told: set[str] = set()  # reported as done by the server, which reports each once
        self._fetched: list[str] = []  # resolved, to be reported to the server
        self._thread: threading.Thread | None = None
        self._offered = True
        self._closed = False
        # The thread's own:
        self._news_at = 0.0
        self._attempts = Attempts()
        session.dependents.add(self)

    def watch(self, promise: Promise[Any]) -> None:
        """Resolve the promise's future when the server reports that it is done."""
        promise.future.add_done_callback(lambda _: self._done(promise))
        with self._changed:
            closed = self._closed
            ready = promise.request_id in self._told or not self._offered
            if not ready and not closed:
                self._waiting[promise.request_id] = promise
                self._changed.notify()
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="tinkex-completions", daemon=True
                    )
                    self._thread.start()
        if closed:
            fail(promise.future, errors.ClientClosedError("The sampling client is closed."))
        elif ready:
            self._session.poller.watch(promise, ordered=False)

    def end(self) -> None:
        """Fail all waiting promises, and accept no more. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._fail_all(errors.ClientClosedError("The sampling client was closed."))

    def _done(self, promise: Promise[Any]) -> None:
        """Called when the future is resolved. Unless it is lost, the server may forget it."""
        promise.wait.end()
        lost = not promise.future.cancelled() and isinstance(
            promise.future.exception(), errors.PromiseExpiredError
        )
        with self._changed:
            # A resend may be waiting under the same id.
            if self._waiting.get(promise.request_id) is promise:
                del self._waiting[promise.request_id]
            if not lost:
                self._fetched.append(promise.request_id)

    def _run(self) -> None:
        """Runs on the watch's thread."""
        cursor, self._news_at = 0, self._session.poller.now()
        while True:
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(LINGER)
                if not self._waiting or self._session.is_closed:
                    self._thread = None
                    break
                timeout = self._expire()
            try:
                cursor = self._ask(cursor, timeout)
            except BaseException as exc:  # no sample may wait forever, whatever failed
                cursor = 0
                self._failed(exc)
        if self._session.is_closed:
            self._fail_all(errors.ClientClosedError("The session was closed."))

    def _expire(self) -> float:
        """Pass on promises past their deadline; return seconds to the next. Call with the lock."""
        now = self._session.poller.now()
        for promise in [p for p in self._waiting.values() if p.deadline < now]:
            del self._waiting[promise.request_id]
            self._session.poller.watch(promise, ordered=False)  # which raises the timeout
        soonest = min((p.deadline for p in self._waiting.values()), default=math.inf)
        return min(self._session.config.patience.poll, max(soonest - now, 0.05))

    def _ask(self, cursor: int, timeout: float) -> int:
        with self._changed:
            fetched, self._fetched = self._fetched, []
        began = self._session.poller.now()
        request = types.RetrieveFuturesRequest(
            self._target, cursor, retrieved_request_ids=sorted(fetched)
        )
        try:
            answer = self._session.call(wire.RETRIEVE_FUTURES, request, retry=ONCE, timeout=timeout)
        except BaseException:
            with self._changed:
                self._fetched += fetched
            raise
        now = self._session.poller.now()
        is_news = self._take([done.request_id for done in answer.completions], fetched)
        self._attempts.answered(is_news=is_news)
        if is_news:
            self._news_at = now
            if self._waiting:
                self._session.transport.sleep(GATHER)
        elif now - self._news_at > DOUBT:
            self._news_at = now
            self._poll_each()
        elif pause := self._attempts.not_yet(now - began):
            self._session.transport.sleep(pause)
        return answer.cursor

    def _failed(self, exc: BaseException) -> None:
        """After a failed request: pause, or poll or fail all promises if a retry is useless."""
        now, patience = self._session.poller.now(), self._session.config.patience.no_answer
        if not isinstance(exc, errors.APIError):
            if not isinstance(exc, (errors.ClientClosedError, errors.EngineError)):
                logger.exception("waiting for samples failed")
            return self._fail_all(exc)
        with self._changed:
            waits = [promise.wait for promise in self._waiting.values()]
        for wait in waits:
            wait.failed_once(exc)
        if not self._attempts.may_pass(exc):
            self._offered = False
            self._poll_each()
        elif (pause := self._attempts.failed(exc, now, patience, WATCH_FAILED)) is None:
            self._fail_all(exc)
        else:
            self._session.transport.sleep(pause)

    def _take(self, request_ids: list[str], forgotten: list[str]) -> bool:
        """Pass finished promises to the poller. Returns True if any was new.

        *forgotten*: ids that the server will not report again.
        """
        with self._changed:
            new = set(request_ids) - self._told
            self._told |= new  # in place, as there may be many
            self._told.difference_update(forgotten)
            ready = [self._waiting.pop(id) for id in request_ids if id in self._waiting]
        for promise in ready:
            self._session.poller.watch(promise, ordered=False)
        return bool(new)

    def _poll_each(self) -> None:
        for promise in self._take_all():
            self._session.poller.watch(promise, ordered=False)

    def _fail_all(self, exc: BaseException) -> None:
        for promise in self._take_all():
            fail(promise.future, exc)

    def _take_all(self) -> list[Promise[Any]]:
        with self._changed:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        return waiting
