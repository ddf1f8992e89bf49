"""X-Idempotency-Key: a request that is sent twice under one key is done once."""

from __future__ import annotations

import threading

from tests.support.processes import ServerProcess

KEY = {"X-Idempotency-Key": "one"}
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}


def test_a_session_is_created_once(client):
    first, second = (client.post("create_session", {"tags": ["a"]}, headers=KEY) for _ in "12")
    other = client.post("create_session", {"tags": ["a"]}, headers={"X-Idempotency-Key": "two"})

    assert first == second != other
    assert 2 == len(client.get("sessions")["sessions"])


def test_a_sample_outside_of_a_session_runs_once(served):
    client = served.client
    body = {"base_model": "tiny", "prompt": PROMPT, "sampling_params": {"max_tokens": 4}}
    first, second = (client.post("asample", body, headers=KEY) for _ in "12")
    results = [client.result(promise) for promise in (first, second)]
    other = client.post("asample", body, headers={"X-Idempotency-Key": "two"})

    assert first == second != other
    assert results[0] == results[1]


def test_a_clone_of_a_sampler_is_numbered_once(client):
    body = {"sampling_session_id": client.sampler()}
    numbers = [client.post("join_sampling_session", body, headers=KEY) for _ in "12"]
    other = client.post("join_sampling_session", body)

    assert numbers[0] == numbers[1] != other


def test_requests_that_come_at_once_are_one(client, served):
    """The second waits for the first, and gets its answer."""
    found = []

    def create():
        own = served.client_with(None)
        found.append(own.post("create_session", {}, headers=KEY)["session_id"])

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 == len(set(found))
    assert 8 == len(found)


def test_a_key_names_one_body(client):
    client.post("create_session", {"tags": ["a"]}, headers=KEY)
    status, sentence = client.refused("create_session", {"tags": ["b"]}, headers=KEY)

    assert 400 == status
    assert "another body" in sentence


def test_what_was_refused_can_be_sent_again(client):
    """A refusal has done nothing; the same key may succeed later."""
    model = client.model()
    body = {"model_id": model, "seq_id": 1, "path": "../x"}
    client.refused("save_weights", body, headers=KEY)
    saved = client.post("save_weights", {**body, "path": "x"}, headers=KEY)

    assert "path" in client.result(saved)


def test_keys_of_several_users_do_not_meet(serve):
    from tinkex.server.auth import Keys

    served = serve(keys=lambda home: Keys.of_users(["a", "b"], b"secret"))
    sessions = {
        served.client_with(key).post("create_session", {}, headers=KEY)["session_id"]
        for key in ("a", "b")
    }

    assert 2 == len(sessions)


def test_a_session_is_created_once_over_a_restart(tmp_path):
    """The client saw no answer, because the server was killed."""
    server = ServerProcess(tmp_path / "home")
    server.start()
    try:
        first = server.client.post("create_session", {}, headers=KEY)
        server.kill()
        server.start()
        second = server.client.post("create_session", {}, headers=KEY)
        listed = server.client.get("sessions")["sessions"]
    finally:
        server.close()

    assert first == second
    assert [first["session_id"]] == listed
