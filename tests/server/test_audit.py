"""The audit log: who did what, without data and without keys."""

from __future__ import annotations

import json
import stat
import time

import pytest

from tests.support.processes import free_port
from tinkex.server import audit
from tinkex.server.auth import Keys

KEYS = ["alice=alice-key-1", "alice=alice-key-2", "bob=bob-key-1"]


@pytest.fixture
def shared(serve):
    return serve(keys=lambda home: Keys.of_users(KEYS, home.secret()))


def entries(home):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        lines = [line for path in home.glob("audit/*") for line in path.read_text().splitlines()]
        if lines:
            break
    return [json.loads(line) for line in lines]


def test_what_users_do_is_noted_with_name_key_address_and_outcome(shared, tmp_path):
    alice, other, bob = map(shared.client_with, ("alice-key-1", "alice-key-2", "bob-key-1"))
    model = alice.model()
    path = f"training_runs/{model}/checkpoints/weights/mine"
    alice.result(alice.save(model, 1, "mine"))
    bob.refused(path, method="DELETE")
    other.send("DELETE", path)
    found = [
        (e["user"], e["did"].split("/v1/")[1], e["status"]) for e in entries(tmp_path / "home")
    ]
    keys = {(e["user"], e["key"]) for e in entries(tmp_path / "home")}

    assert [
        ("alice", "create_session", 200),
        ("alice", "create_model", 200),
        ("alice", "save_weights", 200),
        ("bob", path, 404),
        ("alice", path, 200),
    ] == found
    assert 3 == len(keys)
    assert {"127.0.0.1"} == {e["from"] for e in entries(tmp_path / "home")}


def test_wrong_keys_are_noted_whatever_they_ask_for(shared, tmp_path):
    shared.client_with("carol-key").refused("sessions", method="GET")
    shared.client_with("carol-key").refused("asample", {})
    found = entries(tmp_path / "home")

    assert [401, 401] == [e["status"] for e in found]
    assert [(None, None)] * 2 == [(e["user"], e["key"]) for e in found]


def test_data_keys_and_query_strings_are_not_in_it(shared, tmp_path):
    alice = shared.client_with("alice-key-1")
    session = alice.session(user_metadata={"secret": "sensitive"}, display_name="sensitive")
    model = alice.model(session)
    alice.result(alice.forward_backward(model, 1, [123, 456]))
    alice.result(alice.sample(alice.sampler(session), 0, tokens=[321]))
    alice.send("DELETE", f"training_runs/{model}/checkpoints/weights/x?token=sensitive")
    text = json.dumps(entries(tmp_path / "home"))

    assert "sensitive" not in text
    assert "alice-key" not in text
    assert "forward_backward" not in text
    assert "asample" not in text


def test_only_the_user_can_read_it_and_it_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "FILE_BYTES", 2000)
    log = audit.Audit(tmp_path / "audit" / "port-1.jsonl")
    for i in range(500):
        log.note("POST", f"/x/{i}", 200, "alice", lambda: "id", None)
    log.close()
    files = list((tmp_path / "audit").iterdir())

    assert audit.FILES + 1 == len(files)
    assert sum(path.stat().st_size for path in files) < 2300 * (audit.FILES + 1)
    assert 0o700 == stat.S_IMODE((tmp_path / "audit").stat().st_mode)
    assert "/x/499" in (tmp_path / "audit" / "port-1.jsonl").read_text()


def test_odd_paths_stay_in_their_line(shared, tmp_path):
    """A line break in a path would make two entries of one."""
    alice = shared.client_with("alice-key-1")
    alice.send("POST", "sessions/a%0A%7B%22user%22%3A%22bob%22%7D/finish", {})

    assert ["alice"] == [e["user"] for e in entries(tmp_path / "home")]


def test_a_log_that_cannot_be_written_is_said_once_and_requests_are_answered(
    serve, tmp_path, caplog
):
    served = serve(port=free_port())
    (tmp_path / "home" / "audit").chmod(0o500)
    (tmp_path / "home" / "audit").rmdir()
    for _ in range(3):
        served.client.session()

    assert 1 == caplog.text.count("The audit log cannot be written.")
