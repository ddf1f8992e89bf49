"""Exchanging a key for a short-lived token, in time, and never for ever."""

from __future__ import annotations

import base64
import json
import sys
import threading
from contextlib import closing

import pytest

from tests.support.canned import reply
from tests.support.fake_server import Clock, FakeServer, session, settings
from tinkex import errors, types, wire
from tinkex.runtime import auth
from tinkex.runtime.auth import TokenKeeper

NOW = 1_000_000.0


def jwt(**claims):
    part = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJ.{part}.signature"


class Bank:
    """Makes tokens; each says which it is."""

    def __init__(self, clock, life=3600.0):
        self.clock, self.life, self.count, self.patience, self.fails = clock, life, 0, [], None

    def exchange(self, patient):
        self.patience.append(patient)
        if self.fails is not None:
            raise self.fails
        self.count += 1
        return jwt(iat=self.clock(), exp=self.clock() + self.life, n=self.count)


@pytest.fixture
def clock():
    made = Clock()
    made.now = NOW
    return made


@pytest.fixture
def bank(clock):
    return Bank(clock)


@pytest.fixture
def keeper(bank, clock):
    return TokenKeeper(bank.exchange, lambda: "tml-key", now=clock)


def test_a_token_is_got_before_the_first_request_and_kept(keeper, bank):
    assert keeper.get() == keeper.get()
    assert 1 == bank.count


def test_it_is_renewed_half_way_through_its_life(keeper, bank, clock):
    first = keeper.get()
    clock.sleep(1799)
    assert first == keeper.get()
    clock.sleep(2)

    assert first != keeper.get()
    assert 2 == bank.count


def test_tokens_of_a_minute_work(keeper, bank, clock):
    """One exchange every 30 s: neither one for each request, nor a request with a dead token."""
    bank.life = 60.0
    for _ in range(600):
        keeper.get()
        clock.sleep(1)

    assert 19 <= bank.count <= 21


@pytest.mark.parametrize("skew", [-7200, -1800, 1800, 2700, 7200])
def test_a_clock_that_is_wrong_does_not_mean_an_exchange_for_every_request(bank, clock, skew):
    """The server's and ours: hours apart, on machines in a container."""
    wrong = Clock()
    wrong.now = clock.now + skew
    keeper = TokenKeeper(bank.exchange, lambda: "tml-key", now=wrong)
    for _ in range(3600):
        keeper.get()
        clock.sleep(1)
        wrong.sleep(1)

    assert bank.count <= 25


@pytest.mark.parametrize(
    "token",
    [
        "opaque",
        "a.b.c",
        "eyJ." + base64.urlsafe_b64encode(b"[1]").decode() + ".x",
        jwt(),
        jwt(exp="soon"),
        jwt(exp=None),
        jwt(iat=NOW, exp=NOW - 5),
        jwt(iat=NOW, exp=1e999),
        "",
    ],
)
def test_a_token_that_does_not_say_how_long_is_good_for_an_hour(clock, token):
    calls = []
    keeper = TokenKeeper(lambda patient: calls.append(1) or token, lambda: "k", now=clock)
    for _ in range(1000):
        keeper.get()
        clock.sleep(1)

    assert 1 == len(calls)


def test_while_the_old_token_is_good_a_failed_renewal_is_no_trouble(keeper, bank, clock, caplog):
    """One try, a warning, and again a minute later."""
    first = keeper.get()
    clock.sleep(1900)
    bank.fails = errors.APIConnectionError("no network")
    assert first == keeper.get() == keeper.get()
    assert "could not be renewed; the old one is still good: no network" in caplog.text
    bank.fails = None
    clock.sleep(61)

    assert first != keeper.get()
    assert [True, False, False] == bank.patience


def test_when_it_is_not_the_failure_is_told(keeper, bank, clock):
    keeper.get()
    bank.fails = errors.APIConnectionError("no network")
    clock.sleep(3590)

    with pytest.raises(errors.APIConnectionError, match="no network"):
        keeper.get()


def test_a_refused_token_is_replaced(keeper, bank, clock):
    first = keeper.get()
    clock.sleep(5)

    assert keeper.refused()
    assert first != keeper.get()


def test_a_token_that_many_threads_find_refused_is_replaced_once(keeper, bank, clock):
    keeper.get()
    clock.sleep(5)
    for _ in range(10):
        assert keeper.refused()

    assert 2 == bank.count


def test_renewing_holds_nobody_up_while_the_old_token_is_good(bank, clock):
    entered, release = threading.Event(), threading.Event()

    def slow(patient):
        if bank.count:
            entered.set()
            assert release.wait(10)
        return bank.exchange(patient)

    keeper = TokenKeeper(slow, lambda: "tml-key", now=clock)
    first = keeper.get()
    clock.sleep(1900)
    renewing = threading.Thread(target=keeper.get)
    renewing.start()
    entered.wait(10)

    assert first == keeper.get()
    release.set()
    renewing.join(10)
    assert first != keeper.get()


def test_one_exchange_serves_all_who_wait_for_the_first_token(bank, clock):
    meeting = threading.Barrier(8)
    keeper = TokenKeeper(bank.exchange, lambda: "tml-key", now=clock)
    got = []

    def want():
        meeting.wait(10)
        got.append(keeper.get())

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert 1 == bank.count
    assert 1 == len(set(got))


# With a server.

CAPABILITIES = "get_server_capabilities"


@pytest.fixture
def way(canned):
    """To a server that wants tokens."""
    with closing(canned.transport(api_key="tml-key")) as made:
        auth.install(made, types.ClientConfig(pjwt_auth_enabled=True))
        yield made


def give_tokens(canned, *tokens):
    canned.give(*[reply(200, {"jwt": token}) for token in tokens], to="auth/token", method="POST")


def test_a_server_that_wants_tokens_gets_them():
    """The key goes out for nothing but the exchange."""
    server = FakeServer(features={"pjwt_auth_enabled": True})
    with session(server, api_key="tml-key") as s:
        s.call(wire.CAPABILITIES)

    keys = {seen.path: seen.headers.get("X-API-Key") for seen in server.requests}
    assert "tml-key" == keys["client/config"] == keys["auth/token"]
    assert {"eyJ.e30.x"} == {
        keys[p] for p in ("create_session", CAPABILITIES, "sessions/s0/finish")
    }
    assert 1 == len(server.seen("auth/token"))


def test_a_server_that_wants_none_is_asked_for_none():
    server = FakeServer()
    with session(server, api_key="tml-key"):
        pass

    assert [] == server.seen("auth/token")


def test_a_token_that_the_server_calls_invalid_is_replaced_and_the_request_replayed(way, canned):
    give_tokens(canned, "eyJ.old.x", "eyJ.new.x")
    way.get_key()
    way.get_key.__self__._got_at -= 10
    invalid = reply(401, **{"WWW-Authenticate": 'Bearer error="invalid_token"'})
    canned.give(invalid, reply(200, {"supported_models": []}), to=CAPABILITIES)
    way.call(wire.CAPABILITIES)

    assert ["eyJ.old.x", "eyJ.new.x"] == [
        request.headers["X-API-Key"] for request in canned.sent if CAPABILITIES in request.url
    ]


def test_a_credential_command_is_run_for_each_exchange(canned):
    command = f"{sys.executable} -c \"print('from-command')\""
    way = canned.transport(api_key="tml-key", credential_cmd=command)
    auth.install(way, types.ClientConfig(True, credential_default_source="credential_cmd"))
    give_tokens(canned, "eyJ.e30.x")
    way.get_key()

    assert "from-command" == canned.sent[0].headers["X-API-Key"]


def test_without_a_credential_the_ways_to_give_one_are_told(canned):
    way = canned.transport()
    auth.install(way, types.ClientConfig(pjwt_auth_enabled=True))

    with pytest.raises(ValueError, match="set TINKER_API_KEY or TINKER_CREDENTIAL_CMD"):
        way.call(wire.CAPABILITIES)


def test_a_token_is_in_no_repr_and_no_message(way, canned):
    give_tokens(canned, "eyJ.very-secret.x")
    canned.give(reply(403, {"detail": "no"}), to=CAPABILITIES)
    with pytest.raises(errors.PermissionDeniedError) as caught:
        way.call(wire.CAPABILITIES)

    shown = repr(caught.value) + repr(vars(caught.value)) + repr(way.get_key)
    assert "very-secret" not in shown
    assert "very-secret" not in repr(types.AuthTokenResponse("eyJ.very-secret.x"))
    assert "tml-key" not in repr(settings(api_key="tml-key"))
