"""Pools that let the program end at once, and a limit on bytes."""

from __future__ import annotations

import threading
import time

import pytest

from tinkex.runtime.executor import ByteBudget, GrowingPool, Pool, end_all, on_daemon_thread


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


# A pool that gets more threads only where they help.


@pytest.fixture
def growing():
    made = GrowingPool(16, "growing")
    yield made
    made.shutdown()


def test_quick_tasks_share_a_few_threads(growing, monkeypatch):
    """More would only wait for one another: one thread holds the interpreter at a time."""
    monkeypatch.setattr(GrowingPool, "MOMENT", 60)
    names, left, done = set(), [*range(300)], threading.Event()

    def task():
        names.add(threading.current_thread().name)
        left.pop()
        if not left:
            done.set()

    for _ in range(300):
        growing.start(task)

    assert done.wait(10)
    assert len(names) <= GrowingPool.FEW + 1  # and the one that looks after them


def test_tasks_that_wait_for_something_slow_get_a_thread_each_a_moment_later(growing):
    """Twelve that each wait for all others: the first four alone would wait for ever."""
    meeting = threading.Barrier(13)
    for _ in range(12):
        growing.start(meeting.wait, 10)

    meeting.wait(10)


def test_a_growing_pool_keeps_to_its_limit_and_does_all_tasks():
    running, most, done = 0, 0, threading.Semaphore(0)
    lock = threading.Lock()
    narrow = GrowingPool(6, "narrow")

    def task():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.03)  # slower than a moment
        with lock:
            running -= 1
        done.release()

    for _ in range(30):
        narrow.start(task)

    assert all(done.acquire(timeout=10) for _ in range(30))
    assert most <= 6
    narrow.shutdown()


def test_a_pool_of_one_thread_does_one_task_after_the_other():
    pool, done = GrowingPool(1, "one"), []
    finished = threading.Event()
    for i in range(20):
        pool.start(done.append, i)
    pool.start(finished.set)

    assert finished.wait(10)
    assert [*range(20)] == done
    pool.shutdown()


def test_a_growing_pool_drops_what_waits_at_its_end_once_and_does_the_rest():
    entered, release, told = threading.Barrier(5), threading.Event(), []
    pool = GrowingPool(4, "ending")
    for _ in range(4):
        pool.start(lambda: (entered.wait(10), release.wait(10), told.append("done")))
    entered.wait(10)
    for i in range(3):
        pool.start(told.append, "ran", dropped=lambda i=i: told.append(i))
    pool.shutdown()
    pool.start(told.append, "ran", dropped=lambda: told.append("too late"))
    pool.shutdown()

    assert [0, 1, 2, "too late"] == told
    release.set()
    deadline = time.monotonic() + 10
    while len(told) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ["done"] * 4 == told[4:]


def test_a_task_of_a_growing_pool_that_raises_does_not_cost_its_thread(growing, caplog):
    for _ in range(GrowingPool.FEW):
        growing.start(lambda: 1 / 0)

    assert 1 == result_of(growing, lambda: 1)
    assert "growing: a task raised" in caplog.text
