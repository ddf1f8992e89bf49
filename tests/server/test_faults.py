"""Faults of the machine and of clients: full disks, a single dialect, random input."""

from __future__ import annotations

import errno
import json
import sqlite3
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import Served
from tests.server.test_bad_requests import GOOD, MODEL, SAMPLER, SESSION
from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import batch
from tinkex import wire


class FullDisk(FakeEngine):
    """Saving fails while `full`, with half of the files written."""

    full = True

    def save(self, model_id, directory, *, optimizer):
        if self.full:
            (directory / "half").write_bytes(b"x" * 100)
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / "half"))
        super().save(model_id, directory, optimizer=optimizer)


def test_a_full_disk_fails_the_save_and_corrupts_nothing(serve, tmp_path, caplog):
    """The model continues, and the same name can be saved once there is space."""
    served = serve(engine=FullDisk())
    client = served.client
    model = client.model()
    named = client.result(client.save(model, 1, "x"))
    unnamed_body = {"model_id": model, "sampling_session_seq_id": 0}
    unnamed = client.result(client.post("save_weights_for_sampler", {**unnamed_body, "seq_id": 2}))
    left = list((tmp_path / "home").rglob("half"))
    served.engine.full = False
    again = client.result(client.save(model, 3, "x"))
    sampler = client.result(client.post("save_weights_for_sampler", {**unnamed_body, "seq_id": 4}))

    assert "server" == named["category"] == unnamed["category"]
    assert "No space left on device" in named["error"]
    assert [] == left
    assert f"tinker://{model}/weights/x" == again["path"]
    assert "sampling_session_id" in sampler


def test_what_the_journal_cannot_take_is_not_accepted(serve, caplog):
    """No promise is made that a restart would break; the number stays free."""
    from tests.support.processes import free_port

    served = serve(port=free_port())
    client = served.client
    model = client.model()
    journal = served.server.ledger.entries._journal
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages + 1}")
    request = batch(model, 1, list(range(5000)))
    path, kind, _, body = wire.encode_request(request, protobuf=False)
    refused = client.http.post(client.url + path, data=body, headers={"Content-Type": kind})
    journal._db.execute("PRAGMA max_page_count=1000000")
    other = client.result(client.optim_step(model, 1))

    assert 503 == refused.status_code
    assert "cannot write its journal" in refused.json()["error"]
    assert "server" == refused.json()["category"]
    assert "metrics" in other
    assert isinstance(journal._db, sqlite3.Connection)


def test_an_engine_that_cannot_start_is_told_to_who_asks(serve, caplog):
    """Waiting and new requests get the reason at once."""

    gate = threading.Event()

    def engine():
        gate.wait(5)
        raise ImportError("No module named 'torch'")

    served = serve(make_engine=engine, limits={"poll_seconds": 20.0})
    client = served.client
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    waiting = client.post("create_model", body)
    threading.Timer(0.2, gate.set).start()
    answers = [
        client.send("POST", "retrieve_future", waiting),
        client.send("POST", "create_model", {**body, "model_seq_id": 1}),
        client.send("GET", "healthz"),
    ]

    assert [503, 503, 503] == [answer.status_code for answer in answers]
    assert all("No module named 'torch'" in answer.json()["error"] for answer in answers)


def test_a_server_of_json_alone_takes_and_gives_json_alone(serve):
    """Like older servers; clients detect it by the 415."""
    served = serve(dialect="json")
    client = served.client
    model = client.model()
    request = batch(model, 1, [1, 2])
    path, kind, _, body = wire.encode_request(request, protobuf=True)
    answer = client.http.post(client.url + path, data=body, headers={"Content-Type": kind})
    path, kind, _, body = wire.encode_request(request, protobuf=False)
    promise = client.send_batch(path, kind, body)
    result = client.send(
        "POST", "retrieve_future", promise, headers={"Accept": "application/x-protobuf"}
    )
    flags = client.post("client/config", {"sdk_version": "0.38.0"})

    assert 415 == answer.status_code
    assert wire.JSON == result.headers["content-type"]
    assert "loss:sum" in result.json()["metrics"]
    assert flags["proto_write_fwdbwd"] is False
    assert flags["sample_use_retrieve_futures"] is True


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("home"))
    session = served.client.session()
    names = {SESSION: session, MODEL: served.client.model(session)}
    names[SAMPLER] = served.client.sampler(session, 0)
    yield served, names
    served.close()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside),
    max_leaves=5,
)


def places(payload, path=()):
    """Every place in a body."""
    yield path
    items = payload.items() if isinstance(payload, dict) else ()
    if isinstance(payload, list):
        items = enumerate(payload)
    for key, inside in items:
        yield from places(inside, (*path, key))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_nonsense_breaks_the_server(site, data):
    """Any value in any place of a valid request is accepted, or refused with a sentence."""
    served, names = site
    endpoint = data.draw(st.sampled_from(sorted(GOOD)))
    place = data.draw(st.sampled_from(list(places(GOOD[endpoint]))))
    value = data.draw(ANYTHING)
    payload = json.loads(json.dumps(GOOD[endpoint]))
    if place:
        inside = payload
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
    else:
        payload = value
    text = json.dumps(payload)
    for mark, name in names.items():
        text = text.replace(mark, name)
    answer = served.client.http.post(
        served.client.url + endpoint, data=text, headers={"Content-Type": wire.JSON}
    )

    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"].strip()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_garbled_protobuf_breaks_the_server(site, data):
    """Bytes changed, removed or inserted anywhere."""
    served, names = site
    _, kind, _, body = wire.encode_request(batch(names[MODEL], 1, [1, 2, 3], [4]), protobuf=True)
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 8)))
    garbled = body[:start] + data.draw(st.binary(max_size=8)) + body[end:]
    answer = served.client.http.post(
        served.client.url + "forward_backward", data=garbled, headers={"Content-Type": kind}
    )

    assert answer.status_code < 500, answer.text
