"""Several users on one server: a key sees its own objects and published ones."""

from __future__ import annotations

import pytest

import tinkex
from tests.support.processes import ServerProcess
from tests.support.wire_client import WireClient
from tinkex.server.auth import Keys
from tinkex.server.http_errors import Refusal


@pytest.fixture
def start(serve):
    return lambda: serve(keys=lambda home: Keys.of_users(["alice-key", "bob-key"], home.secret()))


@pytest.fixture
def shared(start):
    return start()


@pytest.fixture
def alice(shared):
    return shared.client_with("alice-key")


@pytest.fixture
def bob(shared):
    return shared.client_with("bob-key")


def test_a_wrong_or_missing_key_is_refused(shared):
    """The sentence says whether the key is missing or wrong, without repeating it."""
    missing = shared.client.refused("create_session", {})
    wrong = shared.client_with("carol-key").refused("create_session", {})

    assert 401 == missing[0]
    assert "X-API-Key" in missing[1]
    assert 401 == wrong[0]
    assert "carol" not in wrong[1]


def test_health_needs_no_key(shared):
    """It reveals nothing about users."""
    assert {"status": "ok"} == shared.client.get("healthz")


def test_another_users_things_read_like_things_that_do_not_exist(alice, bob):
    """A 403 would reveal that they exist."""
    session = alice.session()
    model = alice.model(session)
    step = alice.optim_step(model, 1)
    path = alice.result(alice.save(model, 2, "mine"))["path"]
    sampler = alice.sampler(session, 0)
    sample = alice.sample(sampler, 0)
    alice.result(sample)
    mine = bob.session()
    checkpoint = f"training_runs/{model}/checkpoints/weights/mine"
    asked = {
        "session_heartbeat": bob.refused("session_heartbeat", {"session_id": session}),
        "create_model": bob.refused(
            "create_model", {"session_id": session, "model_seq_id": 1, "base_model": "tiny"}
        ),
        "optim_step": bob.refused("optim_step", {"model_id": model, "seq_id": 1}),
        "get_info": bob.refused("get_info", {"model_id": model}),
        "unload": bob.refused("unload_model", {"model_id": model}),
        "load": bob.refused("load_weights", {"session_id": mine, "model_seq_id": 0, "path": path}),
        "sampling session": bob.refused(
            "create_sampling_session",
            {"session_id": mine, "sampling_session_seq_id": 0, "model_path": path},
        ),
        "asample": bob.refused(
            "asample",
            {"sampling_session_id": sampler, "seq_id": 5, "prompt": {"chunks": []}},
        ),
        "sampler": bob.refused(f"samplers/{sampler}", method="GET"),
        "join": bob.refused("join_sampling_session", {"sampling_session_id": sampler}),
        "weights_info": bob.refused("weights_info", {"tinker_path": path}),
        "run": bob.refused(f"training_runs/{model}", method="GET"),
        "run's checkpoints": bob.refused(f"training_runs/{model}/checkpoints", method="GET"),
        "session": bob.refused(f"sessions/{session}", method="GET"),
        "finish": bob.refused(f"sessions/{session}/finish", {"reason": {"type": "success"}}),
        "archive": bob.refused(f"{checkpoint}/archive", method="GET"),
        "publish": bob.refused(f"{checkpoint}/publish"),
        "ttl": bob.refused(f"{checkpoint}/ttl", {"ttl_seconds": 5}, method="PUT"),
        "delete": bob.refused(checkpoint, method="DELETE"),
        "copy": bob.refused("copy_weights", {"source_path": path}),
    }
    results = [bob.refused("retrieve_future", promise)[0] for promise in (step, sample)]
    cancelled = bob.refused("cancel_future", {"request_id": sample["request_id"]})

    assert dict.fromkeys(asked, 404) == {name: answer[0] for name, answer in asked.items()}
    assert [410, 410] == results
    assert 410 == cancelled[0]
    assert [] == bob.get("training_runs")["training_runs"]
    assert [] == bob.get("checkpoints")["checkpoints"]
    assert [mine] == bob.get("sessions")["sessions"]
    assert 1 == len(alice.get("checkpoints")["checkpoints"])


def test_a_published_checkpoint_can_be_read_by_others_but_not_changed(alice, bob):
    """Until it is unpublished."""
    model = alice.model()
    path = alice.result(alice.save(model, 1, "gift"))["path"]
    checkpoint = f"training_runs/{model}/checkpoints/weights/gift"
    alice.post(f"{checkpoint}/publish")
    session = bob.session()
    loaded = bob.result(
        bob.post("load_weights", {"session_id": session, "model_seq_id": 0, "path": path})
    )
    sampler = bob.sampler(session, 0, model_path=path)
    deleted = bob.refused(checkpoint, method="DELETE")
    unpublished = bob.refused(f"{checkpoint}/publish", method="DELETE")
    listed = bob.get(f"training_runs/{model}/checkpoints")["checkpoints"]
    alice.send("DELETE", f"{checkpoint}/publish")
    after = bob.refused("weights_info", {"tinker_path": path})

    assert f"{session}:train:0" == loaded["model_id"]
    assert "sequences" in bob.result(bob.sample(sampler, 0))
    assert [404, 404] == [deleted[0], unpublished[0]]
    assert [path] == [entry["tinker_path"] for entry in listed]
    assert 404 == after[0]


def test_directories_of_the_machine_are_not_for_users_of_a_shared_server(alice, tmp_path):
    """A path of one user could lead to another's data."""
    session = alice.session()
    body = {"session_id": session, "model_seq_id": 0}
    base = alice.refused("create_model", {**body, "base_model": str(tmp_path)})
    adapter = alice.refused("create_model", {**body, "base_model": "tiny", "adapter": "/"})

    assert 400 == base[0]
    assert "was not started with" in base[1]
    assert 400 == adapter[0]


def test_an_owner_is_the_same_after_a_restart_and_says_nothing_of_the_key(serve, tmp_path):
    """Owner names are stored, keys are not."""
    keys = {"keys": lambda home: Keys.of_users(["alice-key"], home.secret())}
    first = serve(**keys)
    alice = first.client_with("alice-key")
    model = alice.model()
    alice.result(alice.save(model, 1, "kept"))
    first.server.close()
    second = serve(**keys)
    kept = second.client_with("alice-key").get("checkpoints")["checkpoints"]
    stored = b"".join(
        path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()
    )

    assert ["weights/kept"] == [checkpoint["checkpoint_id"] for checkpoint in kept]
    assert b"alice-key" not in stored
    assert "alice-key" not in repr(keys["keys"])


def test_without_keys_everybody_is_the_same_user(served):
    """On loopback with a single user: any key, or none."""
    one, other = WireClient(served.server.url, "tml-x"), WireClient(served.server.url, None)
    session = one.session()

    assert [session] == other.get("sessions")["sessions"]


def test_keys_know_their_owners_and_nothing_else():
    """Equal keys are equal owners; a similar key is not valid."""
    keys = Keys.of_users(["k1", "k2"], b"secret")

    assert keys.owner("k1") == Keys.of_users(["k1"], b"secret").owner("k1")
    assert keys.owner("k1") != keys.owner("k2")
    assert keys.owner("k1") != Keys.of_users(["k1"], b"other").owner("k1")
    assert "k1" not in repr(keys)
    with pytest.raises(Refusal):
        keys.owner("k1 ")


# Weights of another user, by a key that may read them


@pytest.fixture
def hers(alice):
    """A checkpoint of alice."""
    model = alice.model(alice.session())
    alice.optim_step(model, 1)
    return alice.result(alice.save(model, 2, "mine"))["path"]


def test_a_key_that_may_read_a_checkpoint_lets_another_user_load_and_copy_it(
    shared, alice, bob, hers
):
    """As the official SDK sends it: in the body of load_weights, in a header of copy_weights."""
    mine = bob.session()
    token = {"weights_access_token": "alice-key"}
    new = {"session_id": mine, "model_seq_id": 1, "path": hers}

    into = bob.model(mine, 0)
    bob.result(bob.post("load_weights", {"model_id": into, "seq_id": 1, "path": hers, **token}))
    created = bob.result(bob.post("load_weights", {**new, **token}))["model_id"]
    copied = bob.post(
        "copy_weights",
        {"source_path": hers},
        headers={"X-Tinker-Weights-Access-Token": "alice-key"},
    )["tinker_path"]

    assert bob.post("get_info", {"model_id": created})["model_id"] == created
    assert bob.post("weights_info", {"tinker_path": copied})["base_model"] == "tiny"
    assert 404 == alice.refused("weights_info", {"tinker_path": copied})[0]  # it is bob's alone
    assert 404 == bob.refused("weights_info", {"tinker_path": hers})[0]  # nothing else was granted


def test_no_other_key_does(bob, hers):
    """Neither one's own nor one that is no key of the server; and the key is never repeated."""
    new = {"session_id": bob.session(), "model_seq_id": 0, "path": hers}

    for key, status in ((None, 404), ("bob-key", 404), ("carol-key", 403)):
        loading = bob.refused("load_weights", {**new, "weights_access_token": key})
        copying = bob.refused("copy_weights", {"source_path": hers, "weights_access_token": key})
        assert status == loading[0] == copying[0]
        assert key is None or key not in loading[1] + copying[1]


def test_the_key_is_nowhere_on_disk(tmp_path):
    """The journal has the name of the owner that it stood for, by which a killed server loads
    again."""
    server = ServerProcess(tmp_path / "home", api_keys=["alice-key", "bob-key"])
    url = server.start()
    try:
        alice, bob = (WireClient(url, key) for key in ("alice-key", "bob-key"))
        path = alice.result(alice.save(alice.model(), 1, "mine"))["path"]
        new = {"session_id": bob.session(), "model_seq_id": 0, "path": path}
        model = bob.result(bob.post("load_weights", {**new, "weights_access_token": "alice-key"}))
        server.kill()
        paths = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
        holding = [path for path in paths if b"alice-key" in path.read_bytes()]
        server.start()
        bob.result(bob.optim_step(model["model_id"], 1))
    finally:
        server.close()

    assert paths and not holding


def test_the_client_sends_the_key_along(shared, alice, hers, caplog):
    """From create_training_client_from_state, load_state and both copy_weights."""
    caplog.set_level("DEBUG")
    options = {"weights_access_token": "alice-key"}
    url = shared.server.url
    with tinkex.ServiceClient(url, "bob-key") as service:
        with pytest.raises(tinkex.NotFoundError):
            service.create_training_client_from_state(hers)
        made = service.create_training_client_from_state(hers, **options)
        made.load_state(hers, **options).result()
        copies = [
            service.copy_weights(hers, **options).result(),
            service.create_rest_client().copy_weights(hers, **options).result(),
        ]
        listed = {c.tinker_path for c in service.create_rest_client().iter_user_checkpoints()}

    assert set(copies) <= listed and hers not in listed
    assert "alice-key" not in caplog.text
