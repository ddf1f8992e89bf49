"""One long poll for all of a sampling session's results."""

from __future__ import annotations

import threading

import pytest

from tests.support.fake_server import FakeServer, after, answer, blocked, session, status
from tinkex import errors, types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime import sample_watch
from tinkex.runtime.polling import Promise
from tinkex.runtime.sample_watch import CompletionWatch
from tinkex.runtime.wait_log import WaitLog


@pytest.fixture
def server():
    """A server whose samples r0, r1, ... are all known, and finished when a test finishes them."""
    made = FakeServer(features={"sample_use_retrieve_futures": True})
    sample = wire.to_json(types.SampleResponse([types.SampledSequence([1])]))
    made.always("retrieve_future", answer(sample))
    return made


@pytest.fixture
def watch(server):
    with session(server) as s:
        yield CompletionWatch(s, "sampler-0", clone=3)


def promise(request_id, **options):
    future = OperationFuture(f"sample {request_id}")
    return Promise(request_id, wire.SAMPLE, future, WaitLog().begin(future.what), **options)


def finished(*request_ids, cursor=0):
    done = [{"state": "finished", "request_id": request_id} for request_id in request_ids]
    return answer({"completions": done, "cursor": cursor})


def test_a_sample_is_fetched_when_the_server_says_that_it_is_done(watch, server):
    server.script("retrieve_futures", finished(), finished("r1", cursor=1), finished("r0"))
    waiting = [promise("r0"), promise("r1")]
    for one in waiting:
        watch.watch(one)

    assert [[1], [1]] == [one.future.result(10).sequences[0].tokens for one in waiting]
    assert 2 == len(server.seen("retrieve_future"))


def test_a_question_has_the_session_the_clone_and_the_cursor_of_the_answer_before(watch, server):
    server.script("retrieve_futures", finished("r1", cursor=17), finished("r0", cursor=18))
    waiting = [promise("r0"), promise("r1")]
    for one in waiting:
        watch.watch(one)
    for one in waiting:
        one.future.result(10)
    first, second = server.bodies("retrieve_futures")[:2]

    assert {
        "type": "sampling_session",
        "sampling_session_id": "sampler-0",
        "cloned_sampler_id": 3,
    } == first["target"]
    assert [0, 17] == [first["prev_cursor"], second["prev_cursor"]]
    assert 45.0 == server.seen("retrieve_futures")[0].timeout[1]


def test_after_news_it_waits_a_moment_for_more_of_it(watch, server):
    """Of many samples that end together, each would otherwise cost a question."""
    server.script("retrieve_futures", finished("r1", cursor=1), finished("r0", cursor=2))
    waiting = [promise("r0"), promise("r1")]
    for one in waiting:
        watch.watch(one)
    for one in waiting:
        one.future.result(10)

    assert [sample_watch.GATHER] == server.clock.slept


def test_what_was_fetched_is_acknowledged(watch, server):
    """So that the server may forget it."""
    server.script("retrieve_futures", finished("r0"))
    first = promise("r0")
    watch.watch(first)
    first.future.result(10)
    server.script("retrieve_futures", finished("r1"))
    second = promise("r1")
    watch.watch(second)
    second.future.result(10)

    assert [[], ["r0"]] == [b["retrieved_request_ids"] for b in server.bodies("retrieve_futures")]


def test_an_acknowledgement_that_did_not_arrive_is_repeated_and_the_cursor_begins_anew(
    watch, server
):
    """Nothing that the server said meanwhile may be missed."""
    server.script("retrieve_futures", finished("r0", cursor=9))
    first = promise("r0")
    watch.watch(first)
    first.future.result(10)
    server.script("retrieve_futures", status(503), finished("r1"))
    second = promise("r1")
    watch.watch(second)
    second.future.result(10)
    _, failed, again = server.bodies("retrieve_futures")

    assert [["r0"], ["r0"]] == [failed["retrieved_request_ids"], again["retrieved_request_ids"]]
    assert [9, 0] == [failed["prev_cursor"], again["prev_cursor"]]


def test_a_sample_that_was_done_before_its_promise_was_read_is_not_missed(watch, server):
    """The answer to the submit and the answer to the poll race."""
    server.script("retrieve_futures", finished("r0", "r1"))
    first = promise("r0")
    watch.watch(first)
    first.future.result(10)
    server.always("retrieve_futures", finished())
    second = promise("r1")
    watch.watch(second)

    assert second.future.result(10)


def test_its_thread_lives_only_while_something_is_waited_for(watch, server, monkeypatch):
    monkeypatch.setattr(sample_watch, "LINGER", 0.005)
    entered, release = threading.Event(), threading.Event()
    server.script("retrieve_futures", blocked(entered, release, finished("r0")))
    first = promise("r0")
    watch.watch(first)
    entered.wait(10)
    [thread] = [t for t in threading.enumerate() if t.name == "tinkex-completions"]
    release.set()
    first.future.result(10)
    thread.join(10)

    assert not thread.is_alive()
    server.script("retrieve_futures", finished("r1"))
    second = promise("r1")
    watch.watch(second)
    assert second.future.result(10)


def test_at_its_end_it_fails_what_is_waited_for(watch, server):
    entered, release = threading.Event(), threading.Event()
    server.always("retrieve_futures", blocked(entered, release, finished()))
    first = promise("r0")
    watch.watch(first)
    entered.wait(10)
    watch.end()
    watch.end()
    late = promise("r1")
    watch.watch(late)

    assert isinstance(first.future.exception(0), errors.ClientClosedError)
    assert isinstance(late.future.exception(0), errors.ClientClosedError)
    release.set()


def test_statement_31_whatever_is_raised_on_its_thread_ends_in_the_futures(
    watch, monkeypatch, caplog
):
    """Its thread is the only one that waits, so its failure must fail every sample.
    (statement 31)"""
    problem = RuntimeError("injected")

    def broken(*args):
        raise problem

    monkeypatch.setattr(watch, "_take", broken)
    first = promise("r0")
    watch.watch(first)

    assert problem is first.future.exception(10)


def test_without_news_for_a_minute_each_sample_is_asked_for(watch, server):
    """A server that has lost track of what it has to tell must not keep samples for ever."""
    server.script("retrieve_futures", after(sample_watch.DOUBT + 1, finished()))
    one, other = promise("r0"), promise("r1")
    for waiting in (one, other):
        watch.watch(waiting)

    assert [[1], [1]] == [p.future.result(10).sequences[0].tokens for p in (one, other)]


def test_a_sample_that_is_cancelled_is_waited_for_no_more(watch, server, monkeypatch):
    """And the server may forget it."""
    monkeypatch.setattr(sample_watch, "LINGER", 0.005)
    entered, release = threading.Event(), threading.Event()
    server.script("retrieve_futures", blocked(entered, release, finished()))
    first = promise("r0")
    watch.watch(first)
    entered.wait(10)
    [thread] = [t for t in threading.enumerate() if t.name == "tinkex-completions"]
    first.future.cancel()
    release.set()
    thread.join(10)
    server.script("retrieve_futures", finished("r1"))
    second = promise("r1")
    watch.watch(second)
    second.future.result(10)

    assert ["r0"] == server.bodies("retrieve_futures")[-1]["retrieved_request_ids"]


def test_a_session_that_closes_fails_what_is_waited_for(server):
    with session(server) as s:
        watch = CompletionWatch(s, "sampler-0", clone=0)
        entered, release = threading.Event(), threading.Event()
        server.script("retrieve_futures", blocked(entered, release, finished()))
        first = promise("r0")
        watch.watch(first)
        entered.wait(10)
        s.close()
        release.set()

        assert isinstance(first.future.exception(10), errors.ClientClosedError)
