"""Keys change, and the work stays within reach: named users, adoption, revocation."""

from __future__ import annotations

import pytest

from tests.support.processes import free_port
from tinkex.cli import main
from tinkex.server.auth import LOCAL, Keys, Revoked, key_id
from tinkex.server.home import HomeError
from tinkex.server.home_owners import adopt, owners, revoke


def users(*keys):
    return lambda home: Keys.of_users(keys, home.secret(), Revoked(home.revoked))


def test_a_user_keeps_their_work_when_the_key_is_replaced(serve):
    """The owner used to be the hash of the key: a new key was a new user."""
    first = serve(keys=users("alice=old-key-1"))
    alice = first.client_with("old-key-1")
    alice.result(alice.save(alice.model(), 1, "kept"))
    first.server.close()
    second = serve(keys=users("alice=new-key-1", "alice=new-key-2", "bob=bob-key-1"))
    seen = [
        len(second.client_with(key).get("checkpoints")["checkpoints"])
        for key in ("new-key-1", "new-key-2", "bob-key-1")
    ]

    assert [1, 1, 0] == seen
    assert 401 == second.client_with("old-key-1").refused("sessions", method="GET")[0]


def test_work_from_before_there_were_keys_can_be_adopted_live_models_too(serve, tmp_path, caplog):
    port = free_port()
    first = serve(port=port)
    session = first.client.session()
    model = first.client.model(session)
    first.client.result(first.client.forward_backward(model, 1, [5]))
    first.client.result(first.client.save(model, 2, "kept"))
    first.server.close()
    hidden = serve(port=port, keys=users("alice=alice-key"))
    before = hidden.client_with("alice-key").get("checkpoints")["checkpoints"]
    with pytest.raises(HomeError, match="a server uses the home"):
        adopt(tmp_path / "home", "local", "alice")
    hidden.server.close()
    count = adopt(tmp_path / "home", "local", "alice")
    third = serve(port=port, keys=users("alice=alice-key"))
    alice = third.client_with("alice-key")

    assert [] == before
    assert "work of local, which none of the keys gives access to" in caplog.text
    assert 3 == count  # session, run, checkpoint
    assert ["weights/kept"] == [c["checkpoint_id"] for c in alice.get("checkpoints")["checkpoints"]]
    assert {} == alice.post("session_heartbeat", {"session_id": session})
    assert "metrics" in alice.result(alice.optim_step(model, 3))
    assert [("alice", 1, 1, 1)] == [
        (o.name, o.sessions, o.runs, o.checkpoints) for o in owners(tmp_path / "home")
    ]


def test_work_of_a_key_without_a_name_can_be_adopted_on_the_command_line(serve, tmp_path, capsys):
    first = serve(keys=users("bare-key-1"))
    first.client_with("bare-key-1").session()
    first.server.close()
    home = ["--home", str(tmp_path / "home")]
    main(["home", "owners", *home])
    name = capsys.readouterr().out.split()[0]
    main(["home", "adopt", name, "--as", "carol", *home])
    adopted = capsys.readouterr().out
    main(["home", "owners", "--format", "json", *home])
    after = capsys.readouterr().out

    assert name.startswith("key-")
    assert f"1 objects of {name} belong to carol now." in adopted
    assert '"name": "carol"' in after


@pytest.mark.parametrize("name", ["key-0123", "a/b", "", "-x", "a" * 65, "ä", "a b"])
def test_names_that_could_be_taken_for_something_else_are_refused(serve, tmp_path, name):
    serve().client.session()
    with pytest.raises(HomeError, match="is not a valid user name"):
        adopt(tmp_path / "home", "local", name)
    with pytest.raises(HomeError, match="12 hexadecimal digits"):
        revoke(tmp_path / "home", key_id=name or "x")


def test_a_key_is_named_only_where_something_that_can_be_a_key_follows():
    """Keys in base64 end in "=" characters."""
    keys = Keys.of_users(["c29tZSBrZXk=", "ab==", "dave=long-enough"], b"secret")

    assert keys.owner("c29tZSBrZXk=").startswith("key-")
    assert keys.owner("ab==").startswith("key-")
    assert "dave" == keys.owner("long-enough")
    with pytest.raises(ValueError, match="given to two users"):
        Keys.of_users(["a=one-key-1", "b=one-key-1"], b"secret")
    with pytest.raises(ValueError, match="not a valid user name"):
        Keys.of_users(["local=one-key-1"], b"secret")


def test_a_revoked_key_is_refused_at_once_by_every_server_of_the_home(serve, tmp_path, capsys):
    """The user's other keys go on."""
    keys = users("alice=alice-key-1", "alice=alice-key-2", "alice=alice-key-3")
    one, other = serve(keys=keys), serve(keys=keys)
    first, second = one.client_with("alice-key-1"), other.client_with("alice-key-2")
    session = first.session()
    assert 200 == first.send("DELETE", "auth/apikey/me").status_code
    secret = (tmp_path / "home" / "secret").read_bytes()
    third = key_id("alice-key-3", secret)
    main(["home", "revoke", third, "--home", str(tmp_path / "home")])
    refused = [
        served.client_with(key).refused("sessions", method="GET")
        for served in (one, other)
        for key in ("alice-key-1", "alice-key-3")
    ]

    assert f"The key {third} is revoked." in capsys.readouterr().out
    assert [401] * 4 == [status for status, _ in refused]
    assert all("was revoked" in sentence for _, sentence in refused)
    assert [session] == second.get("sessions")["sessions"]
    assert "alice-key" not in (tmp_path / "home" / "revoked-keys").read_text()


def test_a_revoked_key_stays_revoked_after_a_restart(serve, tmp_path):
    first = serve(keys=users("alice=alice-key-1"))
    first.client_with("alice-key-1").send("DELETE", "auth/apikey/me")
    first.server.close()
    second = serve(keys=users("alice=alice-key-1"))

    assert 401 == second.client_with("alice-key-1").refused("sessions", method="GET")[0]


def test_a_server_for_one_user_does_not_revoke_its_key(serve):
    single = serve(keys=lambda home: Keys.of_one("only-key"))

    assert 404 == single.client_with("only-key").refused("auth/apikey/me", method="DELETE")[0]
    assert 404 == serve().client.refused("auth/apikey/me", method="DELETE")[0]


def test_adopting_changes_the_work_of_one_owner_alone(serve, tmp_path):
    """The models that live on after a restart, too: bob's stay bob's."""
    port = free_port()
    first = serve(port=port, keys=users("alice=alice-key", "bob=bob-key-1"))
    models = {}
    for key in ("alice-key", "bob-key-1"):
        client = first.client_with(key)
        models[key] = client.model()
        client.result(client.forward_backward(models[key], 1, [5]))
    first.server.close()
    adopt(tmp_path / "home", "alice", "carol")
    second = serve(port=port, keys=users("carol=carol-key", "bob=bob-key-1"))
    steps = [
        second.client_with(key).result(second.client_with(key).optim_step(model, 2))
        for key, model in (
            ("carol-key", models["alice-key"]),
            ("bob-key-1", models["bob-key-1"]),
        )
    ]

    assert all("metrics" in step for step in steps), steps


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda home: adopt(home / "nowhere", "local", "alice"), "is not a home of tinkex"),
        (lambda home: revoke(home / "nowhere", key="k"), "is not a home of tinkex"),
        (lambda home: adopt(home, "zoe", "alice"), "belongs to 'zoe'"),
        (lambda home: adopt(home, "local", "a b"), "a b"),
        (lambda home: revoke(home, key_id="12"), "'12' is not the id of a key"),
        (lambda home: owners(home / "nowhere"), "is not a home of tinkex"),
    ],
)
def test_a_change_that_cannot_be_made_gives_the_reason(serve, tmp_path, change, reason):
    serve().server.close()

    with pytest.raises(HomeError, match=reason):
        change(tmp_path / "home")


def test_the_work_of_a_user_can_become_that_of_a_server_without_keys(serve, tmp_path):
    """Back to one user, who is called "local"."""
    first = serve(keys=users("alice=alice-key"))
    session = first.client_with("alice-key").session()
    first.server.close()

    assert 1 == adopt(tmp_path / "home", "alice", LOCAL)
    assert [session] == serve().client.get("sessions")["sessions"]


def test_a_key_is_revoked_by_itself_where_its_id_is_not_known(serve, tmp_path):
    """Only the id is stored and returned."""
    running = serve(keys=users("alice=alice-key"))

    revoked = revoke(tmp_path / "home", key="alice-key")

    assert key_id("alice-key", (tmp_path / "home" / "secret").read_bytes()) == revoked
    assert 401 == running.client_with("alice-key").refused("sessions", method="GET")[0]
