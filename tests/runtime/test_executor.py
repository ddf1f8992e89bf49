"""A pool that never holds up the end of the program, and a limit on bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError, wait

import pytest

from tinkex.runtime.executor import ByteBudget, DaemonExecutor


@pytest.fixture
def pool():
    made = DaemonExecutor(4, "test", eager=2)
    yield made
    made.shutdown()


def test_a_task_runs_on_a_thread_of_the_pool(pool):
    name = pool.submit(lambda: threading.current_thread().name).result(10)

    assert "test-1" == name


def test_what_a_task_raises_comes_out_of_its_future(pool):
    future = pool.submit(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        future.result(10)


def test_a_started_task_that_raises_does_not_cost_its_thread(caplog):
    """Nobody holds a future of it, so the log is the only place where it can be seen."""
    pool = DaemonExecutor(1, "test")
    pool.start(lambda: 1 / 0)

    assert 1 == pool.submit(lambda: 1).result(10)
    pool.shutdown()
    assert "test: a task raised" in caplog.text


def test_every_task_runs_however_many_there_are(pool):
    futures = [pool.submit(lambda i=i: i) for i in range(500)]

    assert list(range(500)) == [f.result(10) for f in futures]


def test_tasks_that_wait_get_more_threads_up_to_the_limit(pool):
    """Four that each wait for the other three: with fewer threads they would wait for ever."""
    meeting = threading.Barrier(4)
    futures = [pool.submit(meeting.wait, 10) for _ in range(4)]

    assert {0, 1, 2, 3} == {f.result(10) for f in futures}
    assert 4 == pool.thread_count


def test_there_are_never_more_threads_than_the_limit(pool):
    release = threading.Event()
    blocking = [pool.submit(release.wait, 10) for _ in range(4)]
    behind = pool.submit(lambda: "after")

    assert (set(), {behind}) == wait([behind], 0.05)
    assert 4 >= pool.thread_count
    release.set()
    assert "after" == behind.result(10)
    assert all(f.result(10) for f in blocking)


def test_what_waits_when_the_pool_is_shut_down_is_told(pool):
    """A future whose task is dropped silently would never resolve."""
    entered, release = threading.Event(), threading.Event()
    narrow = DaemonExecutor(1, "narrow")
    told = []
    running = narrow.submit(lambda: (entered.set(), release.wait(10)))
    entered.wait(10)
    behind = narrow.submit(lambda: "never")
    narrow.start(lambda: None, dropped=lambda: told.append("dropped"))
    narrow.shutdown()
    release.set()

    with pytest.raises(CancelledError):
        behind.result(10)
    assert ["dropped"] == told
    assert running.result(10)


def test_after_shutdown_nothing_is_taken(pool):
    told = []
    pool.shutdown()
    pool.start(lambda: told.append("ran"), dropped=lambda: told.append("dropped"))

    assert ["dropped"] == told


def test_after_shutdown_the_threads_end(pool):
    names = {pool.submit(lambda: threading.current_thread()).result(10) for _ in range(3)}
    pool.shutdown()
    for thread in names:
        thread.join(5)  # well before a thread ends for lack of work

    assert not any(thread.is_alive() for thread in names)


def test_idle_threads_end(pool, monkeypatch):
    monkeypatch.setattr(DaemonExecutor, "IDLE_SECONDS", 0.01)
    thread = pool.submit(threading.current_thread).result(10)
    thread.join(10)

    assert not thread.is_alive()
    assert "again" == pool.submit(lambda: "again").result(10)


def test_a_task_that_hangs_does_not_hold_up_the_end_of_the_program():
    """ThreadPoolExecutor joins its threads at exit; one of ours may be 40 s into a long poll."""
    code = (
        "import threading; from tinkex.runtime.executor import DaemonExecutor\n"
        "started = threading.Event(); pool = DaemonExecutor(2, 'x')\n"
        "pool.submit(lambda: (started.set(), threading.Event().wait()))\n"
        "started.wait(10)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=20)

    assert 0 == done.returncode


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
