"""The samples of a client: submitted when the rate limit permits, in any order, and awaited.

Does not know what is sampled; rate_limit.py decides how many requests run at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np
import tenacity

from tinkex import errors, types, wire
from tinkex.config import check_seconds
from tinkex.futures import OperationFuture, fail, succeed
from tinkex.runtime import batching, operation_log, rate_limit
from tinkex.runtime.connection import CLOSE_TIMEOUT, HURRIED_TIMEOUT
from tinkex.runtime.queue_state import Observer
from tinkex.runtime.retry import Retry, failure_of, repeat
from tinkex.runtime.sample_watch import CompletionWatch
from tinkex.runtime.session import Session
from tinkex.runtime.wait_log import Wait

#: A clone of a client (unpickled) numbers its samples from a separate block.
CLONE_BLOCK = 1_000_000_000
#: How often a sample is sent again whose promise the server has lost; every second time with a new
#: number.
MAX_LOST = 5


class SampleQueue:
    """Submits the samples of one sampling client, and waits for or cancels them at its end.

    Args:
        retry: when a failed request is sent again; None is the default.
        clone: number of this copy of the client; 0 is the original.
        owns_session: True if the session ends with the client.
        on_queue_state: called when the server reports why a sample waits.
    """

    def __init__(
        self,
        session: Session,
        sampling_session_id: str,
        *,
        retry: Retry | None,
        clone: int,
        owns_session: bool,
        on_queue_state: Observer,
    ) -> None:
        self.session = session
        self.sampling_session_id = sampling_session_id
        self.retry = retry
        usual = retry or Retry()
        #: Of the request itself: a 429 holds back all samplers.
        self.post_retry = attrs.evolve(usual, pass_on=usual.pass_on | {429})
        self.on_queue_state = on_queue_state
        self._owns_session = owns_session
        self._lock = threading.Lock()  # guards _next
        self._next = clone * CLONE_BLOCK
        limits, features = session.config.sampling, session.features
        most = max(1, min(limits.bytes_in_dispatch, features.sample_dispatch_bytes_semaphore_size))
        limits = attrs.evolve(limits, bytes_in_dispatch=most)
        self.pace = rate_limit.pace_of(session.config.base_url, session.config.api_key, limits)
        self.places = rate_limit.Places(max(1, features.sample_max_concurrent_requests))
        #: Waits for all samples with one poll, if the server supports it.
        self.watch: CompletionWatch | None = None
        if features.sample_use_retrieve_futures:
            self.watch = CompletionWatch(session, sampling_session_id, clone)
        self._closing = threading.Event()
        self._closed = threading.Event()

    def submit(
        self,
        request: types.SampleRequest,
        poll_timeout: float | None,
        on_response: Callable[[types.SampleResponse], None],
    ) -> OperationFuture[types.SampleResponse]:
        """Submit a sample as soon as there is room; *on_response* gets its result first."""
        self.check_open()
        owner = self.sampling_session_id
        future: OperationFuture[types.SampleResponse] = OperationFuture(f"sample from {owner}")
        tokens = partial(batching.count_tokens, request.prompt)
        operation_log.submitted(future, model=owner, tokens=tokens)
        self.session.pending.add(owner, future, ordered=False)
        nbytes = batching.size_of_input(request.prompt)
        sample = _Sample(self, request, future, nbytes, poll_timeout, on_response)
        if self.watch is not None:
            sample.start()  # one poll waits for any number
        else:
            self.places.enter(sample.take_place)
        return future

    def take_number(self) -> int:
        """The next seq_id."""
        with self._lock:
            self._next += 1
            return self._next - 1

    @property
    def limit(self) -> int:
        """How many samples are currently submitted at a time."""
        return self.pace.limit

    @property
    def state(self) -> str:
        """A description: how many samples were submitted, or "closed"."""
        return "closed" if self._closed.is_set() else f"{self._next % CLONE_BLOCK} sampled"

    def check_open(self) -> None:
        """Raise ClientClosedError if new samples are not accepted."""
        if self._closing.is_set():
            raise errors.ClientClosedError("This SamplingClient is closed. Make a new one.")
        self.session.check_open()

    def check_not_closed(self) -> None:
        """Raise ClientClosedError if accepted samples are no longer sent."""
        if self._closed.is_set():
            raise errors.ClientClosedError("The sampling client was closed.")
        self.session.check_usable()

    def is_closed(self) -> bool:
        """True if the queue or its session is closed."""
        return self._closed.is_set() or self.session.is_closed

    def close(self, *, cancel: bool, timeout: float | None) -> None:
        """Wait for submitted samples, or fail them; see `SamplingClient.close`."""
        check_seconds("timeout", timeout, or_zero=True, or_none=True)
        patience = self.session.config.patience.close if timeout is None else timeout
        self._closing.set()
        owner = self.sampling_session_id
        self.session.end_after_pending(
            owner,
            f"the sampling client {owner}",
            None if cancel else patience,
            lambda hurried: self._end(HURRIED_TIMEOUT if hurried else CLOSE_TIMEOUT),
        )

    def _end(self, timeout: float) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self.pace.wake()  # samples waiting for room give up
        if self.watch is not None:
            self.watch.end()
        closed = errors.ClientClosedError("The sampling client was closed.")
        self.session.poller.abandon(self.sampling_session_id, closed)
        if self._owns_session:
            self.session.close(timeout=timeout)


@attrs.define(eq=False)
class _Sample:
    """One sample: submitted when there is room, and again after a 429 or a lost promise.

    A resend has the same number, so that the server samples once. After a lost promise the request
    is resent under its number, which recovers a promise that was not lost. Only if that fails does
    the sample get a new number.
    """

    _queue: SampleQueue
    _request: types.SampleRequest
    _future: OperationFuture[types.SampleResponse]
    _nbytes: int
    _poll_timeout: float | None
    _on_response: Callable[[types.SampleResponse], None]
    _lost: int = 0

    def take_place(self) -> None:
        """Start; when done, free the place for another sample."""
        self._future.add_done_callback(lambda _: self._queue.places.leave())
        self.start()

    def start(self) -> None:
        """Submit it on a thread of the session's pool."""
        closed = errors.ClientClosedError(f"{self._future.what} was not sent: the session closed.")
        dropped = partial(fail, self._future, closed)
        self._queue.session.sample_pool.start(self.submit, dropped=dropped)

    def submit(self) -> None:
        """Runs on a thread of the session's pool."""
        if not self._future.running() and not self._future.set_running_or_notify_cancel():
            return
        try:
            self._submit()
        except BaseException as exc:
            fail(self._future, exc)

    def _submit(self) -> None:
        queue = self._queue
        if self._request.seq_id is None:
            self._request = attrs.evolve(self._request, seq_id=queue.take_number())
        inner: OperationFuture[types.SampleResponse]
        inner = OperationFuture(self._future.what, self._future.progress)
        inner.add_done_callback(self._finish)
        waits, budget = queue.session.transport.waits, queue.retry.budget if queue.retry else None
        give_up_at = math.inf if budget is None else waits.now() + budget
        with waits.begin(f"the server to take {inner.what}") as wait:
            repeat(
                partial(self._send, inner, wait),
                lambda exc: isinstance(exc, errors.RateLimitError),
                stop=lambda state: waits.now() + state.upcoming_sleep >= give_up_at,
                wait=self._hold_back,
                sleep=lambda _: None,  # `admitted` makes all samplers of the key wait
                note=wait.failed_once,
            )

    def _send(self, inner: OperationFuture[types.SampleResponse], wait: Wait) -> None:
        """Submit when there is room. Raises RateLimitError if the server answers 429."""
        queue = self._queue
        with queue.pace.admitted(self._nbytes, queue.is_closed):
            queue.check_not_closed()
            self._start(inner, wait)
        queue.pace.succeeded()

    def _hold_back(self, state: tenacity.RetryCallState) -> float:
        retry_after = getattr(failure_of(state), "retry_after", None)
        return self._queue.pace.throttled(self._nbytes, retry_after)

    def _start(self, inner: OperationFuture[types.SampleResponse], wait: Wait) -> None:
        session = self._queue.session
        session.start(
            wire.SAMPLE,
            self._post,
            inner,
            queue=self._queue.sampling_session_id,
            ordered=False,
            poll_timeout=self._poll_timeout,
            on_queue_state=self._queue.on_queue_state,
            watcher=watch.watch if (watch := self._queue.watch) is not None else None,
            wait=wait,
            seq_id=self._request.seq_id,
        )

    def _post(self, wait: Wait) -> Any:
        headers = {"X-Tinker-Sampling-Backpressure": "1"}
        queue = self._queue
        return queue.session.post(
            wire.SAMPLE, self._request, wait, retry=queue.post_retry, headers=headers
        )

    def _finish(self, inner: Any) -> None:
        """Called when the promise is resolved or lost."""
        exc = inner.exception()
        if exc is None:
            response = _aligned(inner.result(), self._request.prompt)
            self._on_response(response)
            succeed(self._future, response)
        elif isinstance(exc, errors.PromiseExpiredError) and self._lost < MAX_LOST:
            self._lost += 1
            if self._lost % 2 == 0:  # lost under its own number, too
                self._request = attrs.evolve(self._request, seq_id=None)
            self.start()
        else:
            fail(self._future, exc)


def _aligned(response: types.SampleResponse, prompt: types.ModelInput) -> types.SampleResponse:
    """*response* with a log-probability for each token of *prompt*: some servers (SkyRL) omit the
    first token, which has none."""
    logprobs = response.prompt_logprobs_np
    if logprobs is None or len(logprobs) != prompt.length - 1:
        return response
    return attrs.evolve(response, prompt_logprobs=np.append(np.float32("nan"), logprobs))
