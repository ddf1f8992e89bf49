"""Responses as errors of tinkex, with the server's message wherever it stands."""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import closing as way_closed

import pytest
import requests

from tests.support.fake_server import URL, FakeServer, garbage, reset, status, transport
from tinkex import errors, wire
from tinkex.runtime.responses import error_detail
from tinkex.runtime.retry import ONCE

HEALTHZ = f"{URL}/api/v1/healthz"


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def fresh(server):
    """A transport whose server was never heard of."""
    made = transport(server)
    yield made
    made.close()


@pytest.fixture
def established(fresh, server):
    """A transport whose server has answered before."""
    fresh.call(wire.HEALTHZ)
    server.requests.clear()
    return fresh


# Errors of tinkex.


@pytest.mark.parametrize(
    "body, detail",
    [
        ({"detail": "no such model"}, "no such model"),
        ({"message": "no such model"}, "no such model"),
        ({"error": "no such model"}, "no such model"),
        ({"error": {"message": "no such model", "code": 7}}, "no such model"),
        ({"detail": {"error": "no such model"}}, "no such model"),
        (
            {"detail": [{"loc": ["body", "data", 0], "msg": "field required", "type": "missing"}]},
            "body.data.0: field required",
        ),
        ({"detail": ["a", "b"]}, "a; b"),
        ("no such model", "no such model"),
        (["x"], ""),
        (None, ""),
        (5, ""),
        ({}, ""),
    ],
)
def test_the_server_s_sentence_is_found_wherever_it_is(body, detail):
    """FastAPI's `detail` most of all, which the SDK we follow never shows."""
    assert detail == error_detail(body)


@pytest.mark.parametrize(
    "content",
    [b"[1, 2]", b"5", b'"text"', b"\xff\xfe", b"[" * 100_000, b"{" * 100_000, b"NaN"],
    ids=["list", "number", "text", "not UTF-8", "deep", "deep objects", "NaN"],
)
@pytest.mark.parametrize("code", [400, 404, 500])
def test_an_error_with_any_body_is_an_error_of_ours(established, server, code, content):
    """Nothing that a server sends may raise anything but what errors.py lists."""
    server.always("healthz", status(code, content))

    with pytest.raises(errors.APIStatusError) as caught:
        established.call(wire.HEALTHZ, retry=ONCE)
    assert code == caught.value.status
    assert 600 >= len(str(caught.value))


@pytest.mark.parametrize(
    "content", [b"[1]", b"5", b"null", b"\xff", b"[" * 100_000, b'{"status": 5}', b"NaN"]
)
def test_a_success_that_makes_no_sense_is_an_error_of_ours(established, server, content):
    """And of the server's making: `user` is never its category."""
    server.always("healthz", garbage(content, "application/json"))

    with pytest.raises(errors.APIResponseValidationError, match=HEALTHZ):
        established.call(wire.HEALTHZ, retry=ONCE)


def test_a_redirect_is_no_success(established, server):
    """It says where to set base_url to."""
    server.always("healthz", status(307, None, Location="https://elsewhere.test/api?key=1"))

    with pytest.raises(
        errors.APIStatusError, match=r"redirected to https://elsewhere\.test/api; set"
    ):
        established.call(wire.HEALTHZ)


def test_every_exception_of_requests_is_translated_at_this_border(established, server):
    """Users catch ours; with `from`, the original is there for whoever digs."""
    for problem in (
        requests.exceptions.ChunkedEncodingError("cut"),
        requests.exceptions.ContentDecodingError("not gzip"),
        requests.exceptions.ProxyError("no proxy"),
        requests.exceptions.InvalidURL("bad"),
        requests.exceptions.TooManyRedirects("loop"),
        requests.exceptions.InvalidHeader("bad header"),
    ):

        def fault(server, request, limits, behave, problem=problem):
            raise problem

        server.always("healthz", fault)
        with pytest.raises(errors.APIConnectionError, match=HEALTHZ) as caught:
            established.call(wire.HEALTHZ, retry=ONCE)
        assert problem is caught.value.__cause__


@pytest.mark.parametrize(
    "answer",
    [
        status(400, {"error": "the key tml-very-secret is not liked"}),
        status(500, "traceback: headers={'X-API-Key': 'tml-very-secret'}"),
        status(307, None, Location="https://elsewhere.test/tml-very-secret"),
        status(200, "not JSON: tml-very-secret"),
        status(200, {"status": ["tml-very-secret"]}),
        status(404, {"detail": [{"loc": ["tml-very-secret"], "msg": "hidden-token"}]}),
    ],
)
def test_a_server_that_repeats_our_secrets_does_not_get_them_into_messages(server, answer):
    """Servers in debug mode echo requests; their answers end up in bug reports."""
    way = transport(server, api_key="tml-very-secret", default_headers={"X-Token": "hidden-token"})
    server.always("healthz", answer)

    with way_closed(way), pytest.raises(errors.APIError) as caught:
        way.call(wire.HEALTHZ, retry=ONCE)

    shown = f"{caught.value!r} {caught.value} {vars(caught.value)}"
    assert "very-secret" not in shown and "hidden-token" not in shown


def test_a_result_that_holds_no_secret_is_left_alone(server):
    way = transport(server, api_key="tml-very-secret")
    server.always("healthz", status(200, {"status": "ok"}))

    with way_closed(way):
        assert "ok" == way.call(wire.HEALTHZ).status


def test_secrets_and_queries_are_in_no_message(server):
    way = transport(server, api_key="tml-very-secret", default_headers={"X-Token": "hidden-token"})
    for fault in (status(401, {"detail": "bad"}), reset(), garbage()):
        server.always("sessions", fault)
        with pytest.raises(errors.APIError) as caught:
            way.call(wire.LIST_SESSIONS, query={"limit": 77777}, retry=ONCE)
        shown = repr(caught.value) + str(caught.value) + repr(way.config) + repr(vars(caught.value))
        assert "very-secret" not in shown
        assert "hidden-token" not in shown
        assert "77777" not in str(caught.value)


def test_the_body_of_an_error_is_kept_for_whoever_wants_more(established, server):
    body = {"detail": "no", "category": "user", "more": [1]}
    server.always("healthz", status(422, body))

    with pytest.raises(errors.UnprocessableEntityError) as caught:
        established.call(wire.HEALTHZ)
    assert body == caught.value.body
    assert "user" == caught.value.category
    assert json.dumps(body)  # plain data


# Whole or not.


def with_digest(content, told, **headers):
    digest = base64.b64encode(hashlib.sha256(told).digest()).decode()
    headers = {
        "Content-Digest": f"sha-256=:{digest}:",
        "Content-Type": "application/json",
    } | headers
    return lambda server, request, limits, behave: server.response(request, 200, content, headers)


def test_a_body_that_is_not_the_one_the_server_sent_is_asked_for_again(established, server):
    """Half a protobuf may read like a whole one: the digest tells."""
    whole = b'{"status": "well"}'
    server.script("healthz", with_digest(b'{"status": "we"}', whole), with_digest(whole, whole))

    assert "well" == established.call(wire.HEALTHZ).status
    assert 2 == len(server.requests)


def test_a_body_that_is_cut_time_after_time_is_an_error_that_says_so(established, server):
    server.always("healthz", with_digest(b"{}", b'{"status": "well"}'))

    with pytest.raises(errors.APIResponseValidationError, match="cut or changed on the way"):
        established.call(wire.HEALTHZ)
