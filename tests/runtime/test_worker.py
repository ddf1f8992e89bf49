"""One thread that makes calls in the order they were put, and numbers what it sends."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, wait

import pytest

from tinkex import errors
from tinkex.futures import OperationFuture
from tinkex.runtime.worker import OrderedWorker


@pytest.fixture
def worker():
    made = OrderedWorker("test")
    yield made
    made.close(cancel=True, timeout=10)


def sends(log, result=None):
    """A call that sends one request, which is accepted and done at once."""

    def run(turn, future):
        turn.send(log.append)
        future.set_result(result)

    return run


def refuses(exc):
    """A call whose send fails for good."""

    def run(turn, future):
        turn.send(lambda seq_id: (_ for _ in ()).throw(exc))

    return run


def waits(entered, release):
    """A call that holds the worker until it is released."""

    def run(turn, future):
        entered.set()
        assert release.wait(10)
        future.set_result(None)

    return run


NO_SUCH_LOSS = errors.BadRequestError("no such loss", status=400)


def test_calls_are_made_in_the_order_they_were_put(worker):
    log = []
    futures = [
        worker.put(lambda turn, future, i=i: future.set_result(log.append(i)), f"call {i}")
        for i in range(1000)
    ]
    for future in futures:
        future.result(10)

    assert list(range(1000)) == log


def test_from_several_threads_a_call_that_returned_before_another_began_is_made_before_it(worker):
    """The place in line is taken inside put(), on the caller's thread."""
    log = []
    lock = threading.Lock()
    order = []

    def caller(name):
        for i in range(100):
            with lock:  # so that the order in which the calls return is known
                worker.put(sends_name(log, (name, i)), "call")
                order.append((name, i))

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    worker.close(timeout=10)

    assert order == log


def sends_name(log, name):
    def run(turn, future):
        turn.send(lambda seq_id: log.append(name))
        future.set_result(None)

    return run


def test_seq_ids_are_contiguous_from_1(worker):
    log = []
    for _ in range(3):
        worker.put(sends(log), "call").result(10)

    assert [1, 2, 3] == log
    assert 3 == worker.seq_id


def test_a_client_that_goes_on_where_another_ended_says_at_which_number():
    log = []
    worker = OrderedWorker("test", first_seq_id=8)
    worker.put(sends(log), "call").result(10)
    worker.close()

    assert [8] == log


def test_a_number_that_was_refused_is_used_again(worker):
    """A gap would leave the server waiting for ever for a number that never comes."""
    log = []
    worker.put(sends(log), "call").result(10)
    with pytest.raises(errors.BadRequestError):
        worker.put(refuses(NO_SUCH_LOSS), "call").result(10)
    worker.put(sends(log), "call").result(10)

    assert [1, 2] == log


def test_a_call_that_sends_nothing_uses_no_number(worker):
    log = []
    worker.put(lambda turn, future: future.set_result(None), "call").result(10)
    worker.put(sends(log), "call").result(10)

    assert [1] == log


# After a failure.


def test_after_a_refusal_nothing_more_is_sent(worker):
    """An optimizer step must not follow gradients that never arrived."""
    log = []
    entered, release = threading.Event(), threading.Event()
    worker.put(waits(entered, release), "first")
    worker.put(refuses(NO_SUCH_LOSS), "forward_backward on m1")
    behind = worker.put(sends(log), "optim_step on m1")
    release.set()

    with pytest.raises(errors.PriorOperationFailedError, match="no such loss") as caught:
        behind.result(10)
    assert [] == log
    assert NO_SUCH_LOSS is caught.value.__cause__


def test_the_message_of_what_was_not_sent_says_why_and_what_to_do(worker):
    worker.put(refuses(NO_SUCH_LOSS), "forward_backward on m1")
    behind = worker.put(lambda turn, future: None, "optim_step on m1")

    assert (
        "Not sent: an operation before it failed (BadRequestError: no such loss). Look at that "
        "failure's result(); then call again." == str(behind.exception(10))
    )


def test_what_is_called_later_fails_too_until_the_failure_was_delivered(worker):
    """`future.result()` may come a hundred lines below; what stands between must not be applied."""
    log = []
    failed = worker.put(refuses(NO_SUCH_LOSS), "forward_backward")
    wait([failed], 10)
    later = [worker.put(sends(log), "optim_step") for _ in range(3)]
    worker.put(sends(log), "x").exception(10)

    assert [] == log
    for future in later:
        assert isinstance(future.exception(10), errors.PriorOperationFailedError)


@pytest.mark.parametrize("of", ["the failed call", "one behind it"])
def test_once_the_failure_was_delivered_the_worker_goes_on(worker, of):
    log = []
    failed = worker.put(refuses(NO_SUCH_LOSS), "forward_backward")
    behind = worker.put(sends(log), "optim_step")
    with pytest.raises(errors.TinkexError, match="no such loss"):
        (failed if of == "the failed call" else behind).result(10)
    worker.put(sends(log), "optim_step").result(10)

    assert [1] == log


def test_what_was_put_before_the_delivery_fails_even_if_its_turn_comes_after(worker):
    """Its caller expected the operation before it to succeed."""
    log = []
    entered, release = threading.Event(), threading.Event()
    failed = worker.put(refuses(NO_SUCH_LOSS), "forward_backward")
    wait([failed], 10)
    holding = worker.put(waits(entered, release), "put before the delivery")
    before = worker.put(sends(log), "put before the delivery")
    failed.exception(10)
    after = worker.put(sends(log), "put after it")

    assert isinstance(holding.exception(10), errors.PriorOperationFailedError)
    assert isinstance(before.exception(10), errors.PriorOperationFailedError)
    assert after.result(10) is None
    assert [1] == log


def test_a_second_failure_is_held_back_like_the_first(worker):
    for _ in range(3):
        failed = worker.put(refuses(NO_SUCH_LOSS), "forward_backward")
        behind = worker.put(sends([]), "optim_step")
        assert isinstance(failed.exception(10), errors.BadRequestError)
        assert isinstance(behind.exception(10), errors.PriorOperationFailedError)

    assert worker.put(sends([]), "optim_step").exception(10) is None


def test_delivering_an_old_failure_does_not_open_the_door_after_a_new_one(worker):
    log = []
    first = worker.put(refuses(NO_SUCH_LOSS), "first")
    first.exception(10)
    second = worker.put(refuses(errors.BadRequestError("another", status=400)), "second")
    wait([second], 10)
    first.exception(10)  # looked at once more
    behind = worker.put(sends(log), "behind")

    assert isinstance(behind.exception(10), errors.PriorOperationFailedError)
    assert "another" in str(behind.exception(10))
    assert [] == log


def test_the_parts_that_were_accepted_are_named_in_the_failure_of_a_later_one(worker):
    """They took effect on the server: the user must know that half of the batch is in."""

    def run(turn, future):
        turn.send(lambda seq_id: None)
        turn.send(lambda seq_id: None)
        turn.send(
            lambda seq_id: (_ for _ in ()).throw(errors.BadRequestError("too big", status=400))
        )

    failed = worker.put(run, "forward_backward")

    assert (
        "too big (2 part(s) before it were accepted, as seq_id 1, 2; they took effect on the "
        "server.)" == str(failed.exception(10))
    )


def test_what_a_call_raises_itself_comes_out_unchanged(worker):
    """A user's loss function runs here; its exception is his own."""
    problem = ZeroDivisionError("in my loss")

    def run(turn, future):
        turn.send(lambda seq_id: None)
        raise problem

    assert problem is worker.put(run, "forward_backward_custom").exception(10)


def test_when_the_server_may_have_taken_a_lost_send_no_number_is_safe_any_more(worker):
    """The next one might be taken for a repetition, and silently not be run."""
    lost = errors.APIConnectionError("the connection broke")
    lost.outcome_unknown = True
    failed = worker.put(refuses(lost), "forward_backward")
    failed.exception(10)
    later = worker.put(sends([]), "optim_step").exception(10)

    assert isinstance(later, errors.PriorOperationFailedError)
    assert "load the last checkpoint into a new training client" in str(later)


def test_a_lost_answer_to_a_question_breaks_nothing(worker):
    """The operation itself was accepted, so that the next number is known."""
    log = []
    lost = errors.APIConnectionError("the connection broke while polling")
    lost.outcome_unknown = True

    def run(turn, future):
        turn.send(log.append)
        raise lost

    worker.put(run, "forward_backward_custom").exception(10)
    worker.put(sends(log), "optim_step").result(10)

    assert [1, 2] == log


@pytest.mark.parametrize("problem", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_statement_31_whatever_is_raised_in_the_worker_ends_in_the_future(worker, problem):
    """Never in a hang: the thread lives on, and the next call is made. (statement 31)"""

    def run(turn, future):
        raise problem

    future = worker.put(run, "a call")

    assert problem is future.exception(10)
    assert worker.put(sends([]), "the next").exception(10) is None


def test_a_callback_that_raises_costs_nothing(worker, caplog):
    future = worker.put(lambda turn, future: future.set_result(1), "a call")
    future.add_done_callback(lambda _: 1 / 0)

    assert 1 == future.result(10)
    assert 2 == worker.put(sends([], 2), "the next").result(10)


# Cancelling and closing.


def test_a_call_that_waits_can_be_cancelled_and_is_then_not_made(worker):
    log = []
    entered, release = threading.Event(), threading.Event()
    worker.put(waits(entered, release), "first")
    behind = worker.put(sends(log), "second")
    entered.wait(10)

    assert behind.cancel()
    release.set()
    worker.put(sends(log), "third").result(10)
    assert [1] == log


def test_a_call_that_is_being_made_cannot_be_cancelled(worker):
    entered, release = threading.Event(), threading.Event()
    future = worker.put(waits(entered, release), "first")
    entered.wait(10)

    assert not future.cancel()
    release.set()
    assert future.result(10) is None


def test_close_makes_what_is_queued_and_ends_the_thread(worker):
    log = []
    futures = [worker.put(sends(log), "call") for _ in range(100)]

    assert worker.close(timeout=10)
    assert list(range(1, 101)) == log
    assert all(f.done() for f in futures)
    assert "test" not in {t.name for t in threading.enumerate()}


def test_after_close_nothing_is_taken(worker):
    worker.close()

    with pytest.raises(errors.ClientClosedError, match="optim_step on m1 was not sent: the client"):
        worker.put(sends([]), "optim_step on m1")


def test_close_is_idempotent(worker):
    worker.put(sends([]), "call")

    assert worker.close(timeout=10)
    assert worker.close(timeout=10)
    assert worker.close(cancel=True, timeout=10)


def test_close_with_cancel_cancels_what_is_queued(worker):
    log = []
    entered, release = threading.Event(), threading.Event()
    first = worker.put(waits(entered, release), "first")
    behind = [worker.put(sends(log), "call") for _ in range(3)]
    entered.wait(10)
    threading.Timer(0.01, release.set).start()
    worker.close(cancel=True, timeout=10)

    assert first.result(10) is None
    assert all(f.cancelled() for f in behind)
    assert [] == log


def test_close_never_blocks_longer_than_its_timeout(worker):
    """The call under way may be in a request that takes minutes; what is behind it is failed."""
    entered, release = threading.Event(), threading.Event()
    first = worker.put(waits(entered, release), "first")
    behind = worker.put(sends([]), "second")
    entered.wait(10)

    assert not worker.close(timeout=0.02)
    assert behind.done()
    with pytest.raises(CancelledError):
        behind.result()
    release.set()
    assert first.result(10) is None
    assert worker.close(timeout=10)


def test_close_may_be_called_from_a_callback(worker):
    """On the worker's own thread, which cannot wait for itself."""
    done = threading.Event()

    def callback(_):
        worker.close()
        done.set()

    entered, release = threading.Event(), threading.Event()
    future = worker.put(waits(entered, release), "call")
    future.add_done_callback(callback)
    release.set()

    assert done.wait(10)


def test_closing_ends_the_wait_for_a_first_pass(worker):
    """forward_backward_custom waits on the worker thread for its forward pass."""
    entered = threading.Event()

    def run(turn, future):
        entered.set()
        turn.wait_for(OperationFuture("the forward pass"))

    future = worker.put(run, "forward_backward_custom")
    entered.wait(10)
    worker.close(cancel=True, timeout=10)

    with pytest.raises(errors.ClientClosedError, match="before this call's second pass"):
        future.result(10)


def test_a_worker_that_was_never_used_has_no_thread():
    before = threading.active_count()
    worker = OrderedWorker("unused")
    worker.close()

    assert before == threading.active_count()


def test_it_counts_what_waits(worker):
    entered, release = threading.Event(), threading.Event()
    worker.put(waits(entered, release), "first")
    entered.wait(10)
    for _ in range(3):
        worker.put(sends([]), "call")

    assert 3 == worker.queued
    release.set()
    worker.close(timeout=10)
    assert 0 == worker.queued
