"""Keep out: who has no business here gets nothing, and learns nothing.

What a key may see: tests/server/test_users.py.
What is too large: tests/server/test_bad_requests.py.
"""

from __future__ import annotations

import hmac
import json
import logging
import pickle
import stat
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import requests

import tinkex
from tests.chaos import scenario
from tests.chaos.servers import Server
from tests.support.fake_engine import FakeEngine
from tests.support.processes import ROOT
from tests.support.wire_client import WireClient
from tinkex import errors, types
from tinkex.server import auth
from tinkex.server.app import LocalServer
from tinkex.server.http_errors import Refusal
from tinkex.server.limits import Limits

KEY, OTHER = "tml-alice-4d2f6c0b9e81", "tml-bob-77aa03e1c5d9"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`tinkex serve` for two users, whose keys are in its environment."""
    folder = tmp_path_factory.mktemp("keys")
    environment = {"TINKEX_SERVE_KEYS": f"{KEY} {OTHER}"}
    with Server(folder / "home", environment=environment) as server:
        yield server


def everything_in(folder):
    return b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


def test_a_key_is_found_nowhere_but_in_requests(server, tmp_path, caplog, monkeypatch):
    """Not in logs of either side, nor in errors, reprs, pickles, metrics, the journal or files."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    shown = []
    with (
        tinkex.ServiceClient(server.url) as service,
        service.create_lora_training_client("tiny", rank=2) as training,
    ):
        training.forward_backward(scenario.batch(1), "cross_entropy")
        training.optim_step(types.AdamParams()).result(60)
        path = training.save_weights_for_sampler("final").result(60).path
        sampler = service.create_sampling_client(model_path=path)
        sampler.sample([1, 2], 1, types.SamplingParams(max_tokens=2)).result(60)
        rest = service.create_rest_client()
        rest.download_checkpoint(path, tmp_path / "adapter")
        url = rest.get_checkpoint_archive_url(path).url
        session = service._session
        for thing in (service, training, sampler, rest, session, session.config, session.transport):
            shown += [repr(thing), repr(getattr(thing, "__dict__", ""))]
        recipe = tinkex.TrainingClient.spec("tiny", base_url=server.url)
        shown += [repr(pickle.dumps(thing)) for thing in (sampler, recipe)]
        with pytest.raises(errors.NotFoundError) as caught:
            rest.get_training_run("unknown")
        shown += traceback.format_exception(caught.value)
        with pytest.raises(errors.AuthenticationError) as caught:
            tinkex.ServiceClient(server.url, KEY + "x")
        shown += [*traceback.format_exception(caught.value), repr(vars(caught.value))]
    train(server, tmp_path)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("tinkex")]
    found = everything_in(server.home) + everything_in(tmp_path) + server.log.read_bytes()
    found += "\n".join([*shown, *ours]).encode()

    assert path.encode() in found  # it was looked through
    assert KEY.encode() not in found + caplog.text.encode()
    assert OTHER.encode() not in found
    assert url.rpartition("=")[2].encode() not in found  # the ticket of a download


def train(server, folder):
    """`tinkex train` with the key in the environment; what it prints goes to *folder*."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": "abc " * i}) for i in range(1, 9)))
    command = [sys.executable, "-m", "tinkex", "train", str(data), "--base-model", "tiny", "--rank",
               "2", "--output", str(folder / "run"), "--base-url", server.url]  # fmt: skip
    with open(folder / "output", "w") as output:
        status = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=120)
    assert 0 == status.returncode, (folder / "output").read_text()


def test_every_key_is_compared_and_in_constant_time(monkeypatch):
    """How long an answer takes says neither how much of a key was right, nor whose it is."""
    compared = []
    compare = hmac.compare_digest

    def noting(one, other):
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(auth.hmac, "compare_digest", noting)
    known = auth.Keys.of_users(["first", "second", "third"], b"secret")
    known.owner("first")
    with pytest.raises(Refusal):
        known.owner("wrong and long" * 1000)

    assert [(32, 32)] * 6 == compared  # digests, whatever the keys


@pytest.fixture
def open_server(tmp_path):
    """A server that wants no key."""
    limits = Limits(poll_seconds=0.3, connections=20)
    with LocalServer(tmp_path / "home", engine=FakeEngine, limits=limits) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example:80"}, {"Host": "127.0.0.1.evil.example"}, {"Host": "["},
     {"Origin": "https://evil.example"}, {"Origin": "null"}],
    ids=str,
)  # fmt: skip
def test_a_web_page_cannot_use_a_server_that_wants_no_key(open_server, headers):
    """A browser of this machine reaches loopback for every page it shows."""
    client = WireClient(open_server.url)
    status, sentence = client.refused("create_session", {}, headers=headers)
    listed = client.get("sessions")["sessions"]
    client.http.close()

    assert 403 == status
    assert "--api-key" in sentence
    assert [] == listed


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "[::1]:80", "LOCALHOST"])
def test_this_machine_s_own_names_are_let_in(open_server, host):
    """Through a tunnel from elsewhere, too."""
    client = WireClient(open_server.url)
    session = client.post("create_session", {}, headers={"Host": host})
    client.http.close()

    assert session["session_id"]


def test_more_connections_than_the_limit_are_turned_away(open_server):
    """With a status that clients retry; open connections continue."""
    sessions = [requests.Session() for _ in range(30)]
    answers = [
        session.get(open_server.url + "/api/v1/healthz", timeout=10).status_code
        for session in sessions
    ]
    for session in sessions:
        session.close()

    assert {200, 503} == set(answers)
    assert 200 == answers[0]


def test_endless_headers_are_not_read_to_their_end(open_server):
    with pytest.raises(requests.ConnectionError):
        answer = requests.get(open_server.url, headers={"X-Long": "x" * 10_000_000}, timeout=10)
        assert 400 <= answer.status_code < 500
        raise requests.ConnectionError  # either way it was not taken


def test_what_a_home_holds_is_for_its_user_s_eyes(server):
    """0700 and 0600 from the real server, whatever the umask it was started with."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in server.home.rglob("*")}

    assert 0o700 == stat.S_IMODE(server.home.stat().st_mode)
    assert {} == {path: oct(mode) for path, mode in modes.items() if mode & 0o077}
