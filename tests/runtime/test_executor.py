"""Pools that let the program end at once, and a limit on bytes."""

from __future__ import annotations

import threading
import time

import pytest

from tinkex.runtime.executor import ByteBudget, Pool, end_all, on_daemon_thread


@pytest.fixture
def pool():
    made = Pool(4, "test")
    yield made
    made.shutdown()


def result_of(pool, function, seconds=10):
    """Run *function* on a thread of *pool*, and return what it returns."""
    results, done = [], threading.Event()
    pool.start(lambda: (results.append(function()), done.set()))
    assert done.wait(seconds)
    return results[0]


def test_a_task_runs_on_a_thread_of_the_pool(pool):
    assert result_of(pool, lambda: threading.current_thread().name).startswith("test_")


def test_a_task_that_raises_is_logged_and_does_not_cost_its_thread(caplog):
    """There is no future of it, so the log is the only place where it can be seen."""
    pool = Pool(1, "test")
    pool.start(lambda: 1 / 0)

    assert 1 == result_of(pool, lambda: 1)
    pool.shutdown()
    assert "test: a task raised" in caplog.text


def test_tasks_that_wait_get_more_threads_up_to_the_limit(pool):
    """Four that each wait for the other three: with fewer threads they would wait for ever."""
    meeting = threading.Barrier(5)
    for _ in range(4):
        pool.start(meeting.wait, 10)
    meeting.wait(10)


def test_what_waits_when_the_pool_is_shut_down_is_dropped():
    """A future whose task is dropped silently would never resolve."""
    entered, release, told = threading.Event(), threading.Event(), []
    narrow = Pool(1, "narrow")
    narrow.start(lambda: (entered.set(), release.wait(10)))
    entered.wait(10)
    narrow.start(lambda: told.append("ran"), dropped=lambda: told.append("dropped"))
    narrow.shutdown()
    narrow.start(lambda: told.append("ran"), dropped=lambda: told.append("dropped, too"))
    release.set()

    assert ["dropped", "dropped, too"] == told


def test_at_the_end_threads_are_woken_until_all_have_ended():
    """A thread that only begins to wait after the first call must be woken, too."""
    pool, woken, calls = Pool(8, "test"), threading.Event(), []
    for _ in range(8):
        pool.start(woken.wait, 30)

    def wake():
        calls.append(time.monotonic())
        if len(calls) == 3:
            woken.set()

    end_all(wake)

    assert pool.is_idle
    assert len(calls) >= 3


def test_the_end_does_not_wait_for_ever_for_a_thread_that_cannot_be_woken():
    pool, release = Pool(1, "test"), threading.Event()
    pool.start(release.wait, 30)
    end_all(lambda: None, seconds=0.05)

    assert not pool.is_idle
    release.set()


def test_a_daemon_thread_returns_a_future():
    assert 1 == on_daemon_thread(lambda: 1, "test").result(10)
    with pytest.raises(ZeroDivisionError):
        on_daemon_thread(lambda: 1 / 0, "test").result(10)


# Bytes.


def test_a_budget_admits_what_fits():
    budget = ByteBudget(100)

    assert budget.acquire(60)
    assert budget.acquire(40)
    assert not budget.acquire(1, timeout=0)


def test_a_budget_admits_again_what_was_released():
    budget = ByteBudget(100)
    budget.acquire(100)
    got = []
    waiter = threading.Thread(target=lambda: got.append(budget.acquire(50, timeout=10)))
    waiter.start()
    budget.release(100)
    waiter.join(10)

    assert [True] == got


def test_one_larger_than_the_budget_passes_when_nothing_else_is_held():
    """Decided on purpose: else it could never pass. Two of them at once cannot."""
    budget = ByteBudget(100)

    assert budget.acquire(1000)
    assert not budget.acquire(1000, timeout=0)
    budget.release(1000)
    assert budget.acquire(1000, timeout=0)


def test_a_budget_is_never_overshot_by_a_second_one():
    """The Elixir SDK admits while anything is left, and so goes far beyond its limit."""
    budget = ByteBudget(100)
    budget.acquire(10)

    assert not budget.acquire(91, timeout=0)
    assert budget.acquire(90, timeout=0)
