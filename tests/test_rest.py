"""RestClient: what is stored on a server, looked up and changed, one short request each."""

from __future__ import annotations

from contextlib import closing

import pytest

import tinkex
from tests.support.fake_server import (
    FakeServer,
    garbage,
    plugged_in,
    reset,
    settings,
    status,
    transport,
)
from tinkex import errors, types
from tinkex.rest import RestClient
from tinkex.runtime.connection import Connection

PATH = "tinker://run:train:0/weights/step-1"
CHECKPOINT = "training_runs/run:train:0/checkpoints/weights/step-1"


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def rest(server):
    with closing(Connection(settings(), transport=transport(server))) as made:
        server.requests.clear()
        yield RestClient(connection=made)


def checkpoint(number):
    return {
        "checkpoint_id": f"weights/{number}",
        "checkpoint_type": "training",
        "tinker_path": f"tinker://r/weights/{number}",
        "time": "2026-01-01T00:00:00Z",
        "from_the_future": 1,
    }


# Single things.


def test_a_training_run(rest, server):
    body = {"training_run_id": "r", "base_model": "tiny", "lora_rank": 8, "last_checkpoint": None}
    server.stored["GET", "training_runs/r"] = (200, body)
    run = rest.get_training_run("r")

    assert ("r", "tiny", 8) == (run.training_run_id, run.base_model, run.lora_rank)
    assert {"access_scope": "owned"} == server.requests[0].query


def test_the_training_run_of_a_checkpoint(rest, server):
    server.stored["GET", "training_runs/run:train:0"] = (200, {"training_run_id": "run:train:0"})

    assert "run:train:0" == rest.get_training_run_by_tinker_path(PATH, "accessible").training_run_id
    assert {"access_scope": "accessible"} == server.requests[0].query


def test_what_a_checkpoint_is_of(rest, server):
    info = rest.get_weights_info_by_tinker_path(PATH)

    assert ("tiny", 8, False, None) == (
        info.base_model,
        info.lora_rank,
        info.train_mlp,
        info.train_unembed,
    )
    assert {"tinker_path": PATH} == server.bodies("weights_info")[0]


def test_a_session(rest, server):
    body = {"training_run_ids": ["a"], "sampler_ids": ["b"]}
    server.stored["GET", "sessions/s1"] = (200, body)

    assert (["a"], ["b"]) == (
        (found := rest.get_session("s1")).training_run_ids,
        found.sampler_ids,
    )


def test_a_sampler(rest, server):
    """Its id is quoted, but for the colons in it."""
    body = {"sampler_id": "a:sample:0", "base_model": "tiny", "model_path": PATH}
    server.stored["GET", "samplers/a:sample:0"] = (200, body)

    assert PATH == rest.get_sampler("a:sample:0").model_path
    with pytest.raises(errors.NotFoundError):
        rest.get_sampler("a b?c")
    assert "samplers/a b?c" == server.requests[-1].path


def test_the_server_itself(rest):
    assert ["tiny"] == rest.get_server_capabilities().model_names
    assert "ok" == rest.health().status


def test_what_is_not_there_is_told(rest, server):
    server.stored["GET", "training_runs/r"] = (404, {"detail": "no training run r"})

    with pytest.raises(errors.NotFoundError, match="no training run r"):
        rest.get_training_run("r")


def test_what_the_server_does_not_offer_is_named(rest, server):
    with pytest.raises(errors.NotOfferedError, match="this server does not offer sessions"):
        rest.list_sessions()


# Changes.


@pytest.mark.parametrize(
    "call, method, path, body",
    [
        (lambda r: r.delete_checkpoint("run:train:0", "weights/step-1"), "DELETE", "", None),
        (lambda r: r.delete_checkpoint_from_tinker_path(PATH), "DELETE", "", None),
        (lambda r: r.publish_checkpoint_from_tinker_path(PATH), "POST", "/publish", None),
        (lambda r: r.unpublish_checkpoint_from_tinker_path(PATH), "DELETE", "/publish", None),
        (
            lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, 60),
            "PUT",
            "/ttl",
            {"ttl_seconds": 60},
        ),
        (
            lambda r: r.set_checkpoint_ttl_from_tinker_path(PATH, None),
            "PUT",
            "/ttl",
            {"ttl_seconds": None},
        ),
    ],
    ids=["delete by id", "delete", "publish", "unpublish", "ttl", "no ttl"],
)
@pytest.mark.parametrize("reply", [(204, None), (200, {}), (200, b"deleted")])
def test_statement_29_a_change_is_a_change_whatever_the_answer_s_body(
    rest, server, call, method, path, body, reply
):
    """A success with nothing in it is no broken JSON. (statement 29)"""
    server.stored[method, CHECKPOINT + path] = reply

    assert call(rest).result() is None
    assert body == server.requests[0].body


def test_a_change_that_is_refused_is_told(rest, server):
    server.stored["DELETE", CHECKPOINT] = (403, {"detail": "it is not yours"})

    with pytest.raises(errors.PermissionDeniedError, match="it is not yours"):
        rest.delete_checkpoint_from_tinker_path(PATH)


@pytest.mark.parametrize("fault", [reset(), status(503), garbage(b"", "")])
def test_trouble_is_tried_again_as_always(rest, server, fault):
    server.stored["DELETE", CHECKPOINT] = (204, None)
    server.script(CHECKPOINT, fault)

    rest.delete_checkpoint_from_tinker_path(PATH)


# Lists.


def pages(server, path, name, items, *, total=None, knows_pages=True):
    """A listing of *items* that is given page by page."""

    def page(seen):
        limit, offset = int(seen.query["limit"]), int(seen.query["offset"])
        part = items[offset : offset + limit] if knows_pages else items
        cursor = {"offset": offset, "limit": limit, "total_count": total or 0}
        return 200, {name: part, "cursor": cursor if total is not None else None}

    server.stored["GET", path] = page


def test_a_page_of_checkpoints(rest, server):
    pages(server, "checkpoints", "checkpoints", [checkpoint(i) for i in range(250)], total=250)
    page = rest.list_user_checkpoints(limit=10, offset=20)

    assert [f"weights/{i}" for i in range(20, 30)] == [c.checkpoint_id for c in page.checkpoints]
    assert types.Cursor(20, 10, 250) == page.cursor
    assert {"limit": "10", "offset": "20"} == server.requests[0].query


@pytest.mark.parametrize("total", [250, None])
@pytest.mark.parametrize("size", [1, 7, 100, 250, 1000])
def test_all_checkpoints_come_page_by_page(rest, server, total, size):
    """Whether the server says how many there are or not."""
    pages(server, "checkpoints", "checkpoints", [checkpoint(i) for i in range(250)], total=total)
    found = [c.checkpoint_id for c in rest.iter_user_checkpoints(page=size)]

    assert [f"weights/{i}" for i in range(250)] == found


def test_pages_are_fetched_only_as_they_are_needed(rest, server):
    pages(server, "checkpoints", "checkpoints", [checkpoint(i) for i in range(250)], total=250)
    every = rest.iter_user_checkpoints(page=10)
    assert [] == server.requests
    next(every)

    assert 1 == len(server.requests)


def test_a_server_that_knows_no_pages_is_no_endless_list(rest, server):
    pages(
        server,
        "checkpoints",
        "checkpoints",
        [checkpoint(i) for i in range(5)],
        knows_pages=False,
    )

    assert 5 == len(list(rest.iter_user_checkpoints(page=3)))


def test_no_checkpoints_are_none(rest, server):
    pages(server, "checkpoints", "checkpoints", [], total=0)

    assert [] == list(rest.iter_user_checkpoints())


def test_training_runs_and_sessions_are_listed_alike(rest, server):
    runs = [{"training_run_id": f"r{i}", "base_model": "tiny"} for i in range(30)]
    pages(server, "training_runs", "training_runs", runs, total=30)
    pages(server, "sessions", "sessions", [f"s{i}" for i in range(30)], total=30)

    assert 20 == len(rest.list_training_runs().training_runs)
    assert 20 == len(rest.list_sessions().sessions)
    assert [f"r{i}" for i in range(30)] == [r.training_run_id for r in rest.iter_training_runs()]
    assert [f"s{i}" for i in range(30)] == list(rest.iter_sessions("accessible", page=7))
    assert "accessible" == server.requests[-1].query["access_scope"]


def test_the_checkpoints_of_a_run(rest, server):
    server.stored["GET", "training_runs/r/checkpoints"] = (200, {"checkpoints": [checkpoint(1)]})
    [one] = rest.list_checkpoints("r").checkpoints

    assert ("weights/1", "r", None) == (one.checkpoint_id, one.training_run_id, one.size_bytes)


def test_a_listing_that_makes_no_sense_is_an_error_of_ours(rest, server):
    server.stored["GET", "checkpoints"] = (200, {"checkpoints": [{"checkpoint_id": 5}]})

    with pytest.raises(errors.APIResponseValidationError, match="checkpoints"):
        rest.list_user_checkpoints()


# Beginning and ending.


def test_it_needs_no_session(monkeypatch):
    server = FakeServer()
    plugged_in(monkeypatch, server)
    with tinkex.RestClient() as client:
        client.health()

    assert ["client/config", "healthz"] == [seen.path for seen in server.requests]


def test_closed_it_says_so(monkeypatch):
    plugged_in(monkeypatch, FakeServer())
    client = tinkex.RestClient()
    client.close()
    client.close()

    with pytest.raises(errors.ClientClosedError):
        client.health()


def test_one_of_a_service_leaves_the_service_open(monkeypatch):
    plugged_in(monkeypatch, FakeServer())
    with tinkex.ServiceClient() as service:
        with service.create_rest_client() as client:
            client.health()

        assert "ok" == service.health().status


def test_its_repr_says_of_what_server(rest):
    assert "<RestClient of http://training.test>" == repr(rest)
