"""Failures that the caller has not seen, and work that is not done."""

from __future__ import annotations

import logging
import weakref

import pytest

from tinkex import errors
from tinkex.futures import OperationFuture, fail, succeed
from tinkex.runtime import pending
from tinkex.runtime.pending import PendingOperations, describe


@pytest.fixture
def operations():
    return PendingOperations()


def added(operations, what="optim_step", **options):
    future = OperationFuture(what)
    operations.add("m", future, **options)
    return future


def failed(operations, exc=None, **options):
    future = added(operations, **options)
    fail(future, exc or errors.RequestFailedError("no such loss"))
    return future


def test_failures_that_were_seen_do_not_pile_up(operations):
    """A run that catches its errors and goes through a million operations keeps none of them."""
    refs = []
    for _ in range(2 * pending.PRUNE_AT):
        future = failed(operations, ordered=False)
        assert future.exception()
        refs.append(weakref.ref(future))
        del future

    assert sum(ref() is not None for ref in refs) <= pending.PRUNE_AT


def test_failures_that_were_not_seen_are_kept_and_reported_in_one_line(operations, caplog):
    futures = [failed(operations, ordered=False) for _ in range(2 * pending.PRUNE_AT)]
    operations.report()
    operations.report()

    [record] = caplog.records
    assert f"{len(futures)} operations failed, and result() was not called" in record.getMessage()
    assert "no such loss" in record.getMessage()


@pytest.mark.parametrize("is_seen", [False, True])
def test_a_save_over_a_failure_that_was_not_seen_is_warned_of(operations, caplog, is_seen):
    """The weights lack what should have been trained; who has seen the failure knows that."""
    caplog.set_level(logging.WARNING)
    before = failed(operations)
    if is_seen:
        assert before.exception()
    save = added(operations, "save_weights", saves="save_weights('a')")
    succeed(save, None)

    warned = [r for r in caplog.records if "the weights that it saved lack" in r.getMessage()]
    assert is_seen == (not warned)


def test_what_only_follows_another_failure_is_not_reported(operations, caplog):
    """One cause, one line."""
    failed(operations, errors.PriorOperationFailedError("not sent"), ordered=False)
    failed(operations, errors.ClientClosedError("closed"), ordered=False)
    added(operations, ordered=False).cancel()
    operations.report()

    assert [] == caplog.records


def test_waiting_ends_with_the_time_or_when_it_makes_no_sense_any_more(operations):
    """What is left is named by kind; more than four kinds are cut."""
    left = [added(operations, f"kind{i}") for i in range(6)]
    done = added(operations)
    succeed(done, None)

    assert left == operations.wait("m", 0.01)
    assert left == operations.wait(None, 60.0, give_up=lambda: True)
    text = describe(left)
    assert text.startswith("6 operations (6 not sent, 0 in progress): 1 x kind0")
    assert text.endswith(", ...")
    operations.forget(left)
    assert [] == operations.wait("m", 60.0)
    assert "" == describe([])
