"""Asking "done yet?": what each answer means, how long until the next, and no dead ends."""

from __future__ import annotations

import json
import threading
import time
from collections import deque

import pytest

from tests.support.fake_server import (
    FakeServer,
    after,
    answer,
    blocked,
    garbage,
    half_protobuf,
    lost,
    metadata_only,
    not_yet_408,
    pending,
    refused,
    reset,
    status,
    timeout,
    transport,
    try_again,
)
from tinkex import errors, types, wire
from tinkex.futures import OperationFuture
from tinkex.runtime.polling import Poller, Promise

DONE = {"metrics": {"loss": 1.0}}


class World:
    """A server that has accepted operations, and a poller that waits for them on fake time."""

    def __init__(self, **options):
        self.server = FakeServer()
        self.server.always("retrieve_future", answer(DONE))
        self.transport = transport(self.server)
        self.transport.established = True
        self.clock = self.server.clock
        self.poller = Poller(self.transport, sleep=self.clock.sleep, clock=self.clock, **options)

    def polls(self, *faults):
        self.server.script("retrieve_future", *faults)

    def promise(self, operation=wire.OPTIM_STEP, request_id="r1", **options):
        future = OperationFuture(f"{operation.path} on m1")
        wait = self.transport.waits.begin(future.what, request_id)
        return Promise(request_id, operation, future, wait, **options)

    def watch(self, operation=wire.OPTIM_STEP, ordered=True, **options):
        promise = self.promise(operation, **options)
        self.poller.watch(promise, ordered=ordered)
        return promise.future

    @property
    def asked(self):
        return self.server.seen("retrieve_future")

    @property
    def slept(self):
        return self.clock.slept

    def close(self):
        self.poller.close()
        self.transport.close()


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


# What is asked.


def drain(poller, queue):
    """Wait until nothing of *queue* is in flight."""
    deadline = time.monotonic() + 10
    while poller.in_flight(queue) and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_question_is_the_protocol_s(world):
    """45 s for the answer: servers hold these for up to 40."""
    world.polls(pending())
    world.watch(wire.FORWARD_BACKWARD).exception(10)
    first, second = world.asked[:2]

    assert {"request_id": "r1", "allow_metadata_only": True} == first.body
    assert "ForwardBackward" == first.headers["X-Tinker-Request-Type"]
    assert ["0", "1"] == [s.headers["X-Tinker-Request-Iteration"] for s in (first, second)]
    assert "application/x-protobuf, application/json" == first.headers["Accept"]
    assert (5.0, 45.0) == first.timeout


def test_only_results_that_may_be_protobuf_are_asked_for_in_it(world):
    world.watch(wire.OPTIM_STEP).result(10)

    assert "application/json" == world.asked[0].headers["Accept"]


def test_asking_begins_at_once_not_when_somebody_asks_for_the_result(world):
    """Else a hundred queued operations would be fetched one by one at the end."""
    entered, release = threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release))
    world.watch()

    assert entered.wait(10)
    release.set()


# What an answer means.


@pytest.mark.parametrize(
    "result",
    [
        DONE,
        {"status": "completed", "result": DONE},
        {"type": "optim_step", **DONE},
        {**DONE, "error": None},
        {**DONE, "field_from_the_future": 5},
    ],
    ids=["bare", "wrapped", "with a type", "error: null", "unknown field"],
)
def test_a_result_is_taken_in_every_form_that_servers_give_it(world, result):
    world.polls(answer(result))

    assert types.OptimStepResponse({"loss": 1.0}) == world.watch().result(10)


def test_a_protobuf_answer_is_a_result_whatever_else(world):
    output = types.ForwardBackwardOutput(
        [{"logprobs": types.TensorData([-1.0])}], {"loss:sum": 1.0}
    )
    world.polls(garbage(wire.encode_result(output), wire.PROTOBUF))

    assert output == world.watch(wire.FORWARD_BACKWARD).result(10)


NOT_YET = {
    "try_again": try_again(),
    "try_again, paused": try_again("paused_capacity", "full"),
    "try_again, nothing more": answer({"type": "try_again"}),
    "try_again, odd": answer({"type": "try_again", "queue_state": 5, "queue_state_reason": [1]}),
    "pending": pending(),
    "408": not_yet_408(),
    "408 with a queue state": not_yet_408("paused_rate_limit", "busy"),
    "408 from a proxy": status(408, b"<html>Request Timeout</html>"),
    "408 with a list": status(408, [1, 2]),
    "429": status(429),
    "429 with Retry-After": status(429, None, retry_after=3),
    "500": status(500),
    "502": status(502, b"<html>Bad Gateway</html>"),
    "503": status(503),
    "reset": reset(),
    "answer lost": lost(),
    "timeout": timeout(),
    "refused": refused(),
    "an empty 400": status(400),
    "a 400 with {}": status(400, {}),
    "a login page": garbage(),
    "half a JSON": garbage(b'{"metrics": {', "application/json"),
    "failed for now": answer({"status": "failed", "error": "node lost", "category": "server"}),
}


@pytest.mark.parametrize("fault", NOT_YET.values(), ids=NOT_YET)
def test_statement_13_what_may_pass_is_asked_again(world, fault):
    """However the server, or a proxy before it, says "not yet". (statement 13)"""
    world.polls(fault, fault)

    assert types.OptimStepResponse({"loss": 1.0}) == world.watch().result(10)
    assert 3 == len(world.asked)


def test_statement_16_a_failure_of_the_user_s_making_is_final(world):
    """Category user fails at once: asking again cannot help. (statement 16)"""
    world.polls(answer({"error": "learning rate is too hot", "category": "user"}))

    with pytest.raises(errors.RequestFailedError) as caught:
        world.watch().result(10)
    assert (
        "optim_step on m1 failed on the server: learning rate is too hot (request r1, category "
        "user)" == str(caught.value)
    )
    assert ("r1", "user") == (caught.value.request_id, caught.value.category)
    assert 1 == len(world.asked)


@pytest.mark.parametrize(
    "body, words, category",
    [
        ({"error": "x"}, "x", "unknown"),
        ({"error": "x", "category": "SERVER"}, "x", "server"),
        ({"error": "x", "category": 5}, "x", "unknown"),
        ({"error": {"message": "x", "category": "user"}}, "x", "user"),
        ({"error": {}}, "the server gives no reason", "unknown"),
        ({"error": [1]}, "1", "unknown"),
        ({"error": ""}, "the server gives no reason", "unknown"),
        ({"status": "failed", "error": "x", "category": "user"}, "x", "user"),
    ],
)
def test_a_failure_is_told_in_the_server_s_words_whatever_its_form(world, body, words, category):
    world.polls(answer(body))

    with pytest.raises(errors.RequestFailedError, match=words) as caught:
        world.watch().result(10)
    assert category == caught.value.category


def test_statement_16_a_failed_of_the_server_s_making_is_asked_again_until_the_deadline(world):
    """This older form means that the server may still bring it off. (statement 16)"""
    world.server.always(
        "retrieve_future", answer({"status": "failed", "error": "node lost", "category": "server"})
    )
    began = world.clock()

    with pytest.raises(errors.RequestFailedError, match="node lost"):
        world.watch(deadline=began + 100).result(10)
    assert 90 <= world.clock() - began <= 101


def test_statement_14_an_expired_promise_is_terminal(world):
    """410, where nothing can send it again: submit a new one. (statement 14)"""
    world.polls(status(410, {"detail": "too old"}))

    with pytest.raises(errors.PromiseExpiredError) as caught:
        world.watch().result(10)
    assert (
        "Promise expired for request r1; submit a new request. (optim_step on m1: too old)"
        == str(caught.value)
    )
    assert 1 == len(world.asked)


def test_a_lost_promise_comes_back_under_its_number_where_it_can_be_sent_again(world):
    """A resend is idempotent: the operation is found again, or runs for the first time."""
    world.polls(status(410), pending())
    future = world.watch(resubmit=lambda: "r2")

    assert future.result(10)
    assert ["r1", "r2", "r2"] == [seen.body["request_id"] for seen in world.asked]


def test_but_not_for_ever(world):
    world.server.always("retrieve_future", status(410, {"detail": "gone"}))
    sent = []

    with pytest.raises(errors.PromiseExpiredError, match="Promise expired for request r3"):
        world.watch(resubmit=lambda: (sent.append(1), f"r{len(sent)}")[1]).result(10)
    assert 3 == len(sent)


def test_what_the_resend_raises_is_the_failure(world):
    world.polls(status(410))

    def refuse():
        raise errors.BadRequestError("no such model", status=400)

    with pytest.raises(errors.BadRequestError, match="no such model"):
        world.watch(resubmit=refuse).result(10)


def test_statement_15_three_empty_400s_are_a_glitch_a_fourth_is_an_error(world):
    """A 400 with {} comes from something between; a server that means it says why.
    (statement 15)"""
    world.polls(*[status(400, {})] * 3)
    assert world.watch().result(10)
    world.polls(*[status(400, {})] * 4)

    with pytest.raises(errors.BadRequestError):
        world.watch().result(10)
    assert 4 + 4 == len(world.asked)


def test_statement_15_a_400_with_a_sentence_is_a_failure_that_says_it(world):
    """FastAPI's {"detail": ...}, which the SDK we follow hides and repeats three times.
    (statement 15)"""
    world.polls(status(400, {"detail": "token id 99999 is not in the vocabulary"}))

    with pytest.raises(errors.RequestFailedError, match="token id 99999 is not in the vocabulary"):
        world.watch().result(10)
    assert 1 == len(world.asked)


def test_not_yet_in_between_fills_the_patience_with_400s_again(world):
    world.polls(*[status(400, {})] * 3, not_yet_408(), *[status(400, {})] * 3)

    assert world.watch().result(10)


@pytest.mark.parametrize(
    "fault, kind",
    [
        (garbage(), errors.APIResponseValidationError),
        (answer([1, 2]), errors.APIResponseValidationError),
        (answer({"metrics": "high"}), errors.APIResponseValidationError),
        (garbage(b"\xff\x01", wire.PROTOBUF), errors.APIResponseValidationError),
        (metadata_only(10), errors.APIResponseValidationError),
    ],
    ids=["login page", "a list", "wrong type", "no protobuf", "size, time after time"],
)
def test_an_answer_that_makes_no_sense_is_asked_for_again_but_not_for_ever(world, fault, kind):
    """A cut connection may explain one; four in a row are the server's."""
    world.server.always("retrieve_future", fault)

    with pytest.raises(kind):
        world.watch(wire.FORWARD_BACKWARD).result(10)
    assert len(world.asked) in (4, 5)


def test_half_a_protobuf_is_asked_for_again():
    server = FakeServer()
    way = transport(server)
    poller = Poller(way, sleep=server.clock.sleep, clock=server.clock)
    batch = types.ForwardBackwardRequest(
        "m",
        1,
        [types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})],
        "cross_entropy",
    )
    sent = way.send(
        "POST",
        way.url("forward_backward"),
        wire.encode_request(batch, protobuf=True)[3],
        headers={"Content-Type": wire.PROTOBUF},
        parse=lambda reply: reply.json(),
    )
    server.script("retrieve_future", half_protobuf(), half_protobuf())
    future = OperationFuture("forward_backward")
    wait = way.waits.begin("forward_backward")
    poller.watch(Promise(sent["request_id"], wire.FORWARD_BACKWARD, future, wait))

    assert 1 == len(future.result(10).loss_fn_outputs)
    poller.close()
    way.close()


FINAL = {
    401: errors.AuthenticationError,
    402: errors.BillingError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    409: errors.ConflictError,
    422: errors.UnprocessableEntityError,
}


@pytest.mark.parametrize("code, kind", FINAL.items())
def test_the_other_statuses_are_final_and_typed(world, code, kind):
    """Not ValueErrors with the real one hidden in __cause__."""
    world.server.always("retrieve_future", status(code, {"detail": "this is why"}))

    with pytest.raises(kind, match="this is why"):
        world.watch().result(10)
    assert 1 == len(world.asked)


# How long until the next question.


def test_after_a_long_poll_the_next_one_follows_at_once(world):
    """The server has done the waiting."""
    world.polls(after(40, not_yet_408()), after(40, try_again()), after(40, pending()))
    world.watch().result(10)

    assert [40, 40, 40, 0] == [*world.slept, 0]


def test_statement_11_after_short_answers_the_pauses_start_small_grow_and_have_jitter(world):
    """No hot loop, whatever the server does; and no 30 s for an operation that takes two.
    (statement 11)"""
    world.polls(*[pending()] * 12)
    world.watch().result(10)
    steps = [min(0.02 * 2**i, 2.0) for i in range(12)]

    assert all(0.75 * s <= slept <= s for s, slept in zip(steps, world.slept))
    assert len(set(world.slept)) == 12


@pytest.mark.parametrize("fault", [status(503), status(408), status(500), status(429), reset()])
def test_a_server_that_fails_at_once_is_not_asked_in_a_hot_loop(world, fault):
    """Hundreds of requests in 100 ms, in the SDK we follow, to a server that is down already."""
    world.polls(*[fault] * 20)
    world.watch().result(10)

    assert 20 == len(world.slept)
    assert sum(world.slept) > 15
    assert max(world.slept) <= 10


def test_the_pauses_start_small_again_after_progress(world):
    """Theirs stay at 30 s for the rest of a long wait."""
    world.polls(*[status(503)] * 10, after(40, not_yet_408()), status(503))
    world.watch().result(10)

    assert world.slept[-1] <= 0.1


def test_the_pauses_start_small_again_when_the_queue_moves(world):
    world.polls(*[pending()] * 8, try_again("paused_capacity"), try_again("active"))
    world.watch().result(10)

    assert world.slept[-1] <= 0.02


def test_statement_12_a_paused_queue_is_asked_once_a_second(world):
    """It moves in seconds, not in milliseconds. (statement 12)"""
    world.polls(*[try_again("paused_rate_limit")] * 3, *[try_again("paused_capacity")] * 3)
    world.watch().result(10)

    assert all(0.75 <= slept <= 1.0 for slept in world.slept)


def test_statement_12_the_server_s_wish_is_followed(world):
    """retry_after_ms in a body, Retry-After in a header. (statement 12)"""
    world.polls(try_again(retry_after_ms=250), status(429, None, retry_after=7))
    world.watch().result(10)

    assert [0.25, 7.0] == world.slept


@pytest.mark.parametrize("wish", [0, -5, "soon", True, None, 1e12])
def test_a_wish_that_makes_no_sense_is_no_hot_loop_and_no_sleep_of_years(world, wish):
    world.polls(try_again(retry_after_ms=wish))
    world.watch().result(10)

    assert 0.01 < world.slept[0] <= 300


def test_no_pause_goes_beyond_the_deadline(world):
    """A sleep of 30 s for a timeout of 5 is no timeout."""
    world.server.always("retrieve_future", status(429, None, retry_after=60))
    began = world.clock()

    with pytest.raises(errors.RateLimitError):
        world.watch(deadline=began + 5).result(10)
    assert 5.0 == world.clock() - began


def test_a_long_poll_is_not_longer_than_the_deadline(world):
    world.server.always("retrieve_future", timeout())
    began = world.clock()

    with pytest.raises(errors.APITimeoutError):
        world.watch(deadline=began + 60).result(10)
    assert 60.0 <= world.clock() - began <= 60.1


def test_statement_13_past_the_deadline_the_last_error_is_raised(world):
    """What went wrong is worth more than that time ran out. (statement 13)"""
    world.server.always("retrieve_future", status(503, {"message": "down"}))

    with pytest.raises(errors.InternalServerError, match="down"):
        world.watch(deadline=world.clock() + 5).result(10)


def test_statement_13_without_an_error_the_deadline_is_a_timeout_that_says_what_was_awaited(world):
    """The operation, its handle and the queue's state, and what to do. (statement 13)"""
    world.server.always("retrieve_future", after(30, try_again("paused_capacity")))

    with pytest.raises(TimeoutError) as caught:
        world.watch(deadline=world.clock() + 50).result(10)
    assert isinstance(caught.value, errors.APITimeoutError)
    assert (
        "Timed out while polling future r1 of optim_step on m1 (queue state paused_capacity). It "
        "may still run there; give a longer poll_timeout." == str(caught.value)
    )


def test_without_a_deadline_not_yet_is_waited_for_as_long_as_it_takes(world):
    """A queue of an hour is no error."""
    world.polls(*[after(40, try_again("paused_capacity"))] * 100)

    assert world.watch().result(10)


def test_five_minutes_of_trouble_are_survived(world):
    trouble = deque([status(503), status(429, None, retry_after=5), reset(), timeout(), refused()])
    end = world.clock() + 300

    def weather(server, request, limits, behave):
        if server.clock() >= end:
            return answer(DONE)(server, request, limits, behave)
        trouble.rotate(1)
        return trouble[0](server, request, limits, behave)

    world.server.always("retrieve_future", weather)

    assert world.watch().result(10)


def test_a_server_that_stays_away_is_given_up_after_ten_minutes(world):
    world.server.always("retrieve_future", status(503, {"message": "down for good"}))
    began = world.clock()

    with pytest.raises(errors.InternalServerError, match="down for good"):
        world.watch().result(10)
    assert 580 <= world.clock() - began <= 601


# The queue's state.


def observed(world, *faults, **options):
    told = []
    world.polls(*faults)
    world.watch(on_queue_state=lambda *state: told.append(state), **options).result(10)
    return told


def test_an_observer_is_told_of_each_change_once(world):
    told = observed(
        world,
        try_again("paused_capacity", "full"),
        try_again("paused_capacity", "full"),
        not_yet_408("paused_capacity", "fuller"),
        status(429, {"queue_state": "paused_rate_limit"}),
        try_again("active"),
    )

    assert [
        ("paused_capacity", "full"),
        ("paused_capacity", "fuller"),
        ("paused_rate_limit", None),
        ("active", None),
    ] == told


def test_odd_states_are_passed_on_as_text(world):
    assert [("paused_capacity", None), ("5", None)] == observed(
        world, try_again(" PAUSED_Capacity "), try_again(5)
    )


def test_statement_31_an_observer_that_raises_is_logged_and_polling_goes_on(world, caplog):
    """It is the user's code, on our thread. (statement 31)"""

    def broken(state, reason):
        raise RuntimeError("in my observer")

    world.polls(try_again("paused_capacity"))

    assert world.watch(on_queue_state=broken).result(10)
    assert "in my observer" in caplog.text


def test_a_wait_is_reported_with_queue_state_and_retries(world):
    lines = []

    def look(server, request, limits, behave):
        lines.append(world.transport.waits.report())
        return answer(DONE)(server, request, limits, behave)

    world.polls(try_again("paused_capacity", "full"), status(503), after(12, look))
    world.watch().result(10)

    [line] = [line for line in lines if line]
    assert "for optim_step on m1 r1 (queue state paused_capacity: full; 1 retries, the last" in line


# Large results.


def wants_all(request):
    return not json.loads(request.body)["allow_metadata_only"]


def test_statement_17_a_large_result_is_asked_for_a_second_time_in_full(world):
    """First its size, then, when there is room for it, all of it; without a pause.
    (statement 17)"""
    world.polls(metadata_only(1000))
    world.watch().result(10)

    assert [True, False] == [seen.body["allow_metadata_only"] for seen in world.asked]
    assert [] == world.slept


@pytest.mark.parametrize("size", [None, -1, "big", 0])
def test_a_size_that_makes_no_sense_is_none(world, size):
    world.polls(metadata_only(size))

    assert world.watch().result(10)


def test_no_more_bytes_are_under_way_than_the_server_allows():
    """Each holds its size from the announcement to the end."""
    world = World(max_response_bytes=100)
    world.server.always("retrieve_future", None)
    under_way, most, lock = [0], [0], threading.Lock()

    def behaves(server, request, limits, behave):
        full = wants_all(request)
        if not full:
            return metadata_only(60)(server, request, limits, behave)
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        reply = answer(DONE)(server, request, limits, behave)
        with lock:
            under_way[0] -= 1
        return reply

    world.server.always("retrieve_future", behaves)
    futures = [world.watch(request_id=f"r{i}", queue=f"l{i}") for i in range(20)]
    for future in futures:
        future.result(20)

    assert 1 == most[0]
    world.close()


def test_one_that_holds_bytes_is_never_kept_waiting_by_those_who_wait_for_them():
    """With one thread: the second would wait for bytes, the first, holding them, for a thread."""
    world = World(max_response_bytes=100, max_workers=1)

    def behaves(server, request, limits, behave):
        full = wants_all(request)
        fault = answer(DONE) if full else metadata_only(60)
        return fault(server, request, limits, behave)

    world.server.always("retrieve_future", behaves)
    futures = [world.watch(request_id=f"r{i}", ordered=False) for i in range(5)]

    assert all(future.result(20) for future in futures)
    world.close()


def test_waiting_for_bytes_ends_with_the_deadline_and_with_the_session():
    """Those that hold them may never give them back: a server that sends and sends."""
    world = World(max_response_bytes=100)
    entered, released = threading.Event(), threading.Event()

    def behaves(server, request, limits, behave):
        if not wants_all(request):
            return metadata_only(100)(server, request, limits, behave)
        return blocked(entered, released, answer(DONE))(server, request, limits, behave)

    world.server.always("retrieve_future", behaves)
    holder = world.watch(request_id="r0", queue="a")
    assert entered.wait(10)
    late = world.watch(request_id="r1", queue="b", deadline=world.clock.now + 5)
    patient = world.watch(request_id="r2", queue="c")
    world.clock.sleep(10)

    assert isinstance(late.exception(20), TimeoutError)
    world.poller.close()
    assert isinstance(patient.exception(20), errors.ClientClosedError)
    released.set()
    assert isinstance(holder.exception(20), errors.ClientClosedError)
    world.close()


def test_bytes_come_back_from_a_promise_that_is_lost_or_fails():
    """Else a few of those, and no large result ever arrives again."""
    world = World(max_response_bytes=100)
    world.polls(metadata_only(100), status(410), metadata_only(100))
    assert world.watch(resubmit=lambda: "r2").result(10)
    world.polls(metadata_only(100), answer({"error": "x", "category": "user"}))
    assert world.watch().exception(10)
    world.polls(metadata_only(100))

    assert world.watch().result(10)
    world.close()


# Many at once.


def test_a_slow_operation_never_holds_back_a_finished_one(world):
    """Samples: in no order, each as soon as it is done."""
    entered, release = threading.Event(), threading.Event()

    def behaves(server, request, limits, behave):
        if b'"slow"' in request.body:
            return blocked(entered, release, answer(DONE))(server, request, limits, behave)
        return answer(DONE)(server, request, limits, behave)

    world.server.always("retrieve_future", behaves)
    slow = world.watch(request_id="slow", ordered=False)
    quick = [world.watch(request_id=f"r{i}", ordered=False) for i in range(50)]

    assert all(future.result(10) for future in quick)
    assert not slow.done()
    release.set()
    assert slow.result(10)


def test_of_many_samples_a_few_are_asked_for_at_once_and_the_others_a_moment_later(world):
    """The connections of 200 polls would delay the submits of the samples still to come."""
    moment, slept, entered, release = threading.Event(), [], threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release, answer(DONE)))
    poller = Poller(
        world.transport,
        sleep=lambda seconds: slept.append(seconds) or moment.wait(10),
        clock=world.clock,
    )
    promises = [world.promise(request_id=f"r{i}") for i in range(50)]
    for promise in promises:
        poller.watch(promise, ordered=False)
    deadline = time.monotonic() + 10
    while (len(world.asked) < 4 or not slept) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert (4, [0.05]) == (len(world.asked), slept)
    moment.set()
    while len(world.asked) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 50 == len(world.asked)
    release.set()
    assert all(promise.future.result(10) for promise in promises)
    poller.close()


def test_while_more_samples_come_the_others_wait_but_not_for_long(world):
    looks, entered, release = [], threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release, answer(DONE)))

    def another_comes(seconds):
        looks.append(seconds)
        watch(f"late{len(looks)}")

    poller = Poller(world.transport, sleep=another_comes, clock=world.clock)
    promises = []

    def watch(request_id):
        promises.append(world.promise(request_id=request_id))
        poller.watch(promises[-1], ordered=False)

    for i in range(10):
        watch(f"r{i}")
    deadline = time.monotonic() + 10
    while len(world.asked) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)

    assert [0.05] * 5 == looks[:5]
    release.set()
    assert all(promise.future.result(10) for promise in promises)
    poller.close()


def test_of_an_ordered_lane_only_the_oldest_few_are_asked_for(world):
    """They finish in order: a thousand queued steps need no thousand long polls."""
    entered, release = threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release))
    for i in range(50):
        world.watch(request_id=f"r{i}", queue="m1")
    entered.wait(10)

    assert 4 >= len(world.asked)
    assert 50 == world.poller.in_flight("m1")
    release.set()


def test_lanes_do_not_hold_each_other_back(world):
    entered, release = threading.Event(), threading.Event()
    world.polls(*[blocked(entered, release)] * 4)
    for i in range(10):
        world.watch(request_id=f"r{i}", queue="m1")
    entered.wait(10)
    while len(world.asked) < 4:  # until all four of the first queue are asked
        threading.Event().wait(0.001)

    assert world.watch(request_id="other", queue="m2").result(10)
    release.set()


def test_draining_waits_for_what_is_in_flight(world):
    world.polls(*[pending()] * 5)
    futures = [world.watch(request_id=f"r{i}", queue="m1") for i in range(10)]
    drain(world.poller, "m1")

    assert all(future.done() for future in futures)


# Endings.


@pytest.mark.parametrize("problem", [ValueError("x"), KeyError("x"), MemoryError()], ids=repr)
@pytest.mark.parametrize("where", ["poller", "decoder"])
def test_statement_31_whatever_is_raised_on_the_way_ends_in_the_future(
    world, monkeypatch, problem, where
):
    """Nothing hangs: an unforeseen exception fails its operation alone. (statement 31)"""

    def broken(*args, **options):
        raise problem

    if where == "poller":
        monkeypatch.setattr(world.transport, "send", broken)
    else:
        monkeypatch.setattr("tinkex.runtime.transport.wire.from_json", broken)
    world.polls(answer(DONE))
    found = world.watch().exception(10)

    assert problem is found or problem is found.__cause__


def test_statement_31_a_callback_that_raises_costs_no_thread(world, caplog):
    """More broken callbacks than threads, and the last one resolves. (statement 31)"""
    futures = [world.promise(request_id=f"r{i}") for i in range(20)]
    for promise in futures:
        promise.future.add_done_callback(lambda _: 1 / 0)
        world.poller.watch(promise)

    assert all(promise.future.result(10) for promise in futures)


def test_closing_fails_what_is_not_done(world):
    entered, release = threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release))
    future = world.watch()
    queued = [world.watch(request_id=f"r{i}") for i in range(20)]
    entered.wait(10)
    world.poller.close()

    with pytest.raises(errors.ClientClosedError, match="optim_step on m1 r1 was not done when its"):
        future.result(timeout=0)
    assert all(f.done() for f in queued)
    release.set()


def test_after_closing_nothing_is_asked(world):
    world.poller.close()
    world.poller.close()
    future = world.watch()

    with pytest.raises(errors.ClientClosedError):
        future.result(timeout=0)
    assert [] == world.asked


def test_one_lane_can_be_abandoned(world):
    """A sampling client that is closed takes only its own samples with it."""
    entered, release = threading.Event(), threading.Event()
    world.server.always("retrieve_future", blocked(entered, release, answer(DONE)))
    mine, other = world.watch(queue="a"), world.watch(queue="b")
    entered.wait(10)
    world.poller.abandon("a", errors.ClientClosedError("closed"))

    assert isinstance(mine.exception(0), errors.ClientClosedError)
    assert not other.done()
    release.set()
    assert other.result(10)


def test_what_was_resolved_by_somebody_else_is_asked_for_no_more(world):
    entered, release = threading.Event(), threading.Event()
    world.polls(blocked(entered, release))
    world.server.always("retrieve_future", None)
    promise = world.promise()
    world.poller.watch(promise)
    entered.wait(10)
    promise.future.set_result("mine")
    release.set()
    drain(world.poller, "")

    assert "mine" == promise.future.result()
