"""`tinkex run`: lists that page and end, one run, and endpoints that a server lacks."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_server import answer


def pages(server, path):
    return [(int(s.query["limit"]), int(s.query["offset"])) for s in server.seen(path)]


def test_run_list_shows_the_last_used(run, storage):
    storage.add_run("r1")
    storage.add_run("r2", lora_rank=None, corrupted=True)
    status, out, err = run("run", "list")

    assert (0, "") == (status, err)
    assert ["Run", "r1", "r2"] == [line.split()[0] for line in out.splitlines()]
    assert "rank 8" in out
    assert "corrupted" in out


def test_a_list_pages_by_itself_and_ends(run, storage, server):
    for i in range(250):
        storage.add_run(f"r{i}")
    found = json.loads(run("run", "list", "--limit", "0", "-f", "json")[1])

    assert [f"r{i}" for i in range(250)] == [one["training_run_id"] for one in found["runs"]]
    assert [(100, 0), (100, 100), (100, 200)] == pages(server, "training_runs")


def test_a_short_list_is_one_request(run, storage, server):
    """One more than is shown is requested, to know whether there are more."""
    for i in range(30):
        storage.add_run(f"r{i}")
    _, out, err = run("run", "list")

    assert 21 == len(out.splitlines())
    assert "Only the newest 20 training runs are shown; --limit 0 lists all.\n" == err
    assert [(21, 0)] == pages(server, "training_runs")


def test_a_server_without_pages_does_not_cause_an_endless_loop(run, server):
    """It sends the same list for every offset, and no total."""
    server.always("training_runs", answer({"training_runs": [{"training_run_id": "r"}]}))
    found = json.loads(run("run", "list", "--limit", "0", "-f", "json")[1])

    assert 1 == len(found["runs"])


def test_run_info_has_its_checkpoints(run, storage):
    storage.add("tinker://r1/weights/old", hours=50)
    storage.add("tinker://r1/weights/new", hours=1)
    storage.add_run("r1", user_metadata={"team": "red"})
    _, out, _ = run("run", "info", "r1")
    values = json.loads(run("run", "info", "r1", "-f", "json")[1])

    assert "Metadata    team=red" in out
    assert out.index("weights/new") < out.index("weights/old")
    assert ["weights/new", "weights/old"] == [c["checkpoint_id"] for c in values["checkpoints"]]


def test_run_info_works_without_a_list_of_checkpoints(run, storage, server):
    storage.add_run("r1")
    status, out, err = run("run", "info", "r1")

    assert 0 == status
    assert "tiny" in out
    assert "this server does not offer training_runs/{run_id}/checkpoints" in err


@pytest.mark.parametrize(
    "command, path",
    [
        (["run", "list"], "training_runs"),
        (["run", "info", "r"], "training_runs/{run_id}"),
        (["session", "list"], "sessions"),
        (["session", "info", "s"], "sessions/{session_id}"),
    ],
)
def test_what_a_server_does_not_offer_is_named(run, server, command, path):
    """SkyRL, TuFT and others lack different endpoints."""
    status, out, err = run(*command)

    assert (1, "") == (status, out)
    assert f"error: this server does not offer {path} (404 on" in err
