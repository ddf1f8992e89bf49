"""The handle of an operation: a plain future with a description, which can also be awaited."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import pytest

from tinkex import errors
from tinkex.futures import OperationFuture, fail, gather, succeed


def resolved(value):
    future = OperationFuture("optim_step on m1")
    future.set_result(value)
    return future


def failed(exc):
    future = OperationFuture("optim_step on m1")
    future.set_exception(exc)
    return future


def test_it_works_with_the_standard_library():
    """wait, as_completed and callbacks work as with any future."""
    futures = [resolved(1), resolved(2)]
    called = []
    futures[0].add_done_callback(called.append)

    assert set(futures) == set(concurrent.futures.as_completed(futures, 1))
    assert set(futures) == concurrent.futures.wait(futures, 1).done
    assert [futures[0]] == called


def test_a_timeout_leaves_the_operation_alive():
    """Asking is not cancelling: the result may be asked for again."""
    future = OperationFuture("optim_step on m1")
    with pytest.raises(TimeoutError, match=r"optim_step on m1 is not done after 0\.01 s\. It cont"):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError, match="optim_step on m1 is not done"):
        future.exception(timeout=0)
    future.set_result(3)

    assert 3 == future.result()


def test_an_operation_that_failed_with_a_timeout_is_told_from_one_that_is_not_done():
    future = failed(errors.APITimeoutError("Timed out while polling"))

    with pytest.raises(errors.APITimeoutError, match="Timed out while polling"):
        future.result(timeout=5)


def test_what_is_done_at_the_last_moment_is_the_result(monkeypatch):
    """Between the end of the waiting and the next look the result may come."""
    future = OperationFuture("optim_step on m1")
    original = concurrent.futures.Future.exception
    calls = []

    def late(self, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            future.set_result(3)
            raise concurrent.futures.TimeoutError
        return original(self, timeout)

    monkeypatch.setattr(concurrent.futures.Future, "exception", late)

    assert 3 == future.result(timeout=0)


def test_a_queued_operation_can_be_cancelled():
    future = OperationFuture("optim_step on m1")

    assert future.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


def test_its_repr_says_what_it_is_of_and_how_far():
    future = OperationFuture("optim_step on m1")
    assert "<OperationFuture of optim_step on m1: queued, 0.0 s>" == repr(future)
    future.set_running_or_notify_cancel()
    future.progress.request_ids += ("r1",)
    future.progress.queue_state = "paused_capacity"
    expected = "running, 0.0 s, request r1, queue state paused_capacity, retries: 2"
    future.progress.retries = 2
    assert f"<OperationFuture of optim_step on m1: {expected}>" == repr(future)
    future.set_result(1)
    assert "<OperationFuture of optim_step on m1: done, 0.0 s, request r1>" == repr(future)


def test_a_notebook_shows_state_and_time_of_a_future():
    """Its failure, too; text from a server is escaped."""
    future = OperationFuture("optim_step on <m1>")
    future.set_exception(ValueError("a < b"))
    shown = future._repr_html_()

    assert "optim_step on &lt;m1&gt;" in shown
    assert "failed" in shown
    assert "0.0 s" in shown
    assert "ValueError: a &lt; b" in shown


def test_the_end_is_reported_once_and_before_anybody_is_woken():
    """A program may end as soon as result() returns."""
    reported = []
    future = OperationFuture("optim_step on m1")
    future.on_end = lambda result, exc: reported.append((result, exc, future.done()))
    future.set_result(5)
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(6)

    assert [(5, None, False)] == reported


def test_a_cancelled_future_reports_its_end():
    reported = []
    future = OperationFuture("optim_step on m1")
    future.on_end = lambda result, exc: reported.append(type(exc))

    assert future.cancel()
    assert [concurrent.futures.CancelledError] == reported


@pytest.mark.parametrize("how", ["result", "exception", "await"])
def test_the_caller_has_been_told_when_a_failure_was_handed_over(how):
    """The worker takes new calls only after that."""
    told = []
    problem = ValueError("no")
    future = failed(problem)
    future.on_delivered = told.append

    if how == "exception":
        assert problem is future.exception()
    else:
        with pytest.raises(ValueError, match="no"):
            future.result() if how == "result" else asyncio.run(future.result_async())

    assert [problem] == told


def test_a_failure_that_nobody_asked_for_is_not_delivered():
    told = []
    future = failed(ValueError("no"))
    future.on_delivered = told.append
    concurrent.futures.wait([future])

    assert [] == told


# Awaiting.


def test_it_can_be_awaited():
    async def program():
        return await resolved(1), await resolved(2).result_async()

    assert (1, 2) == asyncio.run(program())


def test_many_are_awaited_at_once():
    async def program(futures):
        return await asyncio.gather(*futures)

    futures = [OperationFuture(str(i)) for i in range(100)]
    threading.Thread(target=lambda: [f.set_result(i) for i, f in enumerate(futures)]).start()

    assert list(range(100)) == asyncio.run(program(futures))


def test_awaiting_with_a_timeout_leaves_the_operation_alive():
    """The official SDK cancels here, and does not in result(timeout): one rule is better."""

    async def program(future):
        with pytest.raises(TimeoutError, match="optim_step is not done after 0 s"):
            await future.result_async(timeout=0)
        assert not future.cancelled()
        future.set_result(3)
        return await future

    assert 3 == asyncio.run(program(OperationFuture("optim_step")))


def test_cancelling_the_awaiting_task_leaves_the_operation_alive():
    async def program(future):
        task = asyncio.create_task(future.result_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return future.cancelled()

    assert not asyncio.run(program(OperationFuture("optim_step")))


def test_tasks_can_be_made_of_it_as_of_a_coroutine():
    """Any number of them; a task that is cancelled does not end the others, or the operation."""

    async def program(future):
        tasks = [asyncio.create_task(future) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert tasks[1].cancelled() and not tasks[0].done()
        future.set_result(3)
        return [await tasks[0], await tasks[2], await asyncio.create_task(future)]

    assert [3, 3, 3] == asyncio.run(program(OperationFuture("optim_step")))


def test_a_task_of_a_failed_operation_fails_and_asyncio_run_takes_it():
    failed, done = OperationFuture("optim_step"), OperationFuture("optim_step")
    failed.set_exception(ValueError("no such model"))
    done.set_result(5)

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(failed)
    assert 5 == asyncio.run(done)


# Resolving.


def test_a_future_is_resolved_once():
    """Closing a client and the last answer may race; the first wins, the second must not raise."""
    future = resolved(1)
    fail(future, ValueError("late"))
    succeed(future, 2)

    assert 1 == future.result()


def test_gather_joins_the_results_in_order_whatever_the_order_they_come_in():
    parts, whole = [OperationFuture(str(i)) for i in range(3)], OperationFuture("whole")
    gather(parts, lambda results: "".join(results), whole)
    for i in (2, 0, 1):
        assert not whole.done()
        parts[i].set_result("abc"[i])

    assert "abc" == whole.result()


def test_gather_fails_at_once_with_the_first_failure():
    """Not only when the parts before it are done: hours may lie between."""
    parts, whole = [OperationFuture(str(i)) for i in range(3)], OperationFuture("whole")
    gather(parts, list, whole)
    parts[2].set_exception(ValueError("part 3"))

    with pytest.raises(ValueError, match="part 3"):
        whole.result(timeout=0)
    parts[0].set_exception(ValueError("late"))
    parts[1].set_result(1)


def test_gather_passes_on_what_joining_raises():
    whole = OperationFuture("whole")
    gather([resolved(1)], lambda results: 1 / 0, whole)

    with pytest.raises(ZeroDivisionError):
        whole.result(timeout=0)


def test_gather_passes_on_a_cancelled_part():
    part, whole = OperationFuture("part"), OperationFuture("whole")
    gather([part], list, whole)
    part.cancel()

    with pytest.raises(concurrent.futures.CancelledError):
        whole.result(timeout=0)


def test_gather_resolves_once_from_many_threads():
    parts, whole = [OperationFuture(str(i)) for i in range(200)], OperationFuture("whole")
    calls = []
    gather(parts, lambda results: (calls.append(1), len(results))[1], whole)
    threads = [
        threading.Thread(target=lambda some=parts[i::8]: [p.set_result(0) for p in some])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()

    assert 200 == whole.result(timeout=10)
    assert [1] == calls


def test_a_failure_is_not_delivered_to_a_coroutine_that_gave_up():
    """Else an optimizer step could go out before the caller has seen that the last one failed."""
    told = []

    async def program(future):
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0)
        future.set_exception(ValueError("no"))
        await asyncio.sleep(0)

    future = OperationFuture("optim_step")
    future.on_delivered = told.append
    asyncio.run(program(future))

    assert [] == told


def test_an_event_loop_that_is_gone_does_not_matter_to_the_operation():
    async def program(future):
        with pytest.raises(TimeoutError):
            await future.result_async(timeout=0)

    future = OperationFuture("optim_step")
    asyncio.run(program(future))
    future.set_result(1)

    assert 1 == future.result()
