"""What the clients of one server session share: features, numbers, and the end."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import closing

import pytest

from tests.support.fake_server import (
    FakeServer,
    answer,
    as_usual,
    blocked,
    datum,
    garbage,
    lost,
    refused,
    reset,
    session,
    settings,
    status,
    timeout,
    training,
    transport,
    try_again,
)
from tinkex import errors, types, wire
from tinkex.config import PROTOCOL_VERSION
from tinkex.futures import OperationFuture
from tinkex.runtime import embedded
from tinkex.runtime.connection import Connection, connect
from tinkex.runtime.session import Numbers, Session
from tinkex.runtime.worker import OrderedWorker


@pytest.fixture
def server():
    return FakeServer()


# Beginning.


def test_a_session_begins_with_the_protocol_s_handshake(server):
    with session(server, tags=("mine",), project_id="p1"):
        pass
    config, create, finish = server.requests

    assert {"sdk_version": PROTOCOL_VERSION} == config.body
    assert {
        "tags": ["mine"],
        "user_metadata": {},
        "sdk_version": PROTOCOL_VERSION,
        "project_id": "p1",
        "type": "create_session",
    } == create.body
    assert "sessions/s0/finish" == finish.path


def test_the_sdk_version_is_one_that_servers_know():
    """Ours would be refused: servers gate features by the official SDK's."""
    assert "0.38.0" == PROTOCOL_VERSION


def test_the_server_s_flags_are_taken_and_unknown_ones_ignored():
    server = FakeServer(features={"fwdbwd_max_chunk_len": 7, "from_the_future": {"a": 1}})
    with session(server) as s:
        assert 7 == s.features.fwdbwd_max_chunk_len
        assert 5_000_000 == s.features.fwdbwd_max_chunk_bytes_count


@pytest.mark.parametrize("fault", [status(404), status(404, {"detail": "Not Found"}), status(422)])
def test_a_server_without_client_config_has_the_protocol_s_defaults(server, fault):
    """Older and open servers have none."""
    server.always("client/config", fault)
    with session(server) as s:
        assert types.ClientConfig() == s.features


def test_the_server_s_messages_are_logged_at_their_level(server, caplog):
    caplog.set_level(logging.INFO)
    server.script(
        "create_session",
        answer(
            {
                "session_id": "s0",
                "info_message": "welcome",
                "warning_message": "this version ends in May",
                "error_message": "no credit left",
            }
        ),
    )
    with session(server):
        pass

    said = [r for r in caplog.records if "the server says" in r.getMessage()]
    assert [
        ("INFO", "the server says: welcome"),
        ("WARNING", "the server says: this version ends in May"),
        ("ERROR", "the server says: no credit left"),
    ] == [(r.levelname, r.getMessage()) for r in said]


def test_an_existing_session_is_joined_and_left_as_it_is(server):
    with closing(Session(settings(), session_id="s9", transport=transport(server))) as s:
        assert "s9" == s.session_id

    assert ["client/config"] == [seen.path for seen in server.requests]


class FakeEngine:
    base_url, api_key, is_running = "http://training.test", "tml-engine", True
    died = None

    def __init__(self):
        self.closed = 0

    def close(self, timeout):
        self.closed += 1

    def obituary(self):
        return self.died


@pytest.fixture
def engine(monkeypatch):
    made = FakeEngine()
    monkeypatch.setattr(embedded.EmbeddedEngine, "start", lambda: made)
    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        monkeypatch.delenv(name)
    return made


@pytest.mark.parametrize("path", ["client/config", "create_session"])
def test_a_session_that_cannot_begin_leaves_no_engine_behind(server, engine, path):
    """Else every failed attempt would leave a child process of a gigabyte."""
    config, started = connect()
    server.always(path, status(401, {"detail": "no"}))

    with pytest.raises(errors.AuthenticationError):
        Session(config, transport=transport(server), engine=started)
    assert 1 == engine.closed


def test_bad_settings_leave_no_engine_behind(engine, monkeypatch):
    engine.base_url = "ftp://nowhere"

    with pytest.raises(ValueError, match="is not a URL of a server"):
        connect()
    assert 1 == engine.closed


def test_the_engine_ends_with_the_last_session_that_uses_it(server, engine):
    (config, first), (_, second) = connect(), connect()
    assert first is second
    one = Session(config, transport=transport(server), engine=first)
    two = Session(config, transport=transport(server), engine=second)
    one.close()
    assert 0 == engine.closed
    two.close()

    assert 1 == engine.closed


def test_an_engine_that_has_died_is_told_at_once(server, engine):
    """Nothing will ever answer on that port: ten minutes of patience would be ten minutes lost."""
    config, started = connect()
    with closing(Session(config, transport=transport(server), engine=started)) as s:
        waiting = operation(s)
        waiting.result(10)
        engine.died = "the embedded engine has died (status -9)."
        for path in ("get_server_capabilities", "retrieve_future", "optim_step"):
            server.always(path, refused())
        with pytest.raises(errors.EngineError, match=r"has died \(status -9\)"):
            s.call(wire.CAPABILITIES)
        with pytest.raises(errors.EngineError, match=r"has died \(status -9\)"):
            operation(s)
        server.always("optim_step", None)
        with pytest.raises(errors.EngineError, match=r"has died \(status -9\)"):
            operation(s).result(10)


# Numbers.


def test_numbers_are_contiguous_from_0_and_a_refused_one_is_given_again():
    numbers = Numbers()
    with pytest.raises(ValueError), numbers.lent() as outer:
        with numbers.lent() as inner:
            assert (0, 1, 2) == (outer, inner, numbers.take())
        with pytest.raises(ValueError), numbers.lent() as refused:
            assert 3 == refused
            raise ValueError
        raise ValueError

    assert [0, 3, 4] == [numbers.take() for _ in range(3)]


def test_a_number_that_the_server_may_have_seen_is_not_given_again():
    """Under it the server may have made something else already."""
    numbers = Numbers()
    lost = errors.APIConnectionError("no answer")
    lost.outcome_unknown = True
    with pytest.raises(errors.APIConnectionError), numbers.lent():
        raise lost

    assert 1 == numbers.take()


# Sending.


def operation(s, path=wire.OPTIM_STEP, **options):
    """An optimizer step, sent."""
    future = OperationFuture(f"{path.path} on m1")
    request = types.OptimStepRequest("m1", 1)
    s.start(path, lambda wait: s.post(path, request, wait), future, queue="m1", **options)
    return future


def test_a_promise_is_waited_for(server):
    with session(server) as s:
        assert types.OptimStepResponse({}) == operation(s).result(10)


def test_statement_21_an_immediate_answer_is_a_result_too():
    """Some servers answer small operations at once. (statement 21)"""
    with session(FakeServer(immediate={"optim_step"})) as s:
        assert types.OptimStepResponse({}) == operation(s).result(0)


def test_a_request_id_may_be_a_number(server):
    server.script("optim_step", answer({"request_id": 17}))
    server.script("retrieve_future", answer({"metrics": {"a": 1}}))
    with session(server) as s:
        assert {"a": 1.0} == operation(s).result(10).metrics
    assert "17" == server.bodies("retrieve_future")[0]["request_id"]


def test_statement_8_an_answer_with_neither_promise_nor_result_is_a_clear_error(server):
    """The endpoint, and what was missing. (statement 8)"""
    server.always("optim_step", answer({}))
    with (
        session(server) as s,
        pytest.raises(errors.APIResponseValidationError, match="optim_step") as caught,
    ):
        operation(s)

    assert "neither a request_id nor a result" in str(caught.value)


def test_a_queue_state_in_a_refusal_is_told_to_the_observer(server):
    """From 429 (and 503) bodies, as from polls."""
    told = []
    refusal = {
        "message": "busy",
        "queue_state": "paused_rate_limit",
        "queue_state_reason": "3 of 3",
    }
    server.script("optim_step", status(429, refusal), status(503, {"message": "no state"}))
    with session(server) as s:
        operation(s, on_queue_state=lambda *state: told.append(state)).result(10)

    assert [("paused_rate_limit", "3 of 3")] == told


def test_an_observer_that_raises_in_a_refusal_changes_nothing(server, caplog):
    server.script("optim_step", status(429, {"queue_state": "paused_capacity"}))
    with session(server) as s:
        assert operation(s, on_queue_state=lambda *state: 1 / 0).result(10)

    assert "a queue state observer raised" in caplog.text


def test_a_poll_timeout_begins_when_the_operation_was_accepted(server):
    server.always("retrieve_future", try_again())
    with session(server) as s:
        future = operation(s, poll_timeout=30)
        with pytest.raises(errors.APITimeoutError, match="give a longer poll_timeout"):
            future.result(10)


# Dialects.


def batch(s, *, forward_only=False, seq_id=1):
    future = OperationFuture("forward_backward on m1")
    request = types.ForwardBackwardRequest(
        "m1", seq_id, [datum()], "cross_entropy", forward_only=forward_only
    )
    s.start(wire.FORWARD_BACKWARD, lambda wait: s.post_batch(request, wait), future, queue="m1")
    return future.result(10)


def content_types(server):
    return [seen.headers["Content-Type"] for seen in server.seen("forward_backward", "forward")]


def test_a_server_that_takes_protobuf_gets_it(server):
    with session(server) as s:
        batch(s)
        batch(s, seq_id=2, forward_only=True)

    assert [wire.PROTOBUF] * 2 == content_types(server)
    assert ["forward_backward"] * 2 == [
        seen.path for seen in server.seen("forward_backward", "forward")
    ]


def test_a_server_that_does_not_is_found_out_with_one_request():
    server = FakeServer(protobuf=False)
    with session(server) as s:
        batch(s)
        batch(s, seq_id=2, forward_only=True)

    assert [wire.PROTOBUF, wire.JSON, wire.JSON] == content_types(server)
    assert "forward" == server.seen("forward_backward", "forward")[-1].path


@pytest.mark.parametrize("said, sent", [(True, wire.PROTOBUF), (False, wire.JSON)])
def test_a_server_that_says_so_itself_is_believed(said, sent):
    server = FakeServer(features={"proto_write_fwdbwd": said})
    with session(server) as s:
        batch(s)

    assert [sent] == content_types(server)


@pytest.mark.parametrize("code", [400, 415, 422, 500])
def test_every_way_to_fall_over_protobuf_means_json(server, code):
    server.script("forward_backward", status(code, b"what is this?"))
    with session(server) as s:
        batch(s)

    assert [wire.PROTOBUF, wire.JSON] == content_types(server)


def test_a_batch_that_both_dialects_refuse_proves_nothing_about_the_server(server):
    """It is the batch that is wrong; the next one may travel as protobuf."""
    server.script("forward_backward", *[status(422, {"detail": "bad token"})] * 2)
    with session(server) as s:
        with pytest.raises(errors.UnprocessableEntityError, match="bad token"):
            batch(s)
        batch(s)

    assert [wire.PROTOBUF, wire.JSON, wire.PROTOBUF] == content_types(server)


@pytest.mark.parametrize(
    "fault",
    [
        status(503),
        status(429, None, retry_after=2),
        reset(),
        lost(),
        timeout(),
        refused(),
        garbage(),
    ],
    ids=["503", "429", "reset", "lost", "timeout", "refused", "garbage"],
)
def test_trouble_with_the_first_batch_proves_nothing_either(server, fault):
    """While the dialect is being found out, everything else is tried again as always."""
    server.script("forward_backward", fault, fault)
    with session(server) as s:
        batch(s)

    assert [wire.PROTOBUF] * 3 == content_types(server)


def test_a_resend_that_is_answered_without_a_promise_is_a_clear_error(server):
    """The number is used, so it cannot be sent once more under another."""
    with training(server) as client:
        server.script("retrieve_future", status(410))
        server.script("optim_step", as_usual(), answer({"metrics": {}}))
        exc = client.optim_step(types.AdamParams()).exception(10)

    assert isinstance(exc, errors.APIResponseValidationError)
    assert "a resend was answered without a request_id" in str(exc)


# Lookups.


def test_an_endpoint_that_the_server_lacks_is_named(server):
    server.lacks.add("get_info")
    with (
        session(server) as s,
        pytest.raises(errors.NotOfferedError, match="this server does not offer get_info"),
    ):
        s.call(wire.GET_INFO, types.GetInfoRequest("m1"))


def test_a_thing_that_is_not_there_is_told_from_an_endpoint_that_is_not(server):
    server.script("get_info", status(404, {"detail": "no model m1"}))
    with session(server) as s, pytest.raises(errors.NotFoundError, match="no model m1") as caught:
        s.call(wire.GET_INFO, types.GetInfoRequest("m1"))

    assert not isinstance(caught.value, errors.NotOfferedError)


# In the background.


def test_background_work_returns_a_future(server):
    with session(server) as s:
        assert 3 == s.in_background(lambda: 3, "x").result(10)
        with pytest.raises(ZeroDivisionError):
            s.in_background(lambda: 1 / 0, "x").result(10)


def test_background_work_that_never_began_is_told(server):
    entered, release = threading.Event(), threading.Event()
    with session(server) as s:
        running = [
            s.in_background(lambda: (entered.set(), release.wait(10)), f"x{i}") for i in range(16)
        ]
        entered.wait(10)
        behind = [s.in_background(lambda: 1, f"behind {i}") for i in range(50)]
    release.set()

    with pytest.raises(errors.ClientClosedError, match="behind 49 was not begun: the session was"):
        behind[49].result(10)
    assert all(f.exception(10) is None for f in running if not f.exception(10))


# The end.


def test_closing_is_idempotent_and_told_to_the_server_once(server):
    with session(server) as s:
        s.close("errored", "out of memory")
        s.close()
        s.close("interrupted")

    [finish] = server.seen("sessions/s0/finish")
    assert {"reason": {"type": "errored"}, "detail": "out of memory"} == finish.body


def test_a_server_that_does_not_know_finish_is_no_trouble(server):
    server.always("sessions/s0/finish", status(404))
    with session(server):
        pass


def test_closing_never_takes_longer_than_its_timeout(server):
    """Leaving a with block while the server is down must not block for minutes."""
    entered, release = threading.Event(), threading.Event()
    server.always("sessions/s0/finish", blocked(entered, release))
    with session(server) as s:
        closer = threading.Thread(target=s.close, kwargs={"timeout": 0.05})
        closer.start()
        closer.join(5)
        assert not closer.is_alive()
    release.set()


def test_what_is_in_flight_when_the_session_closes_fails(server):
    server.always("retrieve_future", blocked(threading.Event(), release := threading.Event()))
    with session(server) as s:
        future = operation(s)
    release.set()

    with pytest.raises(errors.ClientClosedError, match="was not done when its session closed"):
        future.result(10)


def test_after_closing_nothing_is_sent(server):
    with session(server) as s:
        s.close()
        count = len(server.requests)

        for call in (
            lambda: operation(s),
            lambda: s.call(wire.CAPABILITIES),
            lambda: s.in_background(lambda: 1, "x"),
        ):
            with pytest.raises(errors.ClientClosedError, match="Make a new ServiceClient"):
                call()
    assert count == len(server.requests)


def test_the_workers_of_its_clients_end_with_it(server):
    with session(server) as s:
        worker = OrderedWorker("tinkex-its-worker")
        s.dependents.add(worker)
        worker.put(lambda turn, future: future.set_result(1), "x").result(10)
        thread = next(t for t in threading.enumerate() if t.name == "tinkex-its-worker")
    thread.join(10)

    assert not thread.is_alive()


def test_in_a_forked_child_it_says_that_it_must_be_made_anew(server, monkeypatch):
    """Its threads are not there: a call would wait for ever."""
    with session(server) as s:
        parent = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: parent + 1)

        with pytest.raises(errors.ClientClosedError, match=r"is a fork.*Create a new client here"):
            s.call(wire.CAPABILITIES)
        s.close()
    assert [] == server.seen("sessions/s0/finish")


def test_a_connection_alone_creates_no_session(server):
    with closing(Connection(settings(), transport=transport(server))) as c:
        assert ["tiny"] == c.call(wire.CAPABILITIES).model_names

    assert ["client/config", "get_server_capabilities"] == [s.path for s in server.requests]
